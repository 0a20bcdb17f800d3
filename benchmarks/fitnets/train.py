"""Parts `mnist` and `depth` of `fitnets.py`: a teacher, and students that learn from labels, from it, or by its hints.

Two phases, both of tasks that are independent of each other. In the first a fifth of the training images is set apart,
and every net learns from the rest by every method at each learning rate of one grid; the rate that does best on the
images set apart is taken. In the second all training images are learned from, seed by seed, and the test images say
how well.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils.data import Subset, TensorDataset

import surgery
from surgery import models as catalogue
from surgery.training.data.data import Data, Images, stratified_split
from surgery.training.distilling.distill import distill
from surgery.training.history import History

METHODS = ("backprop", "kd", "hints")
"""Labels alone; labels and the teacher's softened outputs; hints first, then these, in as many epochs in all."""

LONGER = "longer"
"""Hints first, and then as many epochs as KD has alone: the paper's two stages."""


@dataclass(frozen=True)
class Net:
    """A student, and the layers that its paper guides: the student's and the teacher's."""

    name: str
    guided: str
    hint: str


NETS: Mapping[str, tuple[Net, ...]] = {
    "mnist": (Net("fitnet_mnist", "layer4", "layer2"),),
    "depth": (
        Net("fitnet_30m_5", "layer2", "layer2"),
        Net("fitnet_30m_7", "layer4", "layer2"),
        Net("fitnet_30m_9", "layer5", "layer2"),
        Net("fitnet_30m_11", "layer7", "layer2"),
    ),
}


@dataclass(frozen=True)
class TrainSettings:
    """What parts `mnist` and `depth` are called with."""

    part: str
    dataset: str
    data_root: str | None
    limit: int | None
    teacher: str
    teacher_rate: float
    """Of the teacher's channels so many are kept, by `surgery.slim`."""
    teacher_epochs: int
    teacher_lr: float
    student_rate: float
    init_range: float | None
    """Of the students' initial weights, as in the paper; None: those of `torch.nn`."""
    optimizer: str
    rates: tuple[float, ...]
    """The grid of learning rates, for every net and method."""
    batch_size: int
    hint_epochs: int
    epochs: int
    """Without those of stage 1; the other methods but `LONGER` have as many epochs in all."""

    @property
    def methods(self) -> tuple[str, ...]:
        return (*METHODS, LONGER) if self.part == "mnist" else METHODS

    @property
    def nets(self) -> tuple[Net, ...]:
        return NETS[self.part]

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back. Where the files lie is nobody's business."""
        return {**asdict(self), "data_root": None, "rates": list(self.rates)}


@dataclass(frozen=True)
class Task:
    """One student to be trained; with ``validation`` on four fifths of the training images, scored on the others."""

    net: Net
    method: str
    lr: float
    seed: int
    validation: bool

    @property
    def key(self) -> dict[str, Any]:
        """What names its record."""
        return {**asdict(self), "net": self.net.name}


def all_runs(settings: TrainSettings, document: dict[str, Any], seeds: int, pool: Executor) -> Iterator[dict[str, Any]]:
    """The records that ``document`` lacks, as they come; they are added to it by the caller."""
    grid = [
        Task(net, method, lr, 0, True) for net in settings.nets for method in settings.methods for lr in settings.rates
    ]  # fmt: skip
    yield from _missing(settings, document, grid, pool)
    tasks = [
        Task(net, method, best_rate(document, net.name, method), seed, False)
        for seed in range(seeds)
        for net in settings.nets
        for method in settings.methods
    ]
    yield from _missing(settings, document, tasks, pool)


def best_rate(document: dict[str, Any], net: str, method: str) -> float:
    """The learning rate that did best on the validation images; the lower one of two as good."""
    grid = [r for r in document["runs"] if r["validation"] and (r["net"], r["method"]) == (net, method)]
    best: float = max(grid, key=lambda r: (r["accuracy"][-1], -r["lr"]))["lr"]
    return best


def _missing(
    settings: TrainSettings, document: dict[str, Any], tasks: list[Task], pool: Executor
) -> Iterator[dict[str, Any]]:
    """Records of the tasks that have none, after those of their teachers, who are trained first, once each."""
    done = [{key: run[key] for key in tasks[0].key} for run in document["runs"] if run["method"] != "teacher"]
    todo = [task for task in tasks if task.key not in done]
    known = {(run["seed"], run["validation"]) for run in document["runs"] if run["method"] == "teacher"}
    teachers = list(dict.fromkeys((task.seed, task.validation) for task in todo))
    waiting: dict[Future[Any], tuple[int, bool] | None] = {
        pool.submit(teach, settings, *teacher): teacher for teacher in teachers
    }
    while waiting:
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            teacher = waiting.pop(future)
            if teacher is None:
                yield future.result()
                continue
            record, weights = future.result()
            if teacher not in known:
                yield record
            for task in todo:
                if (task.seed, task.validation) == teacher:
                    waiting[pool.submit(learn, settings, task, weights)] = None


