"""Noise on the weights of copies, so that they learn different things (Net2Net, section 3.1 of Chen et al. 2016).

Copies that have equal weights get equal gradients, and without dropout stay equal. The paper adds noise to the weights
that write all copies but the first, which changes the function. Noise on the weights that read them, adding up to zero
over the copies of a unit, does not: `surgery.passes.shares.shared_out` adds it. Draws are numpy's, on the CPU: the same
for the same seed, parameter and axis, whatever the device and the dtype.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from surgery.passes.recipe import MEAN, Noise
from surgery.passes.shares import Draw


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
        axis: partial(_drawn, np.random.default_rng([noise.seed, key, axis]), noise.scale, weight)
        for axis, held in roles.items()
        if on in held
    }


def _drawn(random: np.random.Generator, scale: float, weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    kind = torch.promote_types(weight.dtype, torch.float32)
    normal = torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32)).to(weight.device, kind)
    return normal * (scale * weight.to(kind).std(correction=0))


def perturbed(weight: torch.Tensor, axis: int, old: NDArray[np.int64], draw: Draw) -> torch.Tensor:
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
