"""The README's Python runs as printed, and its shell commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surgery.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "conv1 64 19" in printed
    assert "'bn1', 'relu', 'maxpool', 'add'" in printed
    assert {"student", "student.onnx"} <= {p.name for p in tmp_path.iterdir()}


def test_every_verb_the_readme_shows_exists_and_helps_with_an_example(capsys):
    verbs = set(re.findall(r"\.?surgery (\w+) \w", " ".join(blocks("bash"))))
    listed = re.search(r"`surgery ((?:\w+ \| )+\w+)`", README)
    assert listed is not None
    verbs |= set(listed[1].split(" | "))
    assert {"tradeoff", "inspect", "slim", "bench"} <= verbs
    for verb in verbs:
        assert main([verb, "--help"]) == 0
        assert f"Example: surgery {verb}" in " ".join(capsys.readouterr().out.split())
