"""Part `generations` of `knowledge_evolution.py`: networks that evolve, and the same trained as long at once.

Two phases, both of tasks that are independent of each other. In the first, with one seed, the length of a generation
and the learning rate are chosen by training images that are not learned from: for evolution by the slim network after
the last generation, then for training at once by the dense network. In the second, seed by seed, the test images say
how good what was chosen is.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import surgery
from surgery import models as catalogue
from surgery.training.data.data import Data, Images
from surgery.training.evolve import evolve, recalibrate
from surgery.training.history import Score
from surgery.training.modes import mixed_seed

ARMS = ("evolution", "long")
"""Generations; as many epochs at once, nothing drawn anew."""

PAPER: dict[str, Any] = {"weight_decay": 1e-4, "schedule": "warmup-cosine", "label_smoothing": 0.1}
"""What is as in the authors' code, besides SGD with momentum 0.9."""


@dataclass(frozen=True)
class Settings:
    """What the part is called with."""

    dataset: str
    data_root: str | None
    image_size: int | None
    train_images: int
    validation_images: int
    test_images: int
    model: str
    width: float
    """Of the model's channels so many are kept, by `surgery.slim`, and all weights drawn at these widths."""
    split_rate: float
    generations: int
    epochs: tuple[int, ...]
    """Of a generation: those that are tried."""
    rates: tuple[float, ...]
    """The learning rates that are tried."""
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back. Where the files lie is nobody's business."""
        return {**asdict(self), "data_root": None, "epochs": list(self.epochs), "rates": list(self.rates), **PAPER}


@dataclass(frozen=True)
class Task:
    """One network to be trained; ``epochs`` are those of one generation in either arm."""

    arm: str
    epochs: int
    lr: float
    seed: int
    validation: bool


def all_runs(settings: Settings, document: dict[str, Any], seeds: int, pool: Executor) -> Iterator[dict[str, Any]]:
    """The records that ``document`` lacks, as they come; they are added to it by the caller."""
    yield from _missing(
        settings,
        document,
        [Task("evolution", epochs, lr, 0, True) for epochs in settings.epochs for lr in settings.rates],
        pool,
    )
    epochs, _ = choice(document, "evolution")
    yield from _missing(settings, document, [Task("long", epochs, lr, 0, True) for lr in settings.rates], pool)
    chosen = {arm: choice(document, arm) for arm in ARMS}
    yield from _missing(
        settings, document, [Task(arm, *chosen[arm], seed, False) for seed in range(seeds) for arm in ARMS], pool
    )


def choice(document: dict[str, Any], arm: str) -> tuple[int, float]:
    """Epochs of a generation and learning rate that do best on the validation images; of equals the lower ones."""
    network = {"evolution": "slim", "long": "dense"}[arm]
    tried = [run for run in document["runs"] if run["validation"] and run["arm"] == arm]
    best = max(tried, key=lambda run: (run[network][-1] if run[network] else -1, -run["epochs"], -run["lr"]))
    return best["epochs"], best["lr"]


def _missing(
    settings: Settings, document: dict[str, Any], tasks: list[Task], pool: Executor
) -> Iterator[dict[str, Any]]:
    done = [{key: run[key] for key in asdict(tasks[0])} for run in document["runs"]]
    for future in as_completed([pool.submit(run, settings, task) for task in tasks if asdict(task) not in done]):
        yield future.result()


