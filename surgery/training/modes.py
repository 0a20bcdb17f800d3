"""State that a training sets and restores: modes of modules, gradients, autocast and random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from surgery.errors import UsageError
from surgery.graph.seeding import seed_generators


@contextmanager
def plain_modes() -> Iterator[None]:
    """Turn gradients on and autocast off, whatever the caller has set.

    The autocast cache is off too: half-precision copies of weights would outlive each step for as long as an autocast
    of the caller lasts.
    """
    off: dict[str, Any] = {"enabled": False, "cache_enabled": False}
    with torch.inference_mode(False), torch.autocast("cpu", **off), torch.autocast("cuda", **off):
        yield


@contextmanager
def random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's random state at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_everything(*numbers: int) -> None:
    """Seed torch's generators with several numbers, such as a seed, a process and a step."""
    seed_generators(mixed_seed(*numbers))


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers; different numbers give unrelated seeds."""
    return int(np.random.SeedSequence([abs(number) for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


def device_of(model: object) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def in_mode(model: object, *, training: bool) -> Iterator[None]:
    """Put the model in one mode; at the end each submodule gets its own mode back."""
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


def pick_device(name: str) -> torch.device:
    """The device of that name, one of `surgery.settings.DEVICES`; ``"auto"`` is a GPU where there is one.

    Raises:
        UsageError: a GPU that torch cannot use.
    """
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise UsageError("device cuda: there is no GPU here that torch can use")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")
