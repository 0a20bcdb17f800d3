"""Part `step` of `knowledge_evolution.py`: how long a training step takes, three ways."""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery import models as catalogue
from surgery.deploy.measure.benchmark import ratio_of_medians
from surgery.training.data.data import Data, Normalisation
from surgery.training.evolve import PAPER, evolve
from surgery.training.history import Score

WAYS = ("torch", "train", "evolve")
"""A plain loop of torch on the model as torchvision has it; `surgery.train`; the second generation of
`surgery.evolve`, whose weights are partly kept and partly new."""


@dataclass(frozen=True)
class StepSettings:
    """Which model, on which inputs, how often."""

    model: str
    image_size: int
    batch_size: int
    split_rate: float
    device: str
    steps: int
    """Of each way in each round; one more comes before, and does not count."""
    rounds: int
    lr: float = 0.01
    seed: int = 0


def measure(settings: StepSettings) -> dict[str, Any]:
    """Milliseconds of a step by round and way: the median of its steps. The ways take turns, in random order.

    All train the same network with the same optimiser on as many images of random pixels. What happens between two
    generations is measured beside it: it comes once in a generation.
    """
    source = catalogue.canonical(settings.model, num_classes=10)
    model = catalogue.build(source, seed=settings.seed)
    data = _data(settings)
    traced = surgery.trace(model, torch.stack([data.train[k][0] for k in range(2)]), source=source)
    model, traced = (module.to(settings.device) for module in (model, traced))
    rng = np.random.default_rng(settings.seed)
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number in range(settings.rounds + 1):
        for way in rng.permutation(WAYS):
            gc.collect()
            found = {"torch": plain, "train": trained, "evolve": evolved}[way](
                model if way == "torch" else traced, data, settings
            )
            if number:  # the first round warms up
                times[way].append(found)
    by_round = {way: np.median(np.array(samples), axis=1) for way, samples in times.items()}
    ratios = {way: ratio_of_medians(by_round["evolve"], by_round[way], 0.95, rng) for way in WAYS[:2]}
    masks = surgery.split_masks(traced, settings.split_rate)
    between = [_seconds(lambda: surgery.reset_hypothesis(traced, masks)) for _ in range(5)]
    return {
        "threads": torch.get_num_threads(),
        "samples_ms": times,
        "median_ms": {way: float(np.median(rounds)) for way, rounds in by_round.items()},
        "ratios": {
            way: {"value": r.value, "low": r.low, "high": r.high, "confidence": r.confidence}
            for way, r in ratios.items()
        },
        "reset_ms": [1e3 * seconds for seconds in between],
    }


def plain(model: nn.Module, data: Data, settings: StepSettings) -> list[float]:
    """Milliseconds of each step of a loop as one writes it."""
    network = copy.deepcopy(model).train()
    descent = torch.optim.SGD(network.parameters(), settings.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    stamps = []
    for images, labels in DataLoader(data.train, settings.batch_size, shuffle=True):
        output = network(images.to(settings.device))
        loss = functional.cross_entropy(output, labels.to(settings.device), label_smoothing=0.1)
        descent.zero_grad(set_to_none=True)
        loss.backward()
        descent.step()
        loss.item()
        stamps.append(time.perf_counter())
    return _between(stamps)


def trained(traced: nn.Module, data: Data, settings: StepSettings) -> list[float]:
    stamps = []
    surgery.train(
        traced, data, epochs=1, lr=settings.lr, batch_size=settings.batch_size, label_smoothing=0.1,
        weight_decay=1e-4, schedule="warmup-cosine", progress=lambda *_: stamps.append(time.perf_counter()),
    )  # fmt: skip
    return _between(stamps)


def evolved(traced: nn.Module, data: Data, settings: StepSettings) -> list[float]:
    stamps = []

    def told(task: str, done: int, total: int) -> None:
        if task == "generation-2":
            stamps.append(time.perf_counter())

    evolve(
        traced, data, settings.split_rate, 2, PAPER, epochs=1, lr=settings.lr, batch_size=settings.batch_size,
        progress=told, score=lambda network: Score(0, 1),
    )  # fmt: skip
    return _between(stamps)


def _between(stamps: list[float]) -> list[float]:
    return [1e3 * (after - before) for before, after in pairwise(stamps)]


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _data(settings: StepSettings) -> Data:
    generator = torch.Generator().manual_seed(settings.seed)
    count = settings.batch_size * (settings.steps + 1)
    images = torch.randn(count, 3, settings.image_size, settings.image_size, generator=generator)
    items = TensorDataset(images, torch.randint(10, (count,), generator=generator))
    return Data("noise", items, items, tuple("0123456789"), settings.image_size, Normalisation())
