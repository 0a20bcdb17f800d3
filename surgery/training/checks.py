"""What a training refuses before it begins."""

from __future__ import annotations

from numbers import Integral, Real

from torch import nn

from surgery.errors import UsageError, whole_number


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
