"""Maxout (Goodfellow et al., ICML 2013) as a layer, and its row of the rule table."""

from __future__ import annotations

import torch
from torch import nn

from surgery.errors import UsageError


class Maxout(nn.Module):
    """Each unit is the largest of its ``pieces``, which an ordinary convolution or linear layer before it computes.

    The pieces of a unit lie side by side: channels ``c * pieces`` to ``(c + 1) * pieces - 1`` of the input are those of
    unit ``c``. Of equal pieces the first alone has a gradient, so that pieces which begin alike part as they learn.

    Args:
        pieces: linear pieces per unit, at least 1.
        dim: the axis of the channels: 1 behind a convolution, -1 behind a linear layer of tokens.

    Shape:
        input (..., units * pieces, ...), output (..., units, ...).
    """

    def __init__(self, pieces: int, dim: int = 1) -> None:
        super().__init__()
        if pieces < 1:
            raise UsageError(f"a maxout unit has at least 1 piece, not {pieces}")
        self.pieces, self.dim = pieces, dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dim = self.dim % input.ndim
        return torch.max(torch.unflatten(input, dim, (-1, self.pieces)), dim + 1).values

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}, dim={self.dim}"
