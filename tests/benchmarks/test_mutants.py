"""Mutants are what they say, and the page counts them."""

from __future__ import annotations

import json

import pytest

from benchmarks.mutants.__main__ import EQUIVALENT, _files
from benchmarks.mutants.mutate import apply_mutant, list_mutants
from benchmarks.mutants.report import markdown
from surgery.operations.importance import ranking

FILE = "surgery/operations/importance/ranking.py"


@pytest.fixture
def share_out(monkeypatch):
    """The function, which has its own code again afterwards."""
    monkeypatch.setattr(ranking._share_out, "__code__", ranking._share_out.__code__)
    return ranking._share_out


def test_all_changes_of_a_line_are_listed():
    found = {m.what for m in list_mutants(FILE) if m.source == "parts[k] -= 1"}
    assert found == {"statement dropped", "sub= to add=", "1 to 2", "1 to 0"}
    found = {m.what for m in list_mutants(FILE) if m.source == "if sum(parts) > total and parts[k] > 1:"}
    assert found == {"condition negated", "and to or", "gt to gte", "1 to 2", "1 to 0"}


def test_a_mutant_is_the_function_with_one_change(share_out):
    assert share_out(3, [1, 1, 4]) == [1, 1, 1]
    (mutant,) = (m for m in list_mutants(FILE) if (m.source, m.what) == ("parts[k] -= 1", "statement dropped"))
    apply_mutant(mutant)
    assert share_out(3, [1, 1, 4]) == [1, 1, 2]
    assert share_out(4, [4, 4]) == [2, 2]


def test_every_mutant_compiles_and_finds_its_function(share_out):
    mutants = [m for m in list_mutants(FILE) if m.function == "_share_out"]
    assert len(mutants) > 15
    for mutant in mutants:
        apply_mutant(mutant)
    assert all(list_mutants(file) or file.endswith("__init__.py") for file in _files())


def test_the_page_counts_what_is_killed_and_lists_the_rest():
    row = {"file": FILE, "line": 1, "function": "f", "what": "1 to 2", "source": "x = 1"}
    results = ["killed", "timeout", "lived", "lived", "untested", "invalid"]
    rows = [{**row, "key": str(k), "result": result} for k, result in enumerate(results)]
    rows[3]["reason"] = "It is never read."
    document = {"total": 50, "mutants": rows, "runs": [{"environment": {"versions": {"torch": "2.14"}}}]}
    page = markdown(document)
    assert "5 were drawn and tried. 2 are killed by the fast tests, 1 change no result, 2 live: 50.0 %" in page
    assert "| surgery/operations/importance | 5 | 2 | 1 | 2 |" in page
    assert page.count("It is never read.") == 1
    assert page.count("(no test executes it)") == 1


def test_reasons_are_kept_by_what_names_a_mutant():
    keys = {m.key for file in _files() for m in list_mutants(file)}
    assert set(json.loads(EQUIVALENT.read_text())) <= keys
