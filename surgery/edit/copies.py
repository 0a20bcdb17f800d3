"""Sharing a weight out among the copies of the channel it reads, so that the shares add up to it exactly.

A third of a float32 is not a float32: three rounded thirds miss the weight by an ulp, and the widened network misses
the narrow one by float32 rounding however it is evaluated. So each share is rounded to a multiple of the weight's own
ulp, and the last copy takes what is left, which is such a multiple too. Their sum is then the weight, in exact
arithmetic and in any dtype; no share is off by more than an ulp of the weight for each copy.

Noise between the shares keeps all that as long as no share outgrows the weight: so it is at most half of the share that
it is added to, and the last copy takes it back.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from surgery.edit.step import MEAN
from surgery.errors import UsageError, unknown_name


@dataclass(frozen=True)
class Noise:
    """Noise on the weights of copies, so that they learn different things.

    Attributes:
        kind: ``"zero-sum"``: on the weights that read a copied unit, adding up to zero over its copies: exact.
            ``"plain"``: on the weights that write the copies, all but the first: inexact.
        scale: its standard deviation, in those of the weight that it is added to.
        seed: of the draws; each axis of each parameter has draws of its own.
    """

    kind: str
    scale: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("zero-sum", "plain"):
            raise unknown_name("kind of noise", self.kind, ("zero-sum", "plain"))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UsageError(f"noise must be a number above 0, not {self.scale}")

    def __str__(self) -> str:
        return f"{self.kind} noise of {self.scale:g}, seed {self.seed}"


Draw = Callable[[Sequence[int]], torch.Tensor]
"""Makes noise of a shape."""


def share_out(
    weight: torch.Tensor, axis: int, old: torch.Tensor, share: torch.Tensor, draw: Draw | None = None
) -> torch.Tensor:
    """Gather ``weight`` along ``axis``, each new position with its share of the old one's weight.

    Args:
        weight: a floating-point weight that is contracted over ``axis``.
        old: for each new position the old one that it copies, int64, shape (n,), on the CPU.
        share: for each new position its factor, float64, shape (n,), on the CPU; the factors of one old position's
            copies sum to 1.
        draw: makes noise for the shares of old positions that have several copies: it is added to all but the last
            copy, limited to half of the share (a weight of 0 stays 0), and taken from the last.

    Returns:
        the new weight; over the copies of one old position it sums to ``weight`` there, without rounding as long as no
        copy is larger than the weight.
    """
    size, device = weight.shape[axis], weight.device
    if draw is None:  # a power of two times a weight needs no rounding
        apart = torch.bincount(old[torch.frexp(share).mantissa.abs() != 0.5], minlength=size)[old] > 0
    else:
        apart = torch.bincount(old, minlength=size)[old] > 1
    last = _last_of_each(old, size)
    result = weight.new_empty([len(old) if a == axis else n for a, n in enumerate(weight.shape)])

    def put(where: torch.Tensor, values: torch.Tensor) -> None:
        result.index_copy_(axis, where.nonzero().squeeze(1).to(device), values.to(weight.dtype))

    def shares(where: torch.Tensor) -> torch.Tensor:
        return share[where].to(device).view([-1 if a == axis else 1 for a in range(weight.ndim)])

    put(~apart, weight.index_select(axis, old[~apart].to(device)) * shares(~apart).to(weight.dtype))
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    others = old[apart & ~last].to(device)
    whole = exact.index_select(axis, others)
    parts = whole * shares(apart & ~last).to(exact.dtype)
    if draw is not None:
        room = parts.abs() / 2
        parts += draw(parts.shape).to(exact).clamp(-room, room)
    parts = _to_ulps(parts, whole, weight.dtype)
    put(apart & ~last, parts)
    put(apart & last, exact.index_add(axis, others, parts, alpha=-1).index_select(axis, old[apart & last].to(device)))
    return result


def _last_of_each(old: torch.Tensor, size: int) -> torch.Tensor:
    """For each entry, whether its value does not come again."""
    at = torch.arange(len(old), device=old.device)
    final = torch.zeros(size, dtype=old.dtype, device=old.device).scatter_reduce(0, old, at, "amax")
    return final[old] == at


def _to_ulps(values: torch.Tensor, whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values`` rounded to multiples of the ulp that ``whole`` has as a number of type ``dtype``."""
    # A sum that is at least as large as whole is such a multiple, and so is the difference between the two.
    beyond = torch.copysign(whole, values)
    return (values + beyond).to(dtype).to(values.dtype) - beyond


def draws(noise: Noise, name: str, tensor: torch.Tensor, roles: Mapping[int, Collection[str]]) -> dict[int, Draw]:
    """What makes the noise for each axis of the parameter ``name`` that it falls on.

    Args:
        tensor: the parameter, or buffer, as it is before the edit; the noise is in units of its standard deviation.
        roles: of the axes that the edit changes.
    """
    on = "consumer" if noise.kind == "zero-sum" else "producer"
    if on == "producer" and (tensor.ndim < 2 or not isinstance(tensor, nn.Parameter)):
        return {}
    weight, key = tensor.detach(), zlib.crc32(name.encode())
    return {
        axis: partial(_draw_normal, np.random.default_rng([noise.seed, key, axis]), noise.scale, weight)
        for axis, held in roles.items()
        if on in held
    }


def _draw_normal(random: np.random.Generator, scale: float, weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    kind = torch.promote_types(weight.dtype, torch.float32)
    normal = torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32)).to(weight.device, kind)
    return normal * (scale * weight.to(kind).std(correction=0))


def perturb_copies(weight: torch.Tensor, axis: int, old: NDArray[np.int64], draw: Draw) -> torch.Tensor:
    """``weight``, gathered along ``axis`` from the positions ``old``, with noise on all copies but the first of each.

    Where the old position is `MEAN` nothing is copied.
    """
    first = np.zeros(len(old), dtype=bool)
    first[np.unique(old, return_index=True)[1]] = True
    places = torch.from_numpy(np.flatnonzero(~first & (old != MEAN))).to(weight.device)
    if len(places) == 0:
        return weight
    copies = weight.index_select(axis, places)
    noisy = copies.to(torch.promote_types(weight.dtype, torch.float32)) + draw(copies.shape)
    return weight.index_copy(axis, places, noisy.to(weight.dtype))
