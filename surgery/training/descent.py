"""Optimisers and learning rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


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
