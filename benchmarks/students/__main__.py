"""Slim networks without a step of training: how much of the dense network's accuracy is left?

    python -m benchmarks.students --seeds 3      # benchmarks/results/students.{json,md}

For each seed a ResNet-18 is trained on 5,000 MNIST images of 32 pixels. Its slim networks are scored on the test images
three times: as they are carved; with the statistics of their BatchNorms measured anew on the training images; and with
their layers fitted to what the dense network gives on 512 of these (``surgery.slim(..., calibration=data)``). Nothing
is chosen on the test images. What a run has found is kept, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from benchmarks.results_io import RESULTS, new_document, open_document, write_document
from surgery import models as catalogue
from surgery.training.evolve import recalibrate

SIZE, EPOCHS, LR, BATCH = 32, 5, 0.01, 64
RATES = (0.75, 0.5, 0.25)
IMPORTANCES = ("magnitude", "prefix")
KINDS = ("carved", "BatchNorm measured anew", "compensated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trained networks, those of earlier runs included")
    parser.add_argument("--out", type=Path, default=RESULTS / "students.json", help="the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"image_size": SIZE, "epochs": EPOCHS, "lr": LR, "batch_size": BATCH, "dataset": "mnist5k"}
    document = open_document(options.out, new_document("students", settings=settings, networks=[]))
    data = surgery.load_data("mnist5k", image_size=SIZE)
    for seed in range(len(document["networks"]), options.seeds):
        document["networks"].append(run(seed, data))
        write_document(options.out, document)
        options.out.with_suffix(".md").write_text("\n".join(markdown(document)) + "\n")


def run(seed: int, data: surgery.Data) -> dict[str, Any]:
    """Train one network and score what is carved out of it."""
    model = catalogue.build("resnet18", num_classes=10, seed=seed)
    traced = surgery.trace(model, torch.zeros(2, 3, SIZE, SIZE), source="torchvision:resnet18?num_classes=10")
    dense = surgery.train(traced, data, epochs=EPOCHS, lr=LR, batch_size=BATCH, seed=seed).module.eval()
    row: dict[str, Any] = {"seed": seed, "dense": accuracy(dense, data), "slim": []}
    print(seed, "dense", row["dense"], flush=True)
    for rate in RATES:
        for importance in IMPORTANCES:
            carved = surgery.slim(dense, rate, importance=importance)
            start = time.process_time()
            fitted = surgery.slim(dense, rate, importance=importance, calibration=data)
            found: dict[str, Any] = {"rate": rate, "importance": importance}
            found["seconds"] = round(time.process_time() - start, 1)
            for kind, module in zip(KINDS, (carved, recalibrate(carved, data), fitted), strict=True):
                found[kind] = accuracy(module, data)
            row["slim"].append(found)
            print(seed, found, flush=True)
    return row


def accuracy(module: nn.Module, data: surgery.Data) -> float:
    """On the test images, in percent."""
    return round(100 * surgery.evaluate(module, data.test).accuracy, 2)


def markdown(document: dict[str, Any]) -> Iterator[str]:
    """The table."""
    networks, env = document["networks"], document["environment"]
    rows = [row for network in networks for row in network["slim"]]
    dense = [network["dense"] for network in networks]
    yield "# Slim networks without training\n"
    yield (
        f"ResNet-18, trained {EPOCHS} epochs on 5,000 MNIST images of {SIZE} pixels: {_median(dense)} of the test "
        f"images are right. Medians of {len(networks)} seeds, and the range. Channels are kept at a rate in every "
        "group; compensation and BatchNorm see training images only, compensation 512 of them. It took "
        f"{min(row['seconds'] for row in rows):.0f} to {max(row['seconds'] for row in rows):.0f} s of one core.\n"
    )
    yield f"Made with torch {env['versions']['torch']} on {env['cpu']} by `{document['command']}`.\n"
    yield "| rate | channels by | " + " | ".join(KINDS) + " |"
    yield "| ---: | --- |" + " ---: |" * len(KINDS)
    for rate in RATES:
        for importance in IMPORTANCES:
            same = [row for row in rows if (row["rate"], row["importance"]) == (rate, importance)]
            cells = " | ".join(_median([row[kind] for row in same]) for kind in KINDS)
            yield f"| {rate} | {importance} | {cells} |"


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
