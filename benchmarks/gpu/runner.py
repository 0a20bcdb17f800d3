"""Runs parts one after the other in a worker process, and begins a new worker where one is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import limit_of

START = 120.0
"""Seconds that a worker may take to begin its first part: imports, and the device's context."""


@dataclass(frozen=True)
class Plan:
    """Which parts to run, and on what."""

    parts: tuple[str, ...]
    device: str
    small: bool


def run_parts(plan: Plan, end: float) -> Iterator[dict[str, Any]]:
    """Run each part, and yield its row: ``part`` and ``seconds``, and what it found or its ``error``.

    Args:
        plan: what to run.
        end: no part begins after this time (`time.monotonic`).
    """
    left = list(plan.parts)
    while left and time.monotonic() < end:
        for row in _worker_rows(Plan(tuple(left), plan.device, plan.small), end):
            left.remove(row["part"])
            yield row


def _worker_rows(plan: Plan, end: float) -> Iterator[dict[str, Any]]:
    """The rows of one worker, and of the part at which it was lost.

    The worker writes a line when it begins a part and one when the part is done.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-gpu-") as folder:
        file, said = Path(folder) / "rows.jsonl", Path(folder) / "said.txt"
        file.touch()
        left = max(0.0, end - time.monotonic())
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu.worker",
            str(file),
            plan.device,
            str(int(plan.small)),
            str(left),
        ]
        with said.open("w") as errors:
            worker = subprocess.Popen(
                [*command, *plan.parts], stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
        try:
            done, part, since = 0, plan.parts[0], time.monotonic()
            limit = START + limit_of(part)
            while True:
                over = worker.poll() is not None
                for text in file.read_text().splitlines(keepends=True)[done:]:
                    if not text.endswith("\n"):
                        break  # half written
                    done += 1
                    row = json.loads(text)
                    part, since, limit = row["part"], time.monotonic(), limit_of(row["part"])
                    if "seconds" in row:
                        part = ""  # it may end here
                        yield row
                if over:
                    if worker.returncode and part:
                        last = (said.read_text().strip().splitlines() or [f"code {worker.returncode}"])[-1]
                        yield _lost(part, since, f"the worker ended: {last}")
                    return
                if part and time.monotonic() - since > limit:
                    yield _lost(part, since, f"ended at the time limit of {limit_of(part):g} s")
                    return
                time.sleep(0.1)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # and what it started
            worker.wait()


def _lost(part: str, since: float, error: str) -> dict[str, Any]:
    return {"part": part, "seconds": round(time.monotonic() - since, 1), "error": error}
