"""A writer that is killed at any system call loses nothing: the earlier result or the new one is there, whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from benchmarks.reliability.killer import can_trace, kill_at
from surgery.storage.folders import unfinished_folder

pytestmark = pytest.mark.skipif(not can_trace(), reason="this system does not let a process trace its children")


def traced(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return surgery.trace(nn.Linear(3, 2), torch.zeros(1, 3))


def kills(run: Callable[[], object], first: int = 0, stride: int = 1) -> Iterator[int]:
    """Kill the run at every ``stride``-th system call, one in each run, to its end; yields after each."""
    for count in range(first, 2000, stride):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the child only writes files
            name = kill_at(run, count)
        yield count
        if name is None:
            return
    pytest.fail("the run does not end")


def weights(folder: Path) -> torch.Tensor:
    return surgery.load(folder, model=nn.Linear(3, 2)).get_parameter("weight")


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("exchanged", [True, False], ids=["exchange", "renames"])
def test_a_forced_save_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, exchanged, first):
    if not exchanged:
        monkeypatch.setattr("surgery.storage.folders.exchange", lambda one, other: False)
    old, new, folder = traced(0), traced(1), tmp_path / "saved"
    surgery.save(old, folder)
    for count in kills(lambda: surgery.save(new, folder, force=True), first, 6):
        if not folder.exists():  # between two renames: what the next run puts back
            assert not exchanged
            (left,) = tmp_path.glob(".saved-*.surgery-replaced")
            assert torch.equal(weights(left), old.weight)
            with pytest.raises(surgery.UsageError, match="saved exists"):
                surgery.save(new, folder)
        found = weights(folder)
        assert torch.equal(found, old.weight) or torch.equal(found, new.weight), count
        surgery.save(old, folder, force=True)
        assert list(tmp_path.iterdir()) == [folder]
    assert torch.equal(found, new.weight)


def test_a_first_save_is_whole_or_not_there(tmp_path):
    new, folder = traced(1), tmp_path / "saved"
    for _ in kills(lambda: surgery.save(new, folder)):
        if folder.exists():
            assert torch.equal(weights(folder), new.weight)
        surgery.save(new, folder, force=True)
        assert list(tmp_path.iterdir()) == [folder]
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_run_that_is_killed_keeps_what_is_done_and_the_next_one_ends(tmp_path):
    out = tmp_path / "demo"

    def run() -> None:
        with unfinished_folder(out, {"epochs": 3}) as folder:
            (folder / "weights.pt").write_text("work")
            (folder / "more.pt").write_text("work")

    for _ in kills(run):
        run()
        assert not any(tmp_path.iterdir())
