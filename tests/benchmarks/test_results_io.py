"""Results are small files that can be read again, and name commands that run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import results_io
from benchmarks.results_io import LIMIT, RESULTS, compact, open_document, read_document, write_document

SCRIPTS = [
    "coverage",
    "coverage.libraries",
    "coverage.timm_families",
    "exports",
    "exports.plain",
    "fitnets",
    "gpu",
    "inference",
    "inference.aa",
    "inference.budget",
    "knowledge_evolution",
    "mutants",
    "net2net",
    "random_graphs",
    "reliability",
    "students",
    "versions",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_says_what_it_does_and_how_it_is_run(script, monkeypatch, capsys):
    name = f"benchmarks.{script}"
    if importlib.util.find_spec(name).submodule_search_locations:  # a package runs its __main__
        name += ".__main__"
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{script}" in capsys.readouterr().out


def test_every_benchmark_that_can_be_run_is_in_the_list_above():
    folder = Path(results_io.__file__).parent
    found = {file for file in folder.rglob("*.py") if ".parse_args()" in file.read_text()}
    names = {".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__main__") for file in found}
    assert names == set(SCRIPTS)


def test_no_file_of_results_is_longer_than_the_limit():
    assert {file.name: file.stat().st_size for file in RESULTS.iterdir() if file.stat().st_size > LIMIT} == {}


@pytest.mark.parametrize("table", sorted(RESULTS.glob("*.md")), ids=lambda path: path.stem)
def test_the_commands_in_a_table_name_benchmarks_that_are_there(table):
    commands = re.findall(r"`([^`]*python [^`]*)`", table.read_text())
    assert commands
    for words in map(shlex.split, commands):
        assert words[words.index("python") + 1] == "-m"
        assert words[words.index("-m") + 1].removeprefix("benchmarks.") in SCRIPTS


def test_a_document_is_read_as_it_was_written_and_an_array_of_samples_is_one_line(tmp_path):
    document = {
        "runs": [{"name": "a", "samples_ms": [0.125] * 40, "notes": []}],
        "settings": {"seeds": 5, "rates": [0.5]},
    }
    write_document(tmp_path / "new" / "a.json", document)
    assert read_document(tmp_path / "new" / "a.json") == document
    lines = (tmp_path / "new" / "a.json").read_text().splitlines()
    assert [line.strip() for line in lines if "0.125" in line] == ['"samples_ms":' + compact([0.125] * 40) + ","]


def test_a_long_list_goes_to_files_within_the_limit_and_is_joined_again(tmp_path, monkeypatch):
    monkeypatch.setattr(results_io, "LIMIT", 1000)
    document = {"models": [{"model": f"m{i}", "error": i / 7} for i in range(90)], "torch": "2"}
    write_document(tmp_path / "a.json", document)
    assert read_document(tmp_path / "a.json") == document
    assert all(file.stat().st_size <= 1000 for file in tmp_path.iterdir())
    write_document(tmp_path / "a.json", {"models": document["models"][:2], "torch": "2"})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["models"] == document["models"][:2]


def test_a_document_of_other_settings_is_not_continued(tmp_path):
    new = {"settings": {"seeds": 1}, "runs": []}
    assert open_document(tmp_path / "a.json", new) == new
    write_document(tmp_path / "a.json", {**new, "runs": [1]})
    assert open_document(tmp_path / "a.json", new)["runs"] == [1]
    with pytest.raises(SystemExit, match="made with other settings"):
        open_document(tmp_path / "a.json", {"settings": {"seeds": 2}, "runs": []})
