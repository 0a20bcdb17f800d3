"""Layers of `torch.nn` that come in one, two and three spatial dimensions."""

from __future__ import annotations

from typing import Any

from torch import nn


def layer_class(kind: str, rank: int) -> Any:
    """The class for ``rank`` spatial dimensions, such as `nn.Conv2d` for ``("Conv", 2)``."""
    return getattr(nn, f"{kind}{rank}d")
