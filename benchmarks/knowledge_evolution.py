"""Knowledge Evolution: what its slim networks cost.

    python benchmarks/knowledge_evolution.py cost     # benchmarks/results/ke-cost.{json,md}

``cost``: operations by the authors' counting rule and parameters of their networks, dense and slim at split rates 0.8,
0.5 and 0.25, beside the figures that were worked out from their code (Taha, Shrivastava, Davis, CVPR 2021), and how
many times as fast the slim networks are, measured on ONNX Runtime on the CPU.

What is finished is in the JSON file and is not run again: a killed benchmark goes on where it was. The file has the
settings, the environment of each measurement and all samples. ``--draw`` only writes the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import knowledge_evolution_cost as cost

from surgery.deploy.environment import environment

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    options = parsed()
    out = options.out or RESULTS / f"ke-{options.part}.json"
    if not options.draw:
        out.parent.mkdir(parents=True, exist_ok=True)
        options.run(options, out)
    text = options.table(json.loads(out.read_text()))
    out.with_suffix(".md").write_text(text)
    print(text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("cost", help="operations, parameters and latencies of slim networks")
    part.add_argument("--nets", nargs="+", choices=cost.PUBLISHED, default=list(cost.PUBLISHED), metavar="NET",
                      help=f"which of {', '.join(cost.PUBLISHED)}")  # fmt: skip
    part.add_argument("--min-runs", type=int, default=60, help="rounds of each comparison; 0: measure no latencies")
    part.add_argument("--min-seconds", type=float, default=3.0, help="a network is measured for, on average")
    part.add_argument("--threads", type=int, help="by default all cores")
    part.add_argument("--out", type=Path, help="the JSON file; a table is put beside it")
    part.add_argument("--draw", action="store_true", help="measure nothing")
    part.set_defaults(run=run_cost, table=cost.markdown)
    return parser.parse_args()


def run_cost(options: argparse.Namespace, out: Path) -> None:
    settings = {name: getattr(options, name) for name in ("nets", "min_runs", "min_seconds", "threads")}
    document = opened(out, settings)
    for name in options.nets:
        if not any(row["net"] == name for row in document["counts"]):
            document["counts"] += cost.counts(name)
            save(document, out)
        if options.min_runs and not any(run["net"] == name for run in document["timings"]):
            timing = {key: settings[key] for key in ("min_runs", "min_seconds", "threads")}
            document["timings"].append(cost.timings(name, **timing))
            save(document, out)
            print(f"{name}: measured", flush=True)


def opened(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the file has already, if it is of these settings; else a new document."""
    if out.exists():
        document: dict[str, Any] = json.loads(out.read_text())
        if document["settings"] != settings:
            sys.exit(f"{out} was made with other settings: move it away, or name another file with --out")
        return document
    command = "python benchmarks/knowledge_evolution.py " + " ".join(sys.argv[1:])
    here = environment().to_dict()
    return {"command": command, "environment": here, "settings": settings, "counts": [], "timings": []}


def save(document: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
