"""Does growing a trained network save training? Net2Net against random padding and training from scratch.

    python -m benchmarks.net2net                                      # benchmarks/results/net2net-mnist5k.{json,md,png}
    python -m benchmarks.net2net --schedule cosine --lr 0.05 --epochs 12 --teacher-epochs 12 --budget 0.5 --seeds 2 \\
        --out benchmarks/results/net2net-mnist5k-cosine.json
    python -m benchmarks.net2net --dataset torchvision:CIFAR10 --data-root DIR --model resnet18 --deepen layer3=1

For each seed a teacher is trained, for ``--teacher-epochs``: the student's architecture with ``--teacher-rate`` of its
channels. From it come a net as wide as the student and a deeper one. Each is trained three ways, with the same
optimiser, learning rate and order of images:

    net2net   the function-preserving transformation (Chen, Goodfellow, Shlens 2016)
    padding   the teacher's weights where it has some, random ones in new channels and layers
    scratch   random weights everywhere

The measure is the paper's: after how many epochs the test accuracy is the one that the net trained from scratch ends
with. For that the median of its last three epochs is taken, since single epochs scatter. With ``--budget`` below 1 all
three are given that fraction of the epochs, over which the schedule decays, and net2net and scratch all of them as
well. Training images are shifted, turned, sheared and scaled at random; test images are as they are.

The runs of a seed are written to the JSON file when they end, and are not run again: a killed benchmark goes on where
it was. ``--draw`` only draws what is there.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.net2net.report import draw, markdown
from benchmarks.net2net.run import GROWTHS, Settings, run_seed
from benchmarks.results_io import RESULTS, new_document, open_document, read_document, write_document, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist5k", help="as surgery.load_data has it")
    parser.add_argument("--data-root", help="where a torchvision data set is kept")
    parser.add_argument(
        "--model", default="inception", help="inception: the small one beside this file; or torchvision's"
    )
    parser.add_argument("--deepen", action="append", metavar="PLACE=COUNT", help="where the deeper net has more layers")
    parser.add_argument("--teacher-rate", type=float, default=0.3**0.5, help="the paper's sqrt(0.3), by default")
    parser.add_argument("--teacher-epochs", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--budget", type=float, default=1.0, help="fraction of the epochs that grown nets are given")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--schedule", default="constant")
    parser.add_argument("--break-symmetry", default="zero-sum", help="none, uneven, zero-sum or noise")
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--out", type=Path, help="the JSON file; a picture and a table are put beside it")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    options = parser.parse_args()
    out = options.out or RESULTS / f"net2net-{options.dataset.replace(':', '-')}.json"
    if options.draw:
        report(read_document(out), out)
        return
    settings = Settings(
        dataset=options.dataset,
        data_root=options.data_root,
        model=options.model,
        deepen={place: int(count) for place, _, count in (p.partition("=") for p in options.deepen or ())},
        teacher_rate=options.teacher_rate,
        teacher_epochs=options.teacher_epochs,
        epochs=options.epochs,
        budget=options.budget,
        lr=options.lr,
        schedule=options.schedule,
        break_symmetry=None if options.break_symmetry == "none" else options.break_symmetry,
        noise=options.noise,
    )
    document = open_document(out, new_document("net2net", settings=settings.to_dict(), runs=[]))
    try:
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            seeds = [s for s in range(options.seeds) if not complete(document, settings, s)]
            for done in as_completed([pool.submit(run_seed, settings, seed) for seed in seeds]):
                document["runs"] += done.result()
                document["runs"].sort(key=lambda run: run["seed"])
                write_document(out, document)
    except KeyboardInterrupt:
        sys.exit("stopped: what was finished is in " + str(out))
    report(document, out)


def complete(document: dict[str, Any], settings: Settings, seed: int) -> bool:
    return sum(run["seed"] == seed for run in document["runs"]) == 1 + len(GROWTHS) * len(settings.arms)


def report(document: dict[str, Any], out: Path) -> None:
    draw(document, out.with_suffix(".png"))
    write_report(out, markdown(document))


if __name__ == "__main__":
    main()
