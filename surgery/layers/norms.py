"""Norms of edited networks: division by a length to which copies add, and statistics over a part of the channels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled_normalize(
    input: torch.Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, scale: float = 1.0
) -> torch.Tensor:
    """`F.normalize` times ``scale``: for channels of which each is there ``scale ** p`` times, it is what one of each
    would be divided to."""
    return F.normalize(input, p, dim, eps * scale) * scale


def layer_norm_over(
    input: Tensor, keep: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.layer_norm` over the positions where ``keep``, bool of the normalised shape, is true; 0 elsewhere, and the
    bias."""
    dims = tuple(range(-keep.dim(), 0))
    factor = keep.to(input.dtype)
    count = factor.sum()
    centred = input - (input * factor).sum(dims, keepdim=True) / count
    variance = (centred.square() * factor).sum(dims, keepdim=True) / count
    result = centred * torch.rsqrt(variance + eps) * factor
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def group_norm_over(
    input: Tensor,
    keep: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.group_norm` over the channels where ``keep``, bool of shape (channels,), is true; 0 elsewhere, and the
    bias."""
    x = input.reshape(input.shape[0], num_groups, -1, *input.shape[2:])
    shape = (num_groups, x.shape[2], *(1,) * (input.dim() - 2))
    x = torch.stack([layer_norm_over(x[:, g], keep.view(shape)[g].expand(x.shape[2:]), eps=eps)
                     for g in range(num_groups)], 1)  # fmt: skip
    entries = (-1, *(1,) * (input.dim() - 2))
    result = x.reshape(input.shape)
    result = result if weight is None else result * weight.view(entries)
    return result if bias is None else result + bias.view(entries)


def rms_norm_over(input: Tensor, keep: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`F.rms_norm` over the positions where ``keep``, bool of the normalised shape, is true; 0 elsewhere."""
    factor = keep.to(input.dtype)
    square = (input.square() * factor).sum(tuple(range(-keep.dim(), 0)), keepdim=True) / factor.sum()
    result = input * torch.rsqrt(square + (torch.finfo(input.dtype).eps if eps is None else eps)) * factor
    return result if weight is None else result * weight


def batch_norm_over(
    input: Tensor, keep: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.batch_norm` by the batch's own statistics over the positions where ``keep``, bool and broadcast against the
    input, is true; 0 elsewhere, and the bias."""
    dims = [d for d in range(input.dim()) if d != 1]
    factor = keep.to(input.dtype)
    kept = factor.sum() / factor.numel()
    centred = input - (input * factor).mean(dims, keepdim=True) / kept
    variance = (centred.square() * factor).mean(dims, keepdim=True) / kept
    result = centred * torch.rsqrt(variance + eps) * factor
    entries = (-1, *(1,) * (input.dim() - 2))
    result = result if weight is None else result * weight.view(entries)
    return result if bias is None else result + bias.view(entries)


class RestrictedNorm(nn.Module):
    """What a norm becomes whose statistics leave channels out: a class of its own for each norm (`restrict_norm`)."""

    keep: Tensor
    norm: ClassVar[type[nn.Module]]
    over: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor) -> Tensor:
        names = list(inspect.signature(type(self).over).parameters)[2:]
        return type(self).over(input, self.keep, **{name: getattr(self, name) for name in names})

    def __reduce__(self) -> Any:
        return _rebuild_restricted, (self.norm, type(self).over), self.__dict__


def restrict_norm(layer: nn.Module, keep: Tensor, over: Callable[..., Tensor]) -> None:
    """Let a norm compute its statistics with ``over``, for the channels that ``keep`` names: see `Rule.over`."""
    layer.register_buffer("keep", keep, persistent=False)
    restricted: Any = _restricted(type(layer), over)  # type: ignore[arg-type]  # Module.__hash__ has other types
    layer.__class__ = restricted


@cache
def _restricted(norm: type[nn.Module], over: Callable[..., Tensor]) -> Any:
    namespace = {"norm": norm, "over": staticmethod(over), "__module__": __name__}
    return type(f"Restricted{norm.__name__}", (RestrictedNorm, norm), namespace)


def _rebuild_restricted(norm: type[nn.Module], over: Callable[..., Tensor]) -> nn.Module:
    cls = _restricted(norm, over)  # type: ignore[arg-type]
    layer: nn.Module = cls.__new__(cls)
    return layer
