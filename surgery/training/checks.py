"""What a training refuses before it begins."""

from __future__ import annotations

from numbers import Integral, Real

from torch import nn

from surgery.errors import UsageError, unknown_name, whole_number
from surgery.training.data import Data
from surgery.training.descent import OPTIMIZERS, SCHEDULES


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
