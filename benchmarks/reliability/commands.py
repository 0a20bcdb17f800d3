"""Commands that are killed while they write, run again, and compared with a run that nobody disturbed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from benchmarks.reliability.killer import can_trace, kill_command

_NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
    )
"""
_MODEL = ("killed_nets:net", "--trust")
_DATA = ("--dataset", "digits", "--limit", "64", "--batch-size", "16")
OUT = "made"


@dataclass(frozen=True)
class Command:
    """A verb and its options; what it writes is named `OUT`, with a suffix if it is a file."""

    name: str
    words: tuple[str, ...]
    suffix: str = ""


COMMANDS = (
    Command("export", ("export", *_MODEL, "--input-shape", "1,3,8,8"), ".onnx"),
    Command("slim", ("slim", *_MODEL, "--input-shape", "1,3,8,8", "--rate", "0.5")),
    Command("distill", ("distill", "killed_nets:net", *_MODEL, *_DATA, "--epochs", "1",
                        "--hint-epochs", "1")),
    Command("evolve", ("evolve", *_MODEL, *_DATA, "--generations", "2", "--epochs", "1")),
    Command("tradeoff", ("tradeoff", *_MODEL, *_DATA, "--split-rates", "0.5", "--epochs", "1",
                         "--finetune-epochs", "1")),
)  # fmt: skip


def kill_often(command: Command, folder: Path, kills: int) -> dict[str, Any]:
    """Kill a command at up to ``kills`` of its system calls that change files, spread over all of them.

    Returns:
        how often it was killed, before which calls; how often something was there that was not whole (``torn``), and
        how often the same command did not end afterwards, left something, or gave other weights (``unfinished``).
    """
    row: dict[str, Any] = {"writer": command.name, "kills": 0, "calls": {}, "lost": 0, "torn": 0, "unfinished": 0}
    if not can_trace():
        return {**row, "note": "this system does not let a process trace its children"}
    whole = _fresh(folder / "whole")
    total = kill_command(_words(command), whole, sys.maxsize).before
    calls: Counter[str] = Counter()
    for number in range(min(kills, total)):
        place = _fresh(folder / "killed")
        killed = kill_command(_words(command), place, number * total // min(kills, total))
        row["kills"] += 1
        calls[killed.call or "none: it had ended"] += 1
        out = place / (OUT + command.suffix)
        row["torn"] += out.exists() and not is_same(out, whole / out.name)
        done = subprocess.run(_words(command), cwd=place, capture_output=True, check=False)
        again = done.returncode == 0 or (killed.call is None or b"exists" in done.stderr)
        left = {path.name for path in place.iterdir()} - {out.name, "killed_nets.py", "__pycache__"}
        row["unfinished"] += not again or bool(left) or not is_same(out, whole / out.name)
    return {**row, "calls": dict(calls)}


def is_same(found: Path, whole: Path) -> bool:
    """Whether a file or folder holds what an undisturbed run wrote: the same files, which can be read, and the same
    weights."""
    if not found.is_dir():
        return found.is_file() and _is_readable(found, whole)
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    return names == {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()} and all(
        _is_readable(found / name, whole / name) for name in names
    )


def _is_readable(file: Path, whole: Path) -> bool:
    if file.suffix == ".safetensors":
        return file.read_bytes() == whole.read_bytes()
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".onnx":
            ours, theirs = (onnx.load(str(path)).graph.initializer for path in (file, whole))
            return [i.SerializeToString() for i in ours] == [i.SerializeToString() for i in theirs]
    except Exception:  # whatever a parser makes of half a file
        return False
    return file.stat().st_size > 0


def _words(command: Command) -> list[str]:
    return [sys.executable, "-m", "surgery", *command.words, "--out", OUT + command.suffix]


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "killed_nets.py").write_text(_NET)
    return folder
