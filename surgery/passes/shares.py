"""Sharing a weight out among the copies of the channel it reads, so that the shares add up to it exactly.

A third of a float32 is not a float32: three rounded thirds miss the weight by an ulp, and the widened network misses
the narrow one by float32 rounding however it is evaluated. So each share is rounded to a multiple of the weight's own
ulp, and the last copy takes what is left, which is such a multiple too. Their sum is then the weight, in exact
arithmetic and in any dtype; no share is off by more than an ulp of the weight for each copy.

Noise between the shares keeps all that, as long as no share outgrows the weight: it is centred over the copies of one
old position, and reduced where it would be more than half of a copy's own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Draw = Callable[[Sequence[int]], torch.Tensor]
"""Makes noise of a shape, on the CPU."""


def shared_out(
    weight: torch.Tensor, axis: int, old: torch.Tensor, share: torch.Tensor, draw: Draw | None = None
) -> torch.Tensor:
    """Gather ``weight`` along ``axis``, each new position with its share of the old one's weight.

    Args:
        weight: a floating-point weight that is contracted over ``axis``.
        old: for each new position the old one that it copies, int64, shape (n,), on the CPU.
        share: for each new position its factor, float64, shape (n,), on the CPU; the factors of one old position's
            copies sum to 1.
        draw: noise to add to the shares of each old position that has several, each weight's for itself. What is added
            is the noise less its mean over the copies, times the largest factor up to 1 with which it is for none of
            them more than half of its share; a weight of 0 stays 0.

    Returns:
        the new weight; over the copies of one old position it sums to ``weight`` there, without rounding.
    """
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    device = weight.device
    result = weight.index_select(axis, old.to(device)) * share.to(device, weight.dtype).view(shape)
    if draw is None:  # a power of two times a weight needs no rounding
        apart = torch.bincount(old[torch.frexp(share).mantissa.abs() != 0.5], minlength=weight.shape[axis]) > 0
    else:
        apart = torch.bincount(old, minlength=weight.shape[axis]) > 1
    places = apart[old].nonzero().squeeze(1)
    if len(places):
        part = _split(weight, axis, old[places].to(device), share[places].to(device).view(shape), draw)
        result.index_copy_(axis, places.to(device), part)
    return result


def _split(weight: torch.Tensor, axis: int, old: torch.Tensor, share: torch.Tensor, draw: Draw | None) -> torch.Tensor:
    """As `shared_out`, with any share: rounded to ulps, and the rest in the last copy."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    last = _last_of_each(old, weight.shape[axis]).view(share.shape)
    parts = exact.index_select(axis, old)
    wanted = parts * share.to(exact.dtype)
    if draw is not None:
        room = torch.minimum(wanted.abs() / 2, (parts.abs() - wanted.abs()).clamp(min=0))
        wanted = wanted + _zero_sum(draw(parts.shape).to(exact), room, axis, old, weight.shape[axis])
    rounded = _to_ulps(wanted, parts, weight.dtype)
    given = torch.zeros_like(exact).index_add(axis, old, torch.where(last, 0.0, rounded))
    rest = parts - given.index_select(axis, old)
    return torch.where(last, rest, rounded).to(weight.dtype)


def _zero_sum(noise: torch.Tensor, room: torch.Tensor, axis: int, old: torch.Tensor, size: int) -> torch.Tensor:
    """``noise`` without its mean over the copies of each old position, reduced so that none is beyond its ``room``."""
    whole = list(noise.shape)
    whole[axis] = size
    count = torch.bincount(old, minlength=size).clamp(min=1)
    count = count.view([-1 if a == axis else 1 for a in range(noise.ndim)])
    mean = noise.new_zeros(whole).index_add(axis, old, noise) / count
    noise = noise - mean.index_select(axis, old)
    where = old.view([-1 if a == axis else 1 for a in range(noise.ndim)]).expand_as(noise)
    fits = torch.where(noise == 0, 1.0, room / noise.abs())
    factor = noise.new_ones(whole).scatter_reduce(axis, where, fits, "amin")
    return noise * factor.index_select(axis, old)


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
