"""The pages in docs: their Python runs and prints what they say, links lead somewhere, and the reference is whole."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import surgery
from surgery.cli import main
from surgery.lazy import public_names
from tests.pages import PAGES, ROOT, blocks, headings, links, name_of, run_python

DOCS = ROOT / "docs"
WITH_PYTHON = [page for page in PAGES if DOCS in page.parents and blocks("python", page.read_text())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_the_python_of_a_page_runs_from_top_to_bottom(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_python(page.read_text(), name_of(page))


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("print(1 + 1)  # → 3", "says '3', and prints '2'"),
        ("print([1, 2, 3])\n# → [1, …, 4]", "says '[1, …, 4]', and prints '[1, 2, 3]'"),
        ("if False:\n    print(1)  # → 1", "is never printed"),
    ],
)
def test_what_a_page_is_wrong_about_is_noticed(block, problem):
    with pytest.raises(AssertionError, match=re.escape(problem)):
        run_python(f"```python\n{block}\n```\n", "page")


def test_rules_and_steps_of_a_page_end_with_it():
    step = "class Mine(surgery.Step):\n    def apply(self, module):\n        return module\n"
    rule = "surgery.oprule(torch.special.modified_bessel_i0)(lambda op, x: op.elementwise(x))\n"
    known = set(surgery.Step.known)
    run_python(f"```python\nimport surgery, torch\n{step}{rule}```\n", "page")
    assert set(surgery.Step.known) == known
    with pytest.raises(surgery.UsageError, match="no rule"):
        surgery.check_rule(torch.special.modified_bessel_i0, torch.randn(2, 3))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_to_something(page):
    for target in links(page.read_text()):
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        if anchor:
            assert anchor in headings(place.read_text()), target


def test_every_page_has_its_place_in_the_navigation():
    listed = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_operation_is_on_the_page_of_operations():
    text = (DOCS / "guide.md").read_text()
    assert {name_of(page) for page in (DOCS / "guide").glob("*.md")} == {f"docs/{one}" for one in links(text)[1:]}
    assert links(text)[0] == "../README.md"


def test_every_public_name_is_in_the_reference_once():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    package = Path(surgery.__file__).parent
    names = [f"surgery.{name}" for name in public_names(package / "__init__.pyi")]
    names += [f"surgery.models.{name}" for name in public_names(package / "models" / "__init__.pyi")]
    extra = {"surgery.progress.Progress"}
    assert sorted(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)) == sorted({*names, *extra})


def test_every_verb_the_pages_show_exists_and_helps_with_an_example(capsys):
    text = "\n".join(page.read_text() for page in PAGES)
    verbs = set(re.findall(r"^(?:\S*/)?surgery (\w+) \S", "\n".join(blocks("bash", text)), flags=re.MULTILINE))
    listed = re.search(r"`surgery ((?:\w+ \| )+\w+)`", text)
    assert listed is not None
    assert {"tradeoff", "inspect", "slim", "bench"} <= verbs <= set(listed[1].split(" | "))
    for verb in listed[1].split(" | "):
        assert main([verb, "--help"]) == 0
        assert f"Example: surgery {verb}" in " ".join(capsys.readouterr().out.split())


def test_the_options_that_the_pages_show_exist(capsys):
    shown: dict[str, set[str]] = {}
    for line in "\n".join(blocks("bash", "\n".join(page.read_text() for page in PAGES))).splitlines():
        if found := re.match(r"(?:\S*/)?surgery (\w+) ", line):
            shown.setdefault(found[1], set()).update(re.findall(r" (--[\w-]+)", line))
    assert {"--macs", "--latency", "--rate"} <= shown["slim"]
    for verb, options in shown.items():
        main([verb, "--help"])
        assert options <= set(re.findall(r"--[\w-]+", capsys.readouterr().out)), verb


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="needs pip install '.[docs]'")
def test_the_pages_are_built_without_a_warning(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout) == (0, ""), built.stderr
    assert 'id="surgery.widen"' in (tmp_path / "reference" / "operations" / "index.html").read_text()
