"""One training loop and one evaluation, which every procedure of this package uses.

What is learned is decided by a `LossFn`; the loop knows only how to step. A procedure such as distillation brings its
own loss and leaves this file as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from surgery.errors import UsageError, unknown_name
from surgery.training.data import Data, Images

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,)."""

LossFn = Callable[[nn.Module, Batch], Tensor]
"""From a model in training mode and a batch on its device to the scalar loss to descend."""


class Progress(Protocol):
    """Told how far a task is. The library never draws; whoever calls it may."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Score:
    """How many of the test images were classified correctly."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval for the accuracy; ``z`` is the normal quantile, 1.96 for 95 %."""
        n, p = self.total, self.accuracy
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images: mean loss, learning rate at its end, score on the test images, seconds."""

    loss: float
    lr: float
    score: Score | None
    seconds: float


@dataclass(frozen=True)
class History:
    """What happened in training, epoch by epoch."""

    epochs: tuple[Epoch, ...]
    steps: int

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    lr: float = 0.02,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    schedule: str = "one-cycle",
    seed: int = 0,
    loss_fn: LossFn | None = None,
    test_each_epoch: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "train",
) -> History:
    """Train ``model`` in place on ``data.train`` and return how it went. The model is left in its mode of before.

    Stochastic gradient descent with Nesterov momentum. ``lr`` is the peak learning rate: ``one-cycle`` warms up to it
    over the first quarter of the steps and anneals to zero, ``cosine`` begins at it (`SCHEDULES`). Weight decay spares
    biases and norms. ``loss_fn`` is `classification_loss` unless given. The order of the images and all
    other randomness come from ``seed``; the global random state is left as it was. ``progress`` is called after each
    step.

    Raises `UsageError` where there is nothing to train on, or a setting is out of range; `FloatingPointError` where the
    loss stops being a number.
    """
    _check_settings(data, epochs, lr, batch_size, schedule)
    loss_fn = loss_fn or classification_loss(label_smoothing)
    device = _device(model)
    loader = _loader(data.train, batch_size, workers, shuffle=True, seed=seed)
    total = epochs * len(loader)
    optimizer = torch.optim.SGD(_parameter_groups(model, weight_decay), lr=lr, momentum=momentum, nesterov=momentum > 0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULES[schedule](step / total))
    history: list[Epoch] = []
    with _mode(model, training=True), _random_state(seed, device):
        for _ in range(epochs):
            started, summed = time.perf_counter(), 0.0
            for images, labels in loader:
                loss = loss_fn(model, (images.to(device), labels.to(device)))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()
                summed += loss.item()
                if progress is not None:
                    progress(task, scheduler.last_epoch, total)
            if not math.isfinite(summed):
                raise FloatingPointError(f"the loss of {task} is {summed} after {scheduler.last_epoch} steps: lower lr")
            score = evaluate(model, data.test) if test_each_epoch else None
            rate = float(optimizer.param_groups[0]["lr"])
            history.append(Epoch(summed / len(loader), rate, score, time.perf_counter() - started))
    return History(tuple(history), total)


def classification_loss(label_smoothing: float = 0.0) -> LossFn:
    """Cross-entropy; auxiliary classifiers, which some models return beside their logits in training, count as well.

    Their weights are those of the papers: 0.3 each for two (GoogLeNet), 0.4 for one (Inception v3).
    """

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        output = model(images)
        logits, *others = output if isinstance(output, tuple) else (output,)
        auxiliary = [other for other in others if other is not None]
        weight = 0.4 if len(auxiliary) == 1 else 0.3
        loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        for other in auxiliary:
            loss = loss + weight * functional.cross_entropy(other, labels, label_smoothing=label_smoothing)
        return loss

    return loss_fn


def evaluate(
    predict: nn.Module | Callable[[Tensor], Tensor],
    images: Images,
    *,
    batch_size: int = 250,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "evaluate",
) -> Score:
    """How many of ``images`` have their label as the largest of ``predict``'s outputs (N, classes).

    ``predict`` is a module, which is run in evaluation mode and left in the mode it was in, or any function, such as a
    session of another runtime.
    """
    loader = _loader(images, batch_size, workers, shuffle=False)
    device = _device(predict)
    correct = total = 0
    with _mode(predict, training=False), torch.inference_mode():
        for done, (batch, labels) in enumerate(loader, 1):
            chosen = predict(batch.to(device)).argmax(1)
            correct += int((chosen == labels.to(chosen.device)).sum())
            total += len(labels)
            if progress is not None:
                progress(task, done, len(loader))
    return Score(correct, total)


def _check_settings(data: Data, epochs: int, lr: float, batch_size: int, schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}: it must be at least 1")
    if not lr > 0:
        raise UsageError(f"the learning rate is {lr}: it must be above 0")
    if batch_size < 2:
        raise UsageError(f"the batch size is {batch_size}: batch statistics need at least 2")
    if data.counts[0] < 2:
        raise UsageError(f"data set {data.source!r} has {data.counts[0]} training images: there must be at least 2")


def _device(model: object) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


def _loader(
    images: Images, batch_size: int, workers: int, *, shuffle: bool, seed: int = 0
) -> DataLoader[tuple[Tensor, Any]]:
    """A shuffling loader drops the last, smaller batch, whose batch statistics would be noisier than the others'.

    It has a generator in any case: without one, even a loader that does not shuffle draws from the global state.
    """
    return DataLoader(
        images,
        batch_size=min(batch_size, len(cast(Any, images))),
        shuffle=shuffle,
        drop_last=shuffle,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _one_cycle(t: float) -> float:
    """A cosine rise from a 25th of the peak over the first quarter, then a cosine fall to zero."""
    rise = 0.25
    if t < rise:
        return 1 - 0.48 * (1 + math.cos(math.pi * t / rise))
    return 0.5 * (1 + math.cos(math.pi * (t - rise) / (1 - rise)))


def _cosine(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


SCHEDULES: Mapping[str, Callable[[float], float]] = {"one-cycle": _one_cycle, "cosine": _cosine}
"""The learning rate's fraction of its peak, by the fraction of the training that is done."""


@contextmanager
def _mode(model: object, *, training: bool) -> Iterator[None]:
    """The model in one mode, and each of its submodules back in its own mode afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
