"""Bounds of builder keywords: what would fetch weights, is no number, or takes more memory than there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch import nn

from surgery.errors import UsageError
from surgery.models.sources import Source
from surgery.units import mebibytes

_FETCHING = ("pretrained", "pretrained_backbone")
"""Keywords of older torchvision versions that fetch weights."""

_LARGEST = 2**31
_ORDINARY = 2**12
"""Up to here no model of the catalogue outgrows a machine."""


def refuse_keywords(source: Source) -> None:
    """Raise `UsageError` for builder keywords that fetch weights or are no numbers that a layer can have."""
    for key, value in source.keywords.items():
        if key in _FETCHING:
            raise UsageError(f"{source.name!r} takes no {key} here: pass weights= for published weights")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not (math.isfinite(number) and abs(number) < _LARGEST):
                raise UsageError(f"{source.name!r} cannot be built with {key}={number}: it is out of range")


def refuse_too_large(name: str, builder: Callable[..., nn.Module], keywords: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a model whose tensors do not fit into the memory that is free.

    Only unusually large numbers are tried, on the meta device, which needs no memory.
    """
    given = [n for value in keywords.values() for n in (value if isinstance(value, tuple) else (value,))]
    if not any(isinstance(number, (int, float)) and number > _ORDINARY for number in given):
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            module = builder(**keywords)
    except Exception:  # the builder itself says what is wrong, and some cannot be tried on this device
        return
    needed = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(f"model {name!r} would take {mebibytes(needed)} of memory, and {mebibytes(free)} are free")
