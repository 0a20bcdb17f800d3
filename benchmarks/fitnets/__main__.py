"""FitNets: what the paper's networks cost, and what hints give.

    python -m benchmarks.fitnets cost     # benchmarks/results/fitnets-cost.{json,md,png}
    python -m benchmarks.fitnets mnist    # benchmarks/results/fitnets-mnist.{json,md,png}
    python -m benchmarks.fitnets depth    # benchmarks/results/fitnets-depth.{json,md,png}
    python -m benchmarks.fitnets step     # benchmarks/results/fitnets-step.{json,md,png}

``cost``: weights and multiplications of the paper's networks by its counting, beside the paper's own, and how many
times as fast as their teachers they are, measured on ONNX Runtime on the CPU, and where there is a GPU on it too
(Romero et al., ICLR 2015, table 5).

``mnist``: the paper's MNIST student, trained on 4,000 images by backpropagation, by KD, and by hints and KD.

``depth``: nets of 5 to 11 layers and one budget, trained by each of the three: which depth does each still train? By
default all channels are halved, the teacher has a quarter of its own, and there are 2,000 training images, so that two
cores are enough.

Both take each net's and method's learning rate from one grid, by a fifth of the training images that is set apart; all
methods have the same number of epochs, those of stage 1 among them. What is finished is in the JSON file and is not
run again: a killed benchmark goes on where it was.

``step``: how long a step of stage 1 takes when both networks run as a whole and hooks keep what the two layers give,
with the truncated networks of `surgery.attach_hint`, and with these and cached hints.

Every file has the settings, the environment and all samples. ``--draw`` only draws what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.fitnets import cost as fitnets_cost
from benchmarks.fitnets import step as fitnets_step
from benchmarks.fitnets.pictures import draw_cost, draw_depth, draw_mnist, draw_step
from benchmarks.fitnets.tables import cost_table, step_table, train_table
from benchmarks.fitnets.train import TrainSettings, all_runs
from benchmarks.results_io import RESULTS, new_document, open_document, read_document, write_document, write_report

REPORTS: dict[str, tuple[Callable[[dict[str, Any]], str], Callable[[dict[str, Any], Path], None]]] = {
    "cost": (cost_table, draw_cost),
    "mnist": (train_table, draw_mnist),
    "depth": (train_table, draw_depth),
    "step": (step_table, draw_step),
}
"""How each part is reported: as a table, and as a picture."""


def main() -> None:
    options = parsed()
    out = options.out or RESULTS / f"fitnets-{options.part}.json"
    if not options.draw:
        out.parent.mkdir(parents=True, exist_ok=True)
        options.run(options, out)
    report(options.part, out)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)

    cost = parts.add_parser("cost", help="counts, and speed-ups over the teachers")
    cost.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    cost.add_argument("--min-runs", type=int, default=60, help="rounds of each comparison")
    cost.add_argument("--min-seconds", type=float, default=3.0, help="a network is measured for, on average")
    cost.add_argument("--threads", type=int, help="by default all cores")
    cost.set_defaults(run=run_cost)

    step = parts.add_parser("step", help="the time of a step of stage 1")
    step.add_argument("--teacher", default="resnet50")
    step.add_argument("--student", default="resnet18")
    step.add_argument("--hint", default="layer2")
    step.add_argument("--guided", default="layer2")
    step.add_argument("--batch-size", type=int, default=8)
    step.add_argument("--image-size", type=int, default=224)
    step.add_argument("--device", default="cpu")
    step.add_argument("--channels-last", action="store_true", help="weights and images of all three ways")
    step.add_argument("--rounds", type=int, default=40)
    step.add_argument("--warmup", type=int, default=4, help="rounds before, which do not count")
    step.set_defaults(run=run_step)

    mnist = parts.add_parser("mnist", help="the MNIST student by three methods")
    mnist.set_defaults(run=run_training, teacher="fitnet_mnist_teacher")
    depth = parts.add_parser("depth", help="which depth of one budget each method trains")
    depth.set_defaults(run=run_training, teacher="fitnet_cifar_teacher")
    for part in (mnist, depth):
        slim = part is depth
        rates = [1e-3, 2e-3, 4e-3] if slim else [2e-3, 4e-3, 8e-3]
        part.add_argument("--dataset", default="mnist5k", help="as surgery.load_data has it")
        part.add_argument("--data-root", help="where a torchvision data set is kept")
        part.add_argument("--limit", type=int, default=2000 if slim else None, help="of training and test images")
        part.add_argument("--teacher-rate", type=float, default=0.25 if slim else 1.0, help="of its channels")
        part.add_argument("--teacher-epochs", type=int, default=8)
        part.add_argument("--teacher-lr", type=float, default=1e-3)
        part.add_argument("--student-rate", type=float, default=0.5 if slim else 1.0, help="of its channels")
        part.add_argument("--init-range", type=float, default=0.005, help="of the students' weights; 0: torch's own")
        part.add_argument("--optimizer", default="adamw")
        part.add_argument("--rates", type=float, nargs="+", default=rates, help="the learning rates tried")
        part.add_argument("--batch-size", type=int, default=64)
        part.add_argument("--hint-epochs", type=int, default=4)
        part.add_argument("--epochs", type=int, default=8 if slim else 10, help="after those of stage 1")
        part.add_argument("--seeds", type=int, default=3 if slim else 5)
        part.add_argument("--jobs", type=int, default=2, help="nets at a time, one thread each")

    for part in (cost, mnist, depth, step):
        part.add_argument("--out", type=Path, help="the JSON file; a table and a picture are put beside it")
        part.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


def run_cost(options: argparse.Namespace, out: Path) -> None:
    settings = {name: getattr(options, name) for name in ("batch_sizes", "min_runs", "min_seconds", "threads")}
    write_document(out, new_document("fitnets", settings=settings, **fitnets_cost.measure(**settings)))


def run_step(options: argparse.Namespace, out: Path) -> None:
    names = (
        "student",
        "teacher",
        "guided",
        "hint",
        "batch_size",
        "image_size",
        "device",
        "rounds",
        "warmup",
        "channels_last",
    )
    settings = fitnets_step.StepSettings(**{name: getattr(options, name) for name in names})
    result = fitnets_step.measure(settings)
    write_document(out, new_document("fitnets", settings=asdict(settings), result=result))


def run_training(options: argparse.Namespace, out: Path) -> None:
    """Everything that the file does not have yet; it is written after each net."""
    taken = {name: getattr(options, name) for name in TrainSettings.__dataclass_fields__}
    settings = TrainSettings(**{**taken, "init_range": options.init_range or None, "rates": tuple(options.rates)})
    document = open_document(out, new_document("fitnets", settings=settings.to_dict(), runs=[]))
    try:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            for record in all_runs(settings, document, options.seeds, pool):
                document["runs"].append(record)
                write_document(out, document)
    except KeyboardInterrupt:
        sys.exit("stopped: what was finished is in " + str(out))


def report(part: str, out: Path) -> None:
    document = read_document(out)
    table, draw = REPORTS[part]
    draw(document, out.with_suffix(".png"))
    write_report(out, table(document))


if __name__ == "__main__":
    main()
