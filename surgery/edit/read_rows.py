"""How a layer that contracts over channels reads: its output at each place is a row of inputs times a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """How a layer reads: as a function of rows.

    Attributes:
        spatial: number of spatial axes; 0 for a linear layer.
        transposed: of a convolution.
        groups: of a convolution.
        stride, dilation: of a convolution, for each spatial axis.
        padding: what a convolution's input is padded by before and behind, for each spatial axis; of a transposed one
            the input with zeros between its entries.
    """

    spatial: int = 0
    transposed: bool = False
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (groups, inputs, outputs), both of one group."""
        if self.transposed:
            weight = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
            return weight.flip(tuple(range(3, weight.ndim))).flatten(2).transpose(1, 2)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).transpose(1, 2)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`, for a weight of that shape."""
        rows = matrix.transpose(1, 2)
        if self.transposed:
            rows = rows.reshape(self.groups, shape[1], shape[0] // self.groups, *shape[2:])
            return rows.flip(tuple(range(3, rows.ndim))).transpose(1, 2).reshape(shape)
        return rows.reshape(shape)

    def places(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """A view of the input that has what is read for each place of the output: (n, *sizes, channels, *kernel)."""
        if not self.spatial:
            return x
        if x.ndim == self.spatial + 1:
            x = x.unsqueeze(0)
        if self.transposed:
            x = _spread(x, self.stride)
        x = F.pad(x, [p for pair in reversed(self.padding) for p in pair])
        for k in range(self.spatial):
            x = x.unfold(2 + k, self.dilation[k] * (kernel[k] - 1) + 1, 1 if self.transposed else self.stride[k])
        for k, step in enumerate(self.dilation):
            x = x[(slice(None),) * (2 + self.spatial + k) + (slice(None, None, step),)]
        return x.movedim(1, 1 + self.spatial)

    def sizes(self, places: Tensor) -> torch.Size:
        """The sizes of the output, without its channels, for an input as `places` gives it."""
        return places.shape[: 1 + self.spatial] if self.spatial else places.shape[:-1]

    def channels_last(self, y: Tensor) -> Tensor:
        """The output as (n, *sizes, channels), or as it is for a linear layer."""
        if self.spatial and y.ndim == self.spatial + 1:
            y = y.unsqueeze(0)
        return y.movedim(1, -1) if self.spatial else y


def _spread(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The input of a transposed convolution with zeros between its entries."""
    for k, step in enumerate(stride):
        wide = x.new_zeros(*x.shape[: 2 + k], (x.shape[2 + k] - 1) * step + 1, *x.shape[3 + k :])
        wide[(slice(None),) * (2 + k) + (slice(None, None, step),)] = x
        x = wide
    return x


def gather_rows(places: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a call: what is read, (n, groups * inputs), and what is given, (n, channels).

    Args:
        places: the input, as `Layer.places` gives it.
        y: the output, as `Layer.channels_last` gives it.
        at: numbers of places of the output, (n,).
    """
    sizes = y.shape[:-1]
    index = torch.unravel_index(at, sizes) if sizes else ()
    return places[index].reshape(len(at), -1), y[index].reshape(len(at), -1)


def split_groups(layer: Layer, rows: Tensor) -> Tensor:
    """Rows of `gather_rows` in float64, for each group: (groups, n, inputs or channels of one)."""
    return rows.double().reshape(len(rows), layer.groups, -1).transpose(0, 1)
