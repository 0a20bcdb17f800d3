"""Reductions over a part of the channels: what a network with channels switched off computes.

Each is called like the function of torch that it is named after, with a bool mask behind the input: false at the
channels to leave out, and broadcast against the input.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Dims = int | tuple[int, ...] | list[int] | None


def mean_over(
    input: Tensor, keep: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: Any = None, axis: Dims = None
) -> Tensor:
    """`torch.mean` over the channels where ``keep``."""
    total = torch.mean(input * keep, reduced_dims(dim, axis), keepdim, dtype=dtype)
    return total * (keep.numel() / keep.sum().to(total.dtype))


def var_over(
    input: Tensor,
    keep: Tensor,
    dim: Dims = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Dims = None,
) -> Tensor:
    """`torch.var` over the channels where ``keep``."""
    dims, less = spread_settings(dim, axis, unbiased, correction)
    mean = mean_over(input, keep, dims, keepdim=True)
    squares = mean_over((input - mean).square(), keep, dims, keepdim)
    sizes = input.shape if dims is None else [input.shape[d] for d in dims]
    count = math.prod(sizes) * keep.sum().to(squares.dtype) / keep.numel()
    return squares * (count / (count - less))


def std_over(
    input: Tensor,
    keep: Tensor,
    dim: Dims = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Dims = None,
) -> Tensor:
    """`torch.std` over the channels where ``keep``."""
    return var_over(input, keep, dim, unbiased, keepdim, correction=correction, axis=axis).sqrt()


def var_mean_over(
    input: Tensor,
    keep: Tensor,
    dim: Dims = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Dims = None,
) -> tuple[Tensor, Tensor]:
    """`torch.var_mean` over the channels where ``keep``."""
    dims, less = spread_settings(dim, axis, unbiased, correction)
    return var_over(input, keep, dims, keepdim=keepdim, correction=less), mean_over(input, keep, dims, keepdim)


def std_mean_over(
    input: Tensor,
    keep: Tensor,
    dim: Dims = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Dims = None,
) -> tuple[Tensor, Tensor]:
    """`torch.std_mean` over the channels where ``keep``."""
    variance, mean = var_mean_over(input, keep, dim, unbiased, keepdim, correction=correction, axis=axis)
    return variance.sqrt(), mean


def amax_over(input: Tensor, keep: Tensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    """`torch.amax` over the channels where ``keep``."""
    return torch.amax(input.masked_fill(~keep, -math.inf), _as_tuple(dim), keepdim)


def amin_over(input: Tensor, keep: Tensor, dim: Dims = (), keepdim: bool = False) -> Tensor:
    """`torch.amin` over the channels where ``keep``."""
    return torch.amin(input.masked_fill(~keep, math.inf), _as_tuple(dim), keepdim)


def _as_tuple(dim: Dims) -> tuple[int, ...]:
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def max_over(
    input: Tensor, keep: Tensor, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None
) -> Any:
    """`torch.max` over the channels where ``keep``."""
    kept, along = input.masked_fill(~keep, -math.inf), axis if dim is None else dim
    return torch.max(kept) if along is None else torch.max(kept, along, keepdim)


def min_over(
    input: Tensor, keep: Tensor, dim: int | None = None, keepdim: bool = False, *, axis: int | None = None
) -> Any:
    """`torch.min` over the channels where ``keep``."""
    kept, along = input.masked_fill(~keep, math.inf), axis if dim is None else dim
    return torch.min(kept) if along is None else torch.min(kept, along, keepdim)


def reduced_dims(dim: Any, axis: Any = None) -> tuple[int, ...] | None:
    """The dims that a reduction is given, under either name; None for all of them."""
    given = axis if dim is None or isinstance(dim, bool) else dim
    if given is None:
        return None
    return (given,) if isinstance(given, int) else tuple(given) or None


def spread_settings(dim: Any, axis: Any, unbiased: Any, correction: Any) -> tuple[tuple[int, ...] | None, float]:
    """The dims of a variance, and by how much less than the count it divides: `torch.var` takes both in several
    ways."""
    if isinstance(dim, bool):
        unbiased = dim
    less = correction if correction is not None else 1.0 if unbiased is None or unbiased is True else float(unbiased)
    return reduced_dims(dim, axis), less
