"""Every model of the catalogue exported to ONNX, as it is built and slimmed, and compared with torch.

    python -m benchmarks.exports                             # all: benchmarks/results/exports.{json,md}
    python -m benchmarks.exports 'resnet*' --variants slim   # these rows anew, the others kept
    python -m benchmarks.exports --missing                   # what has no row yet

Weights and the statistics of norms are random. As they are built, models are given images of the size that published
weights are evaluated at; detection models resize theirs to a height of 320 pixels, where that can be set. ``small`` is
a model for small images, and ``slim`` has half of its channels in each group. ONNX Runtime and torch are compared at
batch 1, 2 and 3; of a detection model each of these is a file of its own. Each export runs in a process of its own,
ended at a limit of time; rows are written one by one, so that a killed run goes on with ``--missing``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.exports.report import line, markdown
from benchmarks.results_io import RESULTS, new_document, read_document, write_document
from surgery import models as catalogue
from surgery.deploy.measure.environment import usable_cores

VARIANTS = ("built", "small", "slim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names from the catalogue, or globs over them; all by default")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--missing", action="store_true", help="only what has no row yet")
    parser.add_argument("--minutes", type=float, default=20, help="time limit of one model")
    parser.add_argument("--out", type=Path, default=RESULTS / "exports.json", help="the JSON file; a table goes beside")
    options = parser.parse_args()
    out: Path = options.out
    document = read_document(out) if out.exists() else {"runs": [], "models": []}
    document["runs"].append(new_document("exports"))
    rows = {(row["model"], row["variant"]): row for row in document["models"]}
    wanted = [
        (name, variant)
        for variant in options.variants.split(",")
        for name in catalogue.CATALOGUE
        if not options.models or any(fnmatchcase(name, pattern) for pattern in options.models)
    ]
    for name, variant in wanted:
        if options.missing and (name, variant) in rows:
            continue
        rows[name, variant] = {"model": name, **export(name, variant, 60 * options.minutes)}
        print(line(rows[name, variant]), flush=True)
        document["models"] = [rows[n, v] for n in catalogue.CATALOGUE for v in VARIANTS if (n, v) in rows]
        write_document(out, document)
        out.with_suffix(".md").write_text(markdown(document))


def export(name: str, variant: str, seconds: float) -> dict[str, Any]:
    """What came of one model, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.exports.model", name, variant, str(file)],
                env={**os.environ, "OMP_NUM_THREADS": str(usable_cores())},
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
            said = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            said = f"ended at the time limit of {seconds / 60:g} minutes"
        row: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"variant": variant, "step": "start"}
    step = row.pop("step")
    return row if step is None else {**row, "error": f"{said} (during {step})"}


if __name__ == "__main__":
    main()
