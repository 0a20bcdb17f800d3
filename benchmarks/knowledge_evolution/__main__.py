"""Knowledge Evolution: what its slim networks cost, and what generations give.

    python -m benchmarks.knowledge_evolution cost            # benchmarks/results/ke-cost.{json,md}
    python -m benchmarks.knowledge_evolution generations     # benchmarks/results/ke-generations.{json,md,png}
    python -m benchmarks.knowledge_evolution step            # benchmarks/results/ke-step.{json,md}

``cost``: operations by the authors' counting rule and parameters of their networks, dense and slim at split rates 0.8,
0.5 and 0.25, beside the figures that were worked out from their code (Taha, Shrivastava, Davis, CVPR 2021), and how
many times as fast the slim networks are, measured on ONNX Runtime on the CPU.

``generations``: accuracy of the dense network and of the slim one inside of it after each generation, against the same
network trained for as many epochs at once, on 1,000 images. By default ResNet-18 with a quarter of its channels, so
that two cores are enough. How long a generation is, and each arm's learning rate, is chosen by training images that are
not learned from.

``step``: how long a training step takes in a generation, in `surgery.train`, and in a plain loop of torch.

What is finished is in the JSON file and is not run again: a killed benchmark goes on where it was. The file has the
settings, the environment of each measurement and all samples. ``--draw`` only draws what is there.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from benchmarks.knowledge_evolution import cost, generations, report, step
from benchmarks.results_io import RESULTS, new_document, open_document, read_document, write_document, write_report

NAME = "knowledge_evolution"


def main() -> None:
    options = parsed()
    out = options.out or RESULTS / f"ke-{options.part}.json"
    if not options.draw:
        out.parent.mkdir(parents=True, exist_ok=True)
        options.run(options, out)
    document = read_document(out)
    if options.part == "generations":
        report.draw(document, out.with_suffix(".png"))
    write_report(out, options.table(document))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("cost", help="operations, parameters and latencies of slim networks")
    part.add_argument("--nets", nargs="+", choices=cost.PUBLISHED, default=list(cost.PUBLISHED), metavar="NET",
                      help=f"which of {', '.join(cost.PUBLISHED)}")  # fmt: skip
    part.add_argument("--min-runs", type=int, default=60, help="rounds of each comparison; 0: measure no latencies")
    part.add_argument("--min-seconds", type=float, default=3.0, help="a network is measured for, on average")
    part.add_argument("--threads", type=int, help="by default all cores")
    part.set_defaults(run=run_cost, table=cost.markdown)

    part = parts.add_parser("generations", help="accuracy by generation, against training at once")
    part.add_argument("--dataset", default="mnist5k", help="as surgery.load_data has it")
    part.add_argument("--data-root", help="where a torchvision data set is kept")
    part.add_argument("--image-size", type=int, help="side in pixels; by default the data's own")
    part.add_argument("--train-images", type=int, default=1000, help="that are learned from")
    part.add_argument("--validation-images", type=int, default=1000, help="others, by which settings are chosen")
    part.add_argument("--test-images", type=int, default=3000, help="of the test part, and of what is left to train on")
    part.add_argument("--model", default="resnet18", help="torchvision's")
    part.add_argument("--width", type=float, default=0.25, help="share of its channels that it has")
    part.add_argument("--split-rate", type=float, default=0.5)
    part.add_argument("--generations", type=int, default=10)
    part.add_argument("--epochs", type=int, nargs="+", default=[10, 20], help="of a generation: those tried")
    part.add_argument(
        "--rates", type=float, nargs="+", default=[0.064, 0.128, 0.256], help="learning rates: those tried"
    )
    part.add_argument("--batch-size", type=int, default=32)
    part.add_argument("--seeds", type=int, default=5)
    part.add_argument("--jobs", type=int, default=2, help="networks at a time, one thread each")
    part.set_defaults(run=run_generations, table=report.generations_table)

    part = parts.add_parser("step", help="the time of a training step")
    part.add_argument("--model", default="resnet18", help="torchvision's")
    part.add_argument("--image-size", type=int, default=32)
    part.add_argument("--batch-size", type=int, default=32)
    part.add_argument("--split-rate", type=float, default=0.5)
    part.add_argument("--device", default="cpu")
    part.add_argument("--steps", type=int, default=5, help="of each way in a round")
    part.add_argument("--rounds", type=int, default=30)
    part.set_defaults(run=run_step, table=report.step_table)

    for part in parts.choices.values():
        part.add_argument("--out", type=Path, help="the JSON file; a table is put beside it")
        part.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


def run_cost(options: argparse.Namespace, out: Path) -> None:
    settings = {name: getattr(options, name) for name in ("nets", "min_runs", "min_seconds", "threads")}
    document = open_document(out, new_document(NAME, settings=settings, counts=[], timings=[]))
    for name in options.nets:
        if not any(row["net"] == name for row in document["counts"]):
            document["counts"] += cost.counts(name)
            write_document(out, document)
        if options.min_runs and not any(run["net"] == name for run in document["timings"]):
            timing = {key: settings[key] for key in ("min_runs", "min_seconds", "threads")}
            document["timings"].append(cost.timings(name, **timing))
            write_document(out, document)
            print(f"{name}: measured", flush=True)


def run_generations(options: argparse.Namespace, out: Path) -> None:
    taken = {name: getattr(options, name) for name in generations.Settings.__dataclass_fields__}
    settings = generations.Settings(**{**taken, "epochs": tuple(options.epochs), "rates": tuple(options.rates)})
    document = open_document(out, new_document(NAME, settings=settings.to_dict(), runs=[]))
    try:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for record in generations.all_runs(settings, document, options.seeds, pool):
                document["runs"].append(record)
                write_document(out, document)
    except KeyboardInterrupt:
        sys.exit("stopped: what was finished is in " + str(out))


def run_step(options: argparse.Namespace, out: Path) -> None:
    names = ("model", "image_size", "batch_size", "split_rate", "device", "steps", "rounds")
    settings = step.StepSettings(**{name: getattr(options, name) for name in names})
    document = open_document(out, new_document(NAME, settings=asdict(settings)))
    if "result" not in document:
        write_document(out, {**document, "result": step.measure(settings)})


if __name__ == "__main__":
    main()
