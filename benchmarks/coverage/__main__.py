"""Every operation on every model of the catalogue, in float64 with random weights and random norm statistics.

    python -m benchmarks.coverage --jobs 2                   # all models: benchmarks/results/coverage.{json,md}
    python -m benchmarks.coverage resnet18 'vit_*'           # some models, printed only
    python -m benchmarks.coverage 'vit_*' --merge            # these rows of benchmarks/results anew
    python -m benchmarks.coverage --jobs 2 --missing         # what has no row yet, or one made at one batch size

Errors are relative: of each output, the largest absolute difference over the largest magnitude. Models run on small
inputs, in a form that takes them (``vit_b_16?image_size=32``): the row names both. Of detection models the losses in
training and the raw outputs of the heads in evaluation are compared, and the MACs are those of the network on an image
of the published size with 1,000 proposals. What `ideal` means is said in `ideal.py`.

Each model runs in a process of its own, which is ended at a limit of CPU time or memory; the row then says during
which step. Rows are written as they come: a run that was stopped goes on with ``--missing``. A model of more than a
hundred million parameters runs alone, and is widened and deepened from its half-width version, for the widened float64
copy would not fit in memory; its ratio of parameters is still that of the full model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision

from benchmarks.coverage.report import line, markdown
from benchmarks.results_io import RESULTS, command, read_document, write_document
from surgery import models as catalogue
from surgery.deploy.measure.environment import environment

HEAVY = 100_000_000
"""Models of more parameters run alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names from the catalogue, or globs over them; all by default")
    parser.add_argument("--out", type=Path, help="folder for coverage.json and coverage.md")
    parser.add_argument("--merge", action="store_true", help="keep the other rows that the folder's coverage.json has")
    parser.add_argument("--missing", action="store_true", help="only what has no row at two batch sizes yet")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, each with its share of the cores")
    parser.add_argument("--minutes", type=float, default=20, help="limit of one model, in minutes of CPU time")
    parser.add_argument("--gib", type=float, default=20, help="memory limit of all models that run at a time")
    options = parser.parse_args()
    out = options.out or (RESULTS if options.merge or options.missing or not options.models else None)
    before = {"models": [], "runs": []}
    if (options.merge or options.missing) and out is not None:
        before = _before(out)
    rows = {row["model"]: row for row in before["models"]}
    done = {name for name, row in rows.items() if "batches" in row} if options.missing else set()
    names = [name for name in selected(options.models) if name not in done]
    this = {"command": command("coverage"), "date": date.today().isoformat(), "minutes": 0.0, "models": 0}
    start = time.perf_counter()
    for row in run(names, options.jobs, 60 * options.minutes, options.gib * 2**30):
        rows[row["model"]] = row
        this |= {"minutes": round((time.perf_counter() - start) / 60, 1), "models": this["models"] + 1}
        if out is not None:
            summary = {
                "runs": [*before["runs"], this],
                "device": environment().cpu,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "jobs": options.jobs,
                "limits": {"minutes": options.minutes, "gib": options.gib},
                "models": [rows[name] for name in catalogue.CATALOGUE if name in rows],
            }
            out.mkdir(parents=True, exist_ok=True)
            write_document(out / "coverage.json", summary)
            (out / "coverage.md").write_text(markdown(summary))
    good = sum(not row["failures"] for row in rows.values())
    print(f"{len(rows)} models, {good} without a failure, {this['minutes']} minutes")


def selected(patterns: list[str]) -> list[str]:
    """The names that some glob matches; a glob that matches none is an error."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in catalogue.CATALOGUE):
            raise SystemExit(f"no model of the catalogue is named {pattern}")
    return [n for n in catalogue.CATALOGUE if not patterns or any(fnmatchcase(n, pattern) for pattern in patterns)]


@dataclass
class _Running:
    name: str
    process: subprocess.Popen[bytes]
    file: Path
    errors: Path
    began: float
    peak: int = 0


def run(names: list[str], jobs: int, seconds: float, memory: float) -> Iterator[dict[str, Any]]:
    """The row of each model, as it comes; the heavy ones first and alone."""
    heavy = {name for name in names if catalogue.published(name)["DEFAULT"].meta["num_params"] > HEAVY}
    waiting = [n for n in names if n in heavy] + [n for n in names if n not in heavy]
    running: list[_Running] = []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            alone = any(r.name in heavy for r in running)
            while waiting and not alone and len(running) < jobs and (waiting[0] not in heavy or not running):
                alone = waiting[0] in heavy
                running.append(_start(waiting.pop(0), Path(folder), 1 if alone else jobs))
            time.sleep(0.2)
            for one in list(running):
                said = _overdue(one, seconds, memory if one.name in heavy else memory / jobs)
                if said:
                    one.process.kill()
                    one.process.wait()
                if one.process.poll() is not None:
                    running.remove(one)
                    row = _row(one, said)
                    print(line(row), flush=True)
                    yield row


def _start(name: str, folder: Path, jobs: int) -> _Running:
    file, errors = folder / f"{name}.json", folder / f"{name}.txt"
    threads = max((os.cpu_count() or 1) // jobs, 1)
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.coverage.model", name, str(file)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=stream,
            stderr=stream,
        )
    return _Running(name, process, file, errors, time.perf_counter())


def _overdue(one: _Running, seconds: float, memory: float) -> str:
    """Why a process must be ended, if it must."""
    try:
        process = psutil.Process(one.process.pid)
        one.peak = max(one.peak, process.memory_info().rss)
        spent = sum(process.cpu_times()[:2])
    except psutil.Error:  # it has just ended by itself
        return ""
    if one.peak > memory:
        return f"ended at the memory limit of {memory / 2**30:.0f} GiB"
    if spent > seconds:
        return f"ended at the time limit of {seconds / 60:g} minutes"
    return ""


def _row(one: _Running, said: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model": one.name, "failures": []}
    if one.file.is_file():
        row = json.loads(one.file.read_text())
    if "step" in row or not one.file.is_file():
        last = (one.errors.read_text(errors="replace").strip().splitlines() or [f"code {one.process.returncode}"])[-1]
        row["failures"].append("ended")
        row["ended_said"] = f"{said or last} (during {row.pop('step', 'start')})"
    row["seconds"] = round(time.perf_counter() - one.began, 1)
    row.setdefault("peak_gib", round(one.peak / 2**30, 1))
    return row


def _before(out: Path) -> dict[str, Any]:
    """What the folder has of earlier runs."""
    file = out / "coverage.json"
    return read_document(file) if file.is_file() else {"models": [], "runs": []}


if __name__ == "__main__":
    main()
