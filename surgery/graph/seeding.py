"""Random numbers that are the same every time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_generators(seed: int) -> None:
    """Seed torch's generators, as `torch.manual_seed` does.

    That notes a stack trace for each kind of accelerator that could be initialised later, which takes longer than a
    forward pass of a small model. Where there is no accelerator, nothing is noted.
    """
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators, and restore them at the end, those of all devices."""
    with torch.random.fork_rng(devices=None if _has_accelerator() else []):
        seed_generators(seed)
        yield


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
