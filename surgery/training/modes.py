"""What a training sets for a while and puts back: modes of modules, gradients, autocast and random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def plain_modes() -> Iterator[None]:
    """Within it gradients are on and nothing is autocast, whatever the caller has set.

    What is autocast within keeps no weights in half precision: they would stay what they are as long as any autocast
    of the caller's lasts, and no step would be seen.
    """
    off: dict[str, Any] = {"enabled": False, "cache_enabled": False}
    with torch.inference_mode(False), torch.autocast("cpu", **off), torch.autocast("cuda", **off):
        yield


@contextmanager
def random_state(device: torch.device) -> Iterator[None]:
    """Within it torch's random state may be changed at will: the one of before is restored."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def seed_everything(*numbers: int) -> None:
    """Seed torch's generators by several numbers, such as a seed, a process and a step."""
    torch.manual_seed(mixed_seed(*numbers))


def mixed_seed(*numbers: int) -> int:
    """One seed for several numbers; other numbers give an unrelated one."""
    return int(np.random.SeedSequence([abs(number) for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


def device_of(model: object) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def in_mode(model: object, *, training: bool) -> Iterator[None]:
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
