"""Does a measurement call a difference where there is none? A model against itself, time and again.

    python -m benchmarks.inference.aa                        # benchmarks/results/aa.{json,md}
    python -m benchmarks.inference.aa --source mobilenet_v3_large --image-size 224 --batch-size 8 --runs 20

One ONNX file is compared with itself, as `surgery bench` compares two, ``--runs`` times. The interval of each ratio
should hold 1, in at least 9 of 10 runs, and be narrow: an interval that is wide always holds it. What sessions differ
by is reported beside: the standard deviation of what each session says of the ratio, and how much of it is left when
the rounds of a session are split at random and each half is asked (which is noise that more rounds would remove; the
rest is the session's own: where weights and activations came to lie in memory).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import surgery
from benchmarks.results_io import RESULTS, new_document, write_document, write_report
from surgery import models as catalogue
from surgery.deploy.measure.benchmark import BenchmarkResult, Comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="resnet18", help="a model of the catalogue")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--min-runs", type=int, default=100)
    parser.add_argument("--min-seconds", type=float, default=1.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS / "aa.json", help="the JSON file; a table is put beside it")
    options = parser.parse_args()
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    document = new_document("inference.aa", settings=settings, runs=[])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        images = torch.randn(2, 3, options.image_size, options.image_size)
        surgery.export_onnx(catalogue.build(catalogue.canonical(options.source), seed=0), path, example_inputs=images)
        for seed in range(options.runs):
            compared = surgery.compare(
                {"a": path, "b": path},
                batch_size=options.batch_size,
                threads=options.threads,
                min_runs=options.min_runs,
                min_seconds=options.min_seconds,
                sessions=options.sessions,
                memory=False,
                check=False,
                seed=seed,
            )
            document["runs"].append(record(compared))
            print(line(document["runs"][-1]), flush=True)
    write_document(options.out, document)
    write_report(options.out, markdown(document))


def record(compared: Comparison) -> dict[str, Any]:
    """One run: the ratio, and by what its sessions differ."""
    ratio, a, b = compared.ratios["b"], compared.results["a"], compared.results["b"]
    said = _log_ratios(a, b, None)
    halves = [_log_ratios(a, b, half) for half in (0, 1)]
    noise = float(np.std(np.subtract(*halves)) / 2)  # of the whole session: a half has twice the variance
    return {
        "value": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "contains_1": ratio.contains_1,
        "p50_ms": a.p50_ms,
        "load_1min": a.environment.load_1min,
        "sessions_sd": float(np.std(said, ddof=1)) if len(said) > 1 else None,
        "noise_sd": noise,
        "samples_ms": {"a": list(a.samples_ms), "b": list(b.samples_ms)},
        "session_runs": list(a.session_runs),
        "turn": a.turn,
    }


def _log_ratios(a: BenchmarkResult, b: BenchmarkResult, half: int | None) -> list[float]:
    """What each session says of the logarithm of the ratio, by all of its rounds or every other one."""
    found, start = [], 0
    for runs in a.session_runs:
        turns = [np.median(np.reshape(one.samples_ms[start : start + runs], (-1, a.turn)), axis=1) for one in (a, b)]
        rounds = slice(None) if half is None or len(turns[0]) < 2 else slice(half, None, 2)
        found.append(float(np.median(np.log(turns[1][rounds]) - np.log(turns[0][rounds]))))
        start += runs
    return found


def line(run: dict[str, Any]) -> str:
    spread = "" if run["sessions_sd"] is None else f"{run['sessions_sd']:.2%}"
    return (
        f"| {run['value']:.4f} | {run['low']:.4f}-{run['high']:.4f} | {'yes' if run['contains_1'] else 'no'} | "
        f"{spread} | {run['noise_sd']:.2%} | {run['p50_ms']:.3f} | {run['load_1min']:.1f} |"
    )


def markdown(document: dict[str, Any]) -> str:
    runs, settings, where = document["runs"], document["settings"], document["environment"]
    held = sum(run["contains_1"] for run in runs)
    width = float(np.median([math.sqrt(run["high"] / run["low"]) - 1 for run in runs]))
    spreads = [run["sessions_sd"] for run in runs if run["sessions_sd"] is not None]
    lines = [
        f"# {settings['source']} against itself",
        "",
        f"`{document['command']}`; {where['date'][:10]}, {where['cpu']}, {where['cpu_cores_usable']} cores, "
        f"onnxruntime {where['versions']['onnxruntime']}, load {where['load_1min']:.1f} at the start. "
        f"**{held} of {len(runs)} intervals hold 1**; the median interval is ±{width:.2%}"
        + (
            f", and sessions differ by {np.median(spreads):.2%} (standard deviation of their ratio)."
            if spreads
            else "."
        ),
        "",
        "| ratio | 95% interval | holds 1 | sessions differ by | of that, noise of rounds | p50 ms | load |",
        "|---|---|---|---|---|---|---|",
        *map(line, runs),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
