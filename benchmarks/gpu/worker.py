"""The process that runs parts of gpu.py: ``python -m benchmarks.gpu.worker FILE DEVICE SMALL SECONDS PART…``."""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import run_part

LOST = 3
"""Exit code after an error of the device, which no later call in this process would survive."""


def main() -> int:
    file, device, small, seconds, *parts = sys.argv[1:]
    warnings.filterwarnings("ignore")
    begun = time.monotonic()
    for part in parts:
        if time.monotonic() - begun > float(seconds):
            return 0
        write(Path(file), {"part": part})
        row, lost = attempt(part, device, bool(int(small)))
        write(Path(file), row)
        if lost:
            return LOST
    return 0


def attempt(part: str, device: str, small: bool) -> tuple[dict[str, Any], bool]:
    """Run one part.

    Returns:
        Its row, with the error where it failed; and whether the device is lost to this process.
    """
    begun, lost = time.perf_counter(), False
    row: dict[str, Any] = {"part": part}
    try:
        row |= run_part(part, device, small)
    except Exception as error:  # whatever a part raises is its result
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        lost = "CUDA error" in str(error)
    if not lost:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return {**row, "seconds": round(time.perf_counter() - begun, 1)}, lost


def write(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
