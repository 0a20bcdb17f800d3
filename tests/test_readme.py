"""The Python of the README and of the pages in docs runs as printed, and the shell commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from surgery.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_example_of_the_architecture_page_runs_and_prints_what_it_says(capsys):
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks("python", (ROOT / "docs" / "architecture.md").read_text()):
        exec(compile(block, "architecture.md", "exec"), names)
    stem, recipe = capsys.readouterr().out.splitlines()
    assert stem.startswith("stem 8 ['stem.weight[0]', 'stem.bias[0]', 'norm.weight[0]', ")
    assert stem.endswith("'down.weight[1]', 'up.weight[0]', 'up.bias[0]', 'head.weight[1]']")
    assert '"steps": [{"step": "Reindex", "indices": {"stem": ["0:8", 2, 1, 1, 1]}}]' in recipe


def test_the_files_that_the_pages_for_developers_name_are_there():
    named = set(re.findall(r"`((?:surgery|tests|benchmarks|docs)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    for row in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if found := re.match(r"\| `(\w+)/` \|.*\| ([^|]*) \|$", row):
            named |= {f"surgery/{found[1]}/{file}" for file in re.findall(r"`([\w/]+\.py)`", found[2])}
    assert len(named) > 20
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys, page):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python", (ROOT / page).read_text()):
        exec(compile(block, page, "exec"), names)
    printed = capsys.readouterr().out
    if page == "docs/guide.md":
        assert "conv1 64 19" in printed
        assert "'bn1', 'relu', 'maxpool', 'add'" in printed
    assert {"student", "student.onnx"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_something(page):
    text = page.read_text()
    headings = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in re.findall("^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        if not path:
            assert anchor in headings, target
        else:
            assert (page.parent / path).exists(), target


def test_the_readme_is_short():
    assert len(README.split()) <= 1500


def test_every_verb_the_pages_show_exists_and_helps_with_an_example(capsys):
    verbs = set(re.findall(r"\.?surgery (\w+) \w", " ".join([*blocks("bash"), *blocks("bash", GUIDE)])))
    listed = re.search(r"`surgery ((?:\w+ \| )+\w+)`", GUIDE)
    assert listed is not None
    verbs |= set(listed[1].split(" | "))
    assert {"tradeoff", "inspect", "slim", "bench"} <= verbs
    for verb in verbs:
        assert main([verb, "--help"]) == 0
        assert f"Example: surgery {verb}" in " ".join(capsys.readouterr().out.split())
