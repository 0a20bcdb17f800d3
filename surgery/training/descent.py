"""Optimisers and learning rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from surgery.errors import UsageError, unknown_name, whole_number
from surgery.training.data.data import Data


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


def _rmsprop(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    return torch.optim.RMSprop(groups, lr=lr, alpha=momentum)


OPTIMIZERS: Mapping[str, Descent] = {
    "sgd": Descent(_sgd, 0.02, 5e-4),
    "adamw": Descent(_adamw, 1e-3, 1e-2),
    "rmsprop": Descent(_rmsprop, 1e-3, 0.0),
}
"""What descends the loss: SGD with Nesterov momentum, AdamW whose first beta is ``momentum``, and RMSProp, the FitNets
paper's, where it is the decay of the mean square."""


def _one_cycle(t: float) -> float:
    """A cosine rise from a 25th of the peak over the first quarter, then a cosine fall to zero."""
    rise = 0.25
    if t < rise:
        return 1 - 0.48 * (1 + math.cos(math.pi * t / rise))
    return 0.5 * (1 + math.cos(math.pi * (t - rise) / (1 - rise)))


def _cosine(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


def _warmup_cosine(t: float) -> float:
    """A rise from a fifth over the first 40th (5 epochs of 200), then a cosine fall to zero: Knowledge Evolution's."""
    rise = 0.025
    return 0.2 + 0.8 * t / rise if t < rise else _cosine((t - rise) / (1 - rise))


def _constant(t: float) -> float:
    return 1.0


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "one-cycle": _one_cycle,
    "cosine": _cosine,
    "warmup-cosine": _warmup_cosine,
    "constant": _constant,
}
"""The learning rate's fraction of its peak, by the fraction of the training that is done."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained: weights, which decay, and vectors (biases, norms), which do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def set_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_whole(**numbers: object) -> None:
    """Raise `UsageError` for what is neither a whole number nor None."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise UsageError(f"{name} must be a whole number, not {value!r}")


def check_numbers(momentum: float, weight_decay: float | None, label_smoothing: float, seed: int, workers: int) -> None:
    """Raise `UsageError` for one of these settings that is out of range."""
    if not (isinstance(momentum, Real) and 0 <= momentum < 1):
        raise UsageError(f"momentum is {momentum!r}: it must be at least 0 and below 1")
    if not (weight_decay is None or (isinstance(weight_decay, Real) and weight_decay >= 0)):
        raise UsageError(f"the weight decay is {weight_decay!r}: it must be at least 0")
    if not (isinstance(label_smoothing, Real) and 0 <= label_smoothing <= 1):
        raise UsageError(f"label_smoothing is {label_smoothing!r}: it must be from 0 to 1")
    whole_number("seed", seed, 0)
    whole_number("workers", workers, 0)


def check_trainable(model: nn.Module) -> None:
    """Raise `UsageError` for a model that has nothing to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("the model has no parameter that requires a gradient: there is nothing to train")


def check_scored(data: Data, score: object) -> None:
    """Raise `UsageError` where there is nothing to score a model by."""
    if score is None and data.counts[1] == 0:
        raise UsageError(f"data set {data.source!r} has no test images: pass score=, or data that have some")


def check_settings(
    data: Data,
    epochs: int,
    optimizer: str,
    lr: float | None,
    batch_size: int,
    schedule: str,
    checkpoint_every: int | None,
) -> None:
    """Raise `UsageError` for settings that `train` refuses, before any work is done."""
    check_whole(epochs=epochs, batch_size=batch_size, checkpoint_every=checkpoint_every)
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS)
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}: it must be at least 1")
    if lr is not None and not (isinstance(lr, Real) and lr > 0):
        raise UsageError(f"the learning rate is {lr!r}: it must be above 0")
    if batch_size < 2:
        raise UsageError(f"the batch size is {batch_size}: batch statistics need at least 2")
    if data.counts[0] < 2:
        raise UsageError(f"data set {data.source!r} has {data.counts[0]} training images: there must be at least 2")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise UsageError(f"checkpoint_every is {checkpoint_every}: it must be at least 1 step")
