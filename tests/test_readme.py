"""The Python of the README runs as printed, it is short, and the files that developers are pointed to exist."""

from __future__ import annotations

import re

import pytest

from tests.pages import ROOT, run_python

README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(README, "README.md")
    assert {"student", "student.onnx"} <= {p.name for p in tmp_path.iterdir()}


def test_the_files_that_the_pages_for_developers_name_are_there():
    named = set(re.findall(r"`((?:surgery|tests|benchmarks|docs)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    for row in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if found := re.match(r"\| `(\w+)/` \|.*\| ([^|]*) \|$", row):
            named |= {f"surgery/{found[1]}/{file}" for file in re.findall(r"`([\w/]+\.py)`", found[2])}
    assert len(named) > 20
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_the_readme_is_short():
    assert len(README.split()) <= 1500
