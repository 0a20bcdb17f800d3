"""One training loop and one evaluation, which every procedure of this package uses.

What is learned is decided by a `LossFn`; the loop knows only how to step. A procedure such as distillation brings its
own loss and leaves this file as it is.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from surgery.errors import UsageError, unknown_name
from surgery.training.data import Data, Images
from surgery.training.growth import Growth, Stage, count, grown, grown_record, rehearse, stages
from surgery.training.history import Epoch, Grown, History, Score
from surgery.training.optimizer import transfer_optimizer

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and labels (N,)."""

LossFn = Callable[[nn.Module, Batch], Tensor]
"""From a model in training mode and a batch on its device to the scalar loss to descend."""


class Progress(Protocol):
    """Told how far a task is. The library never draws; whoever calls it may."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    optimizer: str = "sgd",
    lr: float | None = None,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    label_smoothing: float = 0.0,
    schedule: str = "one-cycle",
    grow: Mapping[int, Growth] | None = None,
    seed: int = 0,
    loss_fn: LossFn | None = None,
    test_each_epoch: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "train",
) -> History:
    """Train ``model`` in place on ``data.train`` and return how it went. The model is left in its mode of before.

    ``optimizer`` is ``sgd``, with Nesterov momentum, or ``adamw``, whose first beta is ``momentum`` (`OPTIMIZERS`, with
    the ``lr`` and ``weight_decay`` that each has by default). ``lr`` is the peak learning rate: ``one-cycle`` warms up
    to it over the first quarter of the steps and anneals to zero, ``cosine`` begins at it, ``constant`` stays at it
    (`SCHEDULES`). Weight decay spares biases and norms. ``loss_fn`` is `classification_loss` unless given. The order of
    the images and all other randomness come from ``seed``; the global random state is left as it was. ``progress`` is
    called after each step.

    ``grow`` says what grows before which epoch, counted from 0: ``{0: Growth(images=0.3), 4: Growth(images=1.0,
    widen=1.5)}``. A copy of the model is trained then, and `History.model` is what became of it; the optimiser's state
    follows the weights, and the schedule, a fraction of all steps to come, goes on. What cannot be grown as asked is
    refused before the training begins.

    Raises `UsageError` where there is nothing to train on, or a setting is out of range; what `surgery.widen` and
    `surgery.deepen` raise; `FloatingPointError` where the loss stops being a number.
    """
    _check_settings(data, epochs, optimizer, lr, batch_size, schedule)
    loss_fn = loss_fn or classification_loss(label_smoothing)
    plan = stages(data, epochs, grow or {}, seed)
    if grow:
        rehearse(model, plan, seed)
        model = copy.deepcopy(model)
    device = _device(model)
    rule = OPTIMIZERS[optimizer]
    peak = rule.lr if lr is None else lr
    groups = _parameter_groups(model, rule.weight_decay if weight_decay is None else weight_decay)
    descent = rule.make(groups, peak, momentum)
    total = sum(stage.epochs * len(_loader(stage.images, batch_size, shuffle=True)) for stage in plan)
    done = 0
    history: list[Epoch] = []
    growths: list[Grown] = []
    loader = _loader(plan[0].images, batch_size, workers, shuffle=True, seed=seed)
    with _random_state(seed, device):
        for stage in plan:
            if stage.growth is not None:
                tests = data.test if test_each_epoch else None
                model, descent, record = _grow(model, descent, stage, stage.growth, batch_size, tests, seed)
                growths.append(record)
            if loader.dataset is not stage.images:
                loader = _loader(stage.images, batch_size, workers, shuffle=True, seed=seed)
            with _mode(model, training=True):
                for _ in range(stage.epochs):
                    started, summed = time.perf_counter(), 0.0
                    for images, labels in loader:
                        _set_rate(descent, peak * SCHEDULES[schedule](done / total))
                        summed += _step(model, (images.to(device), labels.to(device)), descent, loss_fn)
                        done += 1
                        if progress is not None:
                            progress(task, done, total)
                    if not math.isfinite(summed):
                        raise FloatingPointError(f"the loss of {task} is {summed} after {done} steps: lower lr")
                    score = evaluate(model, data.test) if test_each_epoch else None
                    rate = peak * SCHEDULES[schedule](done / total)
                    seconds = time.perf_counter() - started
                    history.append(Epoch(count(stage.images), summed / len(loader), rate, score, seconds))
    return History(tuple(history), total, tuple(growths), model if grow else None)


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


def _step(model: nn.Module, batch: Batch, descent: Optimizer, loss_fn: LossFn) -> float:
    loss = loss_fn(model, batch)
    descent.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    descent.step()
    return loss.item()


def _set_rate(descent: Optimizer, lr: float) -> None:
    for group in descent.param_groups:
        group["lr"] = lr


def _grow(
    model: nn.Module,
    descent: Optimizer,
    stage: Stage,
    growth: Growth,
    batch_size: int,
    tests: Images | None,
    seed: int,
) -> tuple[nn.Module, Optimizer, Grown]:
    """The model and its optimiser after the growth before ``stage``, and what it did, scored on ``tests``."""
    started = time.perf_counter()
    larger = grown(model, growth, seed)
    if larger is not model:
        descent = transfer_optimizer(descent, model, larger, new=growth.state)
    score = None if tests is None else evaluate(larger, tests)
    batch, _ = next(iter(_loader(stage.images, batch_size, shuffle=False)))
    return larger, descent, grown_record(stage, model, larger, batch.to(_device(model)), score, started)


def _check_settings(data: Data, epochs: int, optimizer: str, lr: float | None, batch_size: int, schedule: str) -> None:
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS)
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}: it must be at least 1")
    if lr is not None and not lr > 0:
        raise UsageError(f"the learning rate is {lr}: it must be above 0")
    if batch_size < 2:
        raise UsageError(f"the batch size is {batch_size}: batch statistics need at least 2")
    if data.counts[0] < 2:
        raise UsageError(f"data set {data.source!r} has {data.counts[0]} training images: there must be at least 2")


def _device(model: object) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


def _loader(
    images: Images, batch_size: int, workers: int = 0, *, shuffle: bool, seed: int = 0
) -> DataLoader[tuple[Tensor, Any]]:
    """A shuffling loader drops the last, smaller batch, whose batch statistics would be noisier than the others'.

    It has a generator in any case: without one, even a loader that does not shuffle draws from the global state.
    """
    return DataLoader(
        images,
        batch_size=min(batch_size, count(images)),
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


@dataclass(frozen=True)
class Descent:
    """How an optimiser is made of parameter groups, the peak learning rate and momentum; what is usual with it."""

    make: Callable[[list[dict[str, Any]], float, float], Optimizer]
    lr: float
    weight_decay: float


def _sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def _adamw(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))


OPTIMIZERS: Mapping[str, Descent] = {"sgd": Descent(_sgd, 0.02, 5e-4), "adamw": Descent(_adamw, 1e-3, 1e-2)}
"""What descends the loss."""


def _one_cycle(t: float) -> float:
    """A cosine rise from a 25th of the peak over the first quarter, then a cosine fall to zero."""
    rise = 0.25
    if t < rise:
        return 1 - 0.48 * (1 + math.cos(math.pi * t / rise))
    return 0.5 * (1 + math.cos(math.pi * (t - rise) / (1 - rise)))


def _cosine(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


def _constant(t: float) -> float:
    return 1.0


SCHEDULES: Mapping[str, Callable[[float], float]] = {"one-cycle": _one_cycle, "cosine": _cosine, "constant": _constant}
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