def teach(settings: TrainSettings, seed: int, validation: bool) -> tuple[dict[str, Any], bytes]:
    """A trained teacher: its record, and its weights as safetensors."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    teacher = network(settings.teacher, settings.teacher_rate, None, seed)
    history = surgery.train(
        teacher,
        data_for(settings, validation),
        epochs=settings.teacher_epochs,
        optimizer=settings.optimizer,
        lr=settings.teacher_lr,
        batch_size=settings.batch_size,
        seed=seed,
        test_each_epoch=True,
    )
    key = {
        **{"net": settings.teacher, "method": "teacher", "lr": settings.teacher_lr},
        **{"seed": seed, "validation": validation},
    }
    return _record(key, teacher, history, None, started), save(history.module.state_dict())


def learn(settings: TrainSettings, task: Task, weights: bytes) -> dict[str, Any]:
    """A student's record."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    data = data_for(settings, task.validation)
    student = network(task.net.name, settings.student_rate, settings.init_range, task.seed)
    options = {"optimizer": settings.optimizer, "lr": task.lr, "batch_size": settings.batch_size, "seed": task.seed}
    hint_epochs = settings.hint_epochs if task.method in ("hints", LONGER) else 0
    epochs = settings.epochs + (0 if task.method == "hints" else settings.hint_epochs)
    hints = None
    try:
        if task.method == "backprop":
            history = surgery.train(student, data, epochs=epochs, test_each_epoch=True, **cast(Any, options))
        else:
            teacher = network(settings.teacher, settings.teacher_rate, None, task.seed)
            teacher.load_state_dict(load(weights))
            taught = distill(
                student,
                teacher,
                data,
                guided=task.net.guided,
                hint=task.net.hint,
                hint_epochs=hint_epochs,
                epochs=epochs,
                test_each_epoch=True,
                **cast(Any, options),
            )
            history, hints = cast(History, taught.history), taught.hints
    except FloatingPointError as error:
        return {**_empty(task.key, student, started, len(data.classes)), "diverged": str(error)}
    return _record(task.key, student, history, hints, started)


def _record(
    key: dict[str, Any], net: nn.Module, history: History, hints: History | None, started: float
) -> dict[str, Any]:
    """Accuracies are those after each epoch, of the test images or, in the grid, of the validation images."""
    record = {
        **_described(key, net, started),
        "accuracy": [epoch.score.accuracy for epoch in history.epochs if epoch.score],
        "loss": [epoch.loss for epoch in history.epochs],
        "hint_loss": [epoch.loss for epoch in hints.epochs] if hints else [],
    }
    where = "validation" if key["validation"] else f"seed {key['seed']}"
    errors = " ".join(f"{100 * (1 - score):.1f}" for score in record["accuracy"])
    print(f"{where:10} {key['net']:20} {key['method']:8} lr {key['lr']:g}: test error {errors}", flush=True)
    return record


def _empty(key: dict[str, Any], net: nn.Module, started: float, classes: int) -> dict[str, Any]:
    """Of a training whose loss stopped being a number: it is as good as guessing."""
    print(f"{key['net']} {key['method']} lr {key['lr']:g} seed {key['seed']}: diverged", flush=True)
    return {**_described(key, net, started), "accuracy": [1 / classes], "loss": [], "hint_loss": []}


def _described(key: dict[str, Any], net: nn.Module, started: float) -> dict[str, Any]:
    cost = surgery.cost(net)
    return {**key, "params": cost.params, "macs": cost.macs, "seconds": round(time.perf_counter() - started, 1)}


def network(name: str, rate: float, init_range: float | None, seed: int) -> nn.Module:
    """A network of the paper, with the first of its channels if ``rate`` is below 1."""
    source = catalogue.canonical(name if init_range is None else f"{name}?init_range={init_range}")
    traced = surgery.trace(catalogue.build(source, seed=seed), catalogue.example_inputs(source), source=source)
    return traced if rate == 1 else surgery.slim(traced, rate)


@functools.lru_cache(maxsize=2)
def data_for(settings: TrainSettings, validation: bool) -> Data:
    """The images as the networks read them; with ``validation`` the training images alone, a fifth of them to test."""
    channels, size, _ = catalogue.FITNETS[settings.teacher].input_size
    data = surgery.load_data(
        settings.dataset, data_root=settings.data_root, image_size=size, limit=settings.limit
    )  # fmt: skip
    train, test = (_tensors(images, channels) for images in (data.train, data.test))
    if validation:
        kept, held_out = stratified_split(train.tensors[1].tolist())
        train, test = Subset(train, kept), Subset(train, held_out)
    return replace(data, train=train, test=test, channels=channels)


def _tensors(images: Images, channels: int) -> TensorDataset:
    items = [images[k] for k in range(len(cast(Any, images)))]
    return TensorDataset(
        torch.stack([image[:channels] for image, _ in items]), torch.tensor([int(y) for _, y in items])
    )