def run(settings: Settings, task: Task) -> dict[str, Any]:
    """The record of a task: how many images are classified correctly after each generation, or at the end."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = data_for(settings, task.validation)
    network = beginning(settings, data, task.seed)
    cost = surgery.cost(network).to_dict()
    counted: dict[str, Any] = {"dense": [], "slim": [], "recalibrated": [], "loss": []}
    try:
        counted |= (_evolved if task.arm == "evolution" else _at_once)(settings, task, data, network)
    except FloatingPointError as error:
        if not task.validation:
            raise
        counted["diverged"] = str(error)
    accuracies = {who: " ".join(f"{100 * n / data.counts[1]:.1f}" for n in counted[who]) for who in ("dense", "slim")}
    where = "validation" if task.validation else f"seed {task.seed}"
    print(f"{where:10} {task.arm:9} {task.epochs:2} epochs, lr {task.lr:g}: dense {accuracies['dense']}, "
          f"slim {accuracies['slim']}", flush=True)  # fmt: skip
    seconds = round(time.perf_counter() - started, 1)
    return {**asdict(task), "cost": cost, "total": data.counts[1], **counted, "seconds": seconds}


def _evolved(settings: Settings, task: Task, data: Data, network: nn.Module) -> dict[str, Any]:
    small: list[int] = []

    def score(scored: nn.Module) -> Score:
        if _parameters(scored) < _parameters(network):
            small.append(_correct(recalibrate(scored, data, settings.batch_size), data))
        return surgery.evaluate(scored, data.test)

    found = evolve(
        network, data, settings.split_rate, settings.generations, epochs=task.epochs, lr=task.lr,
        batch_size=settings.batch_size, seed=task.seed, score=score, **PAPER,
    )  # fmt: skip
    return {
        "dense": [generation.dense.correct for generation in found.generations],
        "slim": [generation.slim.correct for generation in found.generations],
        "recalibrated": small,
        "loss": [generation.history.epochs[-1].loss for generation in found.generations],
    }


def _at_once(settings: Settings, task: Task, data: Data, network: nn.Module) -> dict[str, Any]:
    """From the weights, and with the first images, of the first generation."""
    history = surgery.train(
        network, data, epochs=settings.generations * task.epochs, lr=task.lr, batch_size=settings.batch_size,
        seed=mixed_seed(task.seed, 0), **PAPER,
    )  # fmt: skip
    network = history.module
    slim = surgery.slim(network, settings.split_rate)
    return {
        "dense": [_correct(network, data)],
        "slim": [_correct(slim, data)],
        "recalibrated": [_correct(recalibrate(slim, data, settings.batch_size), data)],
        "loss": [history.epochs[-1].loss],
    }


def _correct(network: nn.Module, data: Data) -> int:
    return surgery.evaluate(network, data.test).correct


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def beginning(settings: Settings, data: Data, seed: int) -> nn.Module:
    """The network before its first generation."""
    source = catalogue.canonical(settings.model, num_classes=len(data.classes))
    images = torch.zeros(2, data.channels, data.image_size, data.image_size)
    whole = surgery.trace(catalogue.build(source, seed=seed), images, source=source)
    if settings.width == 1:
        return whole
    narrow = surgery.slim(whole, settings.width)
    nothing = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in narrow.named_parameters()}
    return surgery.reset_hypothesis(narrow, nothing, seed=mixed_seed(seed, 1))


@functools.lru_cache(maxsize=2)
def data_for(settings: Settings, validation: bool) -> Data:
    """The images that are learned from, and those that the network is tested on.

    The first two sorts are of the set's training part. What the set's test part lacks to the number of test images is
    taken from what is left of the training part.
    """
    data = surgery.load_data(settings.dataset, data_root=settings.data_root, image_size=settings.image_size)
    train, test = data.counts
    order = torch.randperm(train, generator=torch.Generator().manual_seed(0)).tolist()
    learned, held_out = settings.train_images, settings.validation_images
    if learned + held_out > train:
        raise SystemExit(f"{settings.dataset} has {train} training images, and {learned} + {held_out} are asked for")
    own = torch.randperm(test, generator=torch.Generator().manual_seed(0)).tolist()[: settings.test_images]
    parts: list[Images] = [Subset(data.train, order[learned : learned + held_out])]
    if not validation:
        more = settings.test_images - len(own)
        parts = [Subset(data.test, own), Subset(data.train, order[learned + held_out :][:more])]
    return replace(data, train=_tensors(Subset(data.train, order[:learned])), test=_tensors(*parts))


def _tensors(*parts: Images) -> TensorDataset:
    items = [part[k] for part in parts for k in range(len(cast(Any, part)))]
    return TensorDataset(torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items]))
