"""Small budgets of what `python -m benchmarks.reliability` counts."""

from __future__ import annotations

import random

import pytest

from benchmarks.reliability.__main__ import damage, kill, markdown
from benchmarks.reliability.artefacts import ARTEFACTS
from benchmarks.reliability.chains import run_chain
from benchmarks.reliability.commands import COMMANDS, is_same, kill_often
from benchmarks.reliability.killer import can_trace
from benchmarks.reliability.mutations import mutate_bytes, mutate_json


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda artefact: artefact.name)
def test_a_damaged_file_is_refused_or_made_again(tmp_path, artefact):
    row = damage(artefact, tmp_path / "made", 25)
    assert row["bad"] == []
    assert (row["slow"], row["large"]) == (0, 0)
    assert sum(row.get(kind, 0) for kind in ("refused", "same", "other")) == 25


@pytest.mark.parametrize("seed", range(4))
def test_a_chain_of_edits_computes_what_it_must(tmp_path, seed):
    assert run_chain(seed, tmp_path) == ""


@pytest.mark.skipif(not can_trace(), reason="this system does not let a process trace its children")
def test_kills_are_counted(tmp_path):
    row = kill("save --force", True, tmp_path / "saved", 3)
    assert (row["kills"], sum(row["calls"].values())) == (3, 3)
    assert (row["lost"], row["torn"], row["unfinished"]) == (0, 0, 0)
    document = {"runs": [{"environment": {"versions": {"torch": "2.14"}}}], "killed": [row]}
    text = markdown({**document, "chains": [{"chains": 1, "wrong": ["seed 3"]}]})
    assert f"| save --force | 3 | {len(row['calls'])} | 0 | 0 | 0 |" in text
    assert text.endswith("1 chains at two batch sizes, 1 wrong.\n\n- seed 3\n")


@pytest.mark.slow
@pytest.mark.skipif(not can_trace(), reason="this system does not let a process trace its children")
def test_a_command_that_is_killed_ends_the_next_time(tmp_path):
    (slim,) = (command for command in COMMANDS if command.name == "slim")
    row = kill_often(slim, tmp_path, 2)
    assert (row["kills"], sum(row["calls"].values()), "none: it had ended" in row["calls"]) == (2, 2, False)
    assert (row["torn"], row["unfinished"]) == (0, 0)


def test_half_of_what_is_written_is_not_taken_for_whole(tmp_path):
    whole, found = tmp_path / "whole", tmp_path / "found"
    for folder in (whole, found):
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(b"12345")
        (folder / "b.json").write_text('{"a": 1}')
    assert is_same(found, whole)
    for name, content in (("a.safetensors", b"1234"), ("b.json", b'{"a"'), ("b.json", b"")):
        kept = (found / name).read_bytes()
        (found / name).write_bytes(content)
        assert not is_same(found, whole)
        (found / name).write_bytes(kept)
    (found / "more").write_text("x")
    assert not is_same(found, whole)


def test_a_mutation_changes_data_the_same_way_each_time_and_leaves_the_original():
    content = {"a": [1, {"b": 2}], "c": "d"}
    once, again = ([mutate_json(content, random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert repr(once) == repr(again)
    assert content == {"a": [1, {"b": 2}], "c": "d"}
    assert sum(repr(one) != repr(content) for one in once) > 40
    changed = [mutate_bytes(b"0123456789" * 9, random.Random(seed)) for seed in range(50)]
    assert sum(one != b"0123456789" * 9 for one in changed) > 45
