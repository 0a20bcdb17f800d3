"""Does a model that was slimmed to a latency keep to it? What was predicted and measured, and what it takes later.

    python -m benchmarks.inference.budget                             # benchmarks/results/budget.{json,md}
    python -m benchmarks.inference.budget --models resnet18 --shares 0.5 --out budget.json

The budget is a share of the dense model's latency on ONNX Runtime, on the CPU. `surgery.slim_to_budget` chooses the
widths (random weights: speed does not depend on them, and what goes is judged by the weights' squares). Then dense and
slim model are measured anew, taking turns: did the search keep to the budget, or was it lucky once?
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import surgery
from benchmarks.results_io import RESULTS, new_document, write_document, write_report
from surgery import models as catalogue

MODELS = "resnet18,resnet50,mobilenet_v3_large"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="names of the catalogue")
    parser.add_argument("--shares", default="0.5,0.25", help="budgets, as parts of the dense latency")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sessions", type=int, default=10, help="of the measurement afterwards")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="spent on each model, each time")
    parser.add_argument("--out", type=Path, default=RESULTS / "budget.json", help="a table goes beside it")
    options = parser.parse_args()
    shares = [float(share) for share in options.shares.split(",")]
    measured = [row for name in options.models.split(",") for row in measure(name, shares, options)]
    document = new_document("inference.budget", measured=measured)
    write_document(options.out, document)
    write_report(options.out, markdown(document))


def measure(name: str, shares: list[float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One model, at each share of its latency."""
    source = catalogue.canonical(name)
    dense = surgery.trace(catalogue.build(source, seed=0).eval(), catalogue.example_inputs(source), source=source)
    timing = {"threads": options.threads, "min_seconds": options.min_seconds}
    before = surgery.benchmark(dense, memory=False, **timing).p50_ms
    rows = []
    for share in shares:
        began = time.perf_counter()
        found = surgery.slim_to_budget(dense, latency_ms=share * before, **timing)
        seconds = time.perf_counter() - began
        models = {"dense": dense, "slim": found.module}
        later = surgery.compare(models, memory=False, sessions=options.sessions, **timing)
        rows.append(
            {
                "model": name,
                "share": share,
                "search": found.to_dict(),
                "search_seconds": seconds,
                "macs_ratio": surgery.cost(dense).macs / surgery.cost(found.module).macs,
                "later_ms": later.results["slim"].p50_ms,
                "later": later.to_dict(),
                "speedup": asdict(later.ratios["slim"].inverse),
            }
        )
        print(f"{name} at {share:g} of {before:.3f} ms: {found.measured:.3f} ms, {seconds:.0f} s", flush=True)
    return rows


def markdown(document: dict[str, Any]) -> str:
    """A row for each model and budget."""
    machine, threads = document["environment"], document["measured"][0]["later"]["results"]["slim"]["threads"]
    lines = [
        "# Models slimmed to a latency",
        "",
        f"`{document['command']}`; {machine['date'][:10]}, {machine['cpu']}, ONNX Runtime "
        f"{machine['versions']['onnxruntime']}, batch 1, threads: {threads}. The search measures whole models and "
        "corrects its prediction by each; what it ends with takes at most the budget in two measurements. Later, dense "
        "and slim model take turns: the speed-up is a ratio of that run, with its interval of 95 %.",
        "",
        "| model | dense, ms | budget, ms | first predicted | it took | models tried | predicted | measured "
        "| later, ms | later to budget | speed-up | MACs ratio | widths in multiples of | search, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in document["measured"]:
        search, speedup = row["search"], row["speedup"]
        first = search["trials"][0]
        noisy = " (too noisy)" if row["later"]["too_noisy"] else ""
        cells = [
            row["model"],
            *(f"{ms:.2f}" for ms in (search["before"], search["limit"], first["predicted"], first["measured"])),
            str(len(search["trials"])),
            *(f"{ms:.2f}" for ms in (search["predicted"], search["measured"], row["later_ms"])),
            f"{row['later_ms'] / search['limit']:.3f}",
            f"{speedup['value']:.2f} ({speedup['low']:.2f}-{speedup['high']:.2f}){noisy}",
            f"{row['macs_ratio']:.2f}",
            str(search["round_to"]),
            f"{row['search_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
