"""Optimisers and learning rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from surgery.errors import UsageError
from surgery.training.data.data import Data


def _sgd(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def _adamw(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))


def _rmsprop(groups: list[dict[str, Any]], lr: float, momentum: float) -> Optimizer:
    return torch.optim.RMSprop(groups, lr=lr, alpha=momentum)


OPTIMIZERS: Mapping[str, Callable[[list[dict[str, Any]], float, float], Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "rmsprop": _rmsprop,
}
"""Makers of `surgery.settings.OPTIMIZERS`, from parameter groups, the peak learning rate and momentum."""


def _one_cycle(t: float) -> float:
    """Rise by a cosine from 1/25 of the peak in the first quarter, then fall by a cosine to zero."""
    rise = 0.25
    if t < rise:
        return 1 - 0.48 * (1 + math.cos(math.pi * t / rise))
    return 0.5 * (1 + math.cos(math.pi * (t - rise) / (1 - rise)))


def _cosine(t: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * t))


def _warmup_cosine(t: float) -> float:
    """Rise from 1/5 in the first 40th (5 epochs of 200), then fall by a cosine to zero, as Knowledge Evolution does."""
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
"""The learning rate as a fraction of its peak, by the fraction of the training that is done."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters: weights, which decay, and vectors (biases, norms), which do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def set_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def check_trainable(model: nn.Module) -> None:
    """Raise `UsageError` for a model without a parameter to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("the model has no parameter that requires a gradient: there is nothing to train")


def check_data(data: Data) -> None:
    """Raise `UsageError` for too few training images."""
    if data.counts[0] < 2:
        raise UsageError(f"data set {data.source!r} has {data.counts[0]} training images: there must be at least 2")


def check_scored(data: Data, score: object) -> None:
    """Raise `UsageError` if there is nothing to score a model with."""
    if score is None and data.counts[1] == 0:
        raise UsageError(f"data set {data.source!r} has no test images: pass score=, or data that have some")
