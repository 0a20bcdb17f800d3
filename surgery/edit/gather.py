"""Gathering parameters and buffers: each axis once, straight into the result. The only place where an edit that
changes channels touches tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from surgery.axes.analysis import Analysis
from surgery.edit.copies import Noise, draws, perturb_copies, share_out
from surgery.edit.layout import Layout, Layouts, memory_format
from surgery.edit.means import Expansion
from surgery.edit.step import MEAN


def gather_tensors(
    module: nn.Module, analysis: Analysis, layouts: Layouts, expansion: Expansion, noise: Noise | None
) -> dict[int, Any]:
    """A `deepcopy` memo that maps each changed tensor to its new version."""
    memo: dict[int, Any] = {}
    for name, tensor, axes in changed_tensors(module, analysis, layouts):
        roles = {axis: analysis.roles[name, axis] for axis in axes}
        memo[id(tensor)] = _like(tensor, _gather(name, tensor, axes, roles, layouts, expansion, noise))
    return memo


def changed_tensors(
    module: nn.Module, analysis: Analysis, layouts: Layouts
) -> Iterator[tuple[str, torch.Tensor, dict[int, Layout]]]:
    """Each parameter and buffer that an edit changes, once, by its first name, and the new layouts of its axes."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        axes: dict[int, Layout] = {}
        for axis in range(tensor.ndim):
            units = analysis.axis_units.get((name, axis))
            layout = None if units is None else layouts.of(units)
            if layout is not None:
                axes[axis] = layout
        if axes:
            yield name, tensor, axes


def _gather(
    name: str,
    tensor: torch.Tensor,
    axes: Mapping[int, Layout],
    roles: Mapping[int, frozenset[str]],
    layouts: Layouts,
    expansion: Expansion,
    noise: Noise | None,
) -> torch.Tensor:
    """A tensor with new layouts of ``axes``, each axis with its ``roles``."""
    draw = {} if noise is None else draws(noise, name, tensor, roles)
    read = {axis for axis in axes if "consumer" in roles[axis]}
    result = tensor.detach()

    def turn(axis: int) -> tuple[bool, float]:
        """The least grown first; with noise those that are read last, so that each new row has noise of its own."""
        return bool(draw) and axis in read, len(axes[axis].old) / tensor.shape[axis]

    for axis in sorted(axes, key=turn):
        old = axes[axis].old
        share = layouts.share[axes[axis].unit]
        index = torch.from_numpy(old).to(tensor.device)
        means = layouts.is_mean[axes[axis].unit]
        if means.any():
            places = torch.from_numpy(np.flatnonzero(means)).to(tensor.device)
            before, result = result, result.index_select(axis, index)
            if axis in read:
                copies = torch.from_numpy(np.flatnonzero(~means)).to(tensor.device)
                kept = torch.from_numpy(old[~means]), torch.from_numpy(share[~means])
                shared = share_out(before, axis, *kept, draw.get(axis))
                result = result.index_fill(axis, places, 0.0).index_copy(axis, copies, shared)
            else:
                result = expansion.fill(name, before, result, axis, places)
        elif axis in read and (share != 1.0).any():
            result = share_out(result, axis, torch.from_numpy(old), torch.from_numpy(share), draw.get(axis))
        elif len(old) and old[-1] - old[0] + 1 == len(old) and bool((np.diff(old) == 1).all()):
            result = result.narrow(axis, int(old[0]), len(old))
        else:
            result = result.index_select(axis, index)
        if axis in draw and axis not in read:
            result = perturb_copies(result, axis, np.where(means, MEAN, old), draw[axis])
    return result


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new`` with a storage of its own, as the kind of tensor that ``old`` is."""
    layout = memory_format(old)
    if layout != torch.contiguous_format or new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr():
        new = new.clone(memory_format=layout)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new
