"""Division by a length over channels, for networks in which channels have copies."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def scaled_normalize(
    input: torch.Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, scale: float = 1.0
) -> torch.Tensor:
    """`F.normalize` times ``scale``: for channels of which each is there ``scale ** p`` times, it is what one of each
    would be divided to."""
    return F.normalize(input, p, dim, eps * scale) * scale
