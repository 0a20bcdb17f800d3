"""Sharing a weight out among the copies of the channel it reads, so that the shares add up to it exactly.

A third of a float32 is not a float32: three rounded thirds miss the weight by an ulp, and the widened network misses
the narrow one by float32 rounding however it is evaluated. So each share is rounded to a multiple of the weight's own
ulp, and the last copy takes what is left, which is such a multiple too. Their sum is then the weight, in exact
arithmetic and in any dtype; no share is off by more than an ulp of the weight for each copy.
"""

from __future__ import annotations

import torch


def shared_out(weight: torch.Tensor, axis: int, old: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Gather ``weight`` along ``axis``, each new position with its share of the old one's weight.

    Args:
        weight: a floating-point weight that is contracted over ``axis``.
        old: for each new position the old one that it copies, int64, shape (n,), on the CPU.
        share: for each new position its factor, float64, shape (n,), on the CPU; the factors of one old position's
            copies sum to 1.

    Returns:
        the new weight; over the copies of one old position it sums to ``weight`` there, without rounding.
    """
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    device = weight.device
    result = weight.index_select(axis, old.to(device)) * share.to(device, weight.dtype).view(shape)
    inexact = torch.bincount(old[torch.frexp(share).mantissa.abs() != 0.5], minlength=weight.shape[axis]) > 0
    places = inexact[old].nonzero().squeeze(1)  # a power of two times a weight needs no rounding
    if len(places):
        part = _split(weight, axis, old[places].to(device), share[places].to(device).view(shape))
        result.index_copy_(axis, places.to(device), part)
    return result


def _split(weight: torch.Tensor, axis: int, old: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """As `shared_out`, with any share: rounded to ulps, and the rest in the last copy."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    last = _last_of_each(old, weight.shape[axis]).view(share.shape)
    parts = exact.index_select(axis, old)
    rounded = _to_ulps(parts * share.to(exact.dtype), parts, weight.dtype)
    given = torch.zeros_like(exact).index_add(axis, old, torch.where(last, 0.0, rounded))
    rest = parts - given.index_select(axis, old)
    return torch.where(last, rest, rounded).to(weight.dtype)


def _last_of_each(old: torch.Tensor, size: int) -> torch.Tensor:
    """For each entry, whether its value does not come again."""
    at = torch.arange(len(old), device=old.device)
    final = torch.zeros(size, dtype=old.dtype, device=old.device).scatter_reduce(0, old, at, "amax")
    return final[old] == at


def _to_ulps(values: torch.Tensor, whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` rounded to multiples of the ulp that ``whole`` has as a number of type ``dtype``."""
    digits = 1 - round(torch.log2(torch.tensor(torch.finfo(dtype).eps)).item())
    exponent = torch.frexp(whole).exponent
    return torch.ldexp(torch.round(torch.ldexp(values, digits - exponent)), exponent - digits)
