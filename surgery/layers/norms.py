"""Division by a length over channels, for networks in which channels have copies."""

from __future__ import annotations

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


class KeptLayerNorm(nn.LayerNorm):
    """A LayerNorm over the positions that its buffer ``keep`` names."""

    keep: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm_over(input, self.keep, self.weight, self.bias, self.eps)


class KeptGroupNorm(nn.GroupNorm):
    """A GroupNorm over the channels that its buffer ``keep`` names."""

    keep: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_over(input, self.keep, self.num_groups, self.weight, self.bias, self.eps)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: KeptLayerNorm, nn.GroupNorm: KeptGroupNorm}
