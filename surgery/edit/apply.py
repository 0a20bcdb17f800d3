"""Recipe + module -> new module. The only place where tensors are touched.

Each parameter axis is gathered once, straight into the result; the graph's constants and the layers' attributes follow
by the rule table, and an op that moves data and can no longer express what is asked of it becomes a selection.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from surgery.axes.groups import Analysis, DimensionGroup, analyse
from surgery.axes.labels import Labelled
from surgery.axes.ledger import labelled_leaves
from surgery.edit.copies import Draw, draws, perturbed, shared_out
from surgery.edit.insert_block import insert_block
from surgery.edit.insert_dense import dense_edit, insert_dense
from surgery.edit.insert_identity import insert_identity, memory_format
from surgery.edit.layout import Layout, Layouts, changed_tensors
from surgery.edit.means import Expansion
from surgery.edit.recipe import MEAN, InsertBlock, InsertDense, Noise, Recipe, Reindex, Step
from surgery.edit.rewire import rewire
from surgery.errors import EditError, UsageError
from surgery.graph.table import NodeEdit
from surgery.graph.tracing import info, with_info


def apply(module: nn.Module, edit: Recipe | Step | Iterable[Step]) -> nn.Module:
    """A new module with the steps done to it, in order. ``module`` is not changed and shares no storage with it.

    Raises:
        EditError: a step cannot be made exactly.
        UsageError: a step names what is not there, or an index is out of range.
    """
    info(module)
    steps: Sequence[Step] = edit.steps if isinstance(edit, Recipe) else _steps(edit)
    result = module
    for step in steps:
        before = info(result).steps
        if isinstance(step, Reindex):
            result = _reindex(result, step)
        elif isinstance(step, InsertDense):
            result = _deepened(result, step)
        else:
            result = copy.deepcopy(module) if result is module else result
            insert_block(result, step) if isinstance(step, InsertBlock) else insert_identity(result, step)
        with_info(result, steps=(*before, step))
    return copy.deepcopy(module) if result is module else result


def reindex(
    module: nn.Module,
    indices: Mapping[str, Sequence[int]],
    shares: Mapping[str, Sequence[float]] | None = None,
) -> nn.Module:
    """Gather dimension groups by an index.

    Args:
        module: a traced module.
        indices: for each group, named by any layer that produces it, the old unit for each new one. Dropping, copying
            and moving units are all indices: ``[0, 1]`` keeps two, ``[0, 1, 1]`` copies the second.
        shares: for a group with copies, the factor with which consumers weigh each new unit, 0 for a mean; by default
            even.

    Raises:
        UsageError: an unknown name, an index out of range or empty, shares of a unit's copies that do not sum to 1.
        EditError: a unit that must stay is dropped, or copies cannot be made exactly.
    """
    dims = analyse(module)
    by_group: dict[str, tuple[int, ...]] = {}
    for name, index in indices.items():
        group = dims.find(name)
        if group.name in by_group:
            raise UsageError(f"{name!r} addresses group {group.name!r}, which another name addresses too")
        by_group[group.name] = tuple(int(i) for i in index)
    named = {dims.find(name).name: tuple(float(v) for v in values) for name, values in (shares or {}).items()}
    return apply(module, Reindex(by_group, named))


def _steps(edit: Step | Iterable[Step]) -> Sequence[Step]:
    return (edit,) if isinstance(edit, Step) else tuple(edit)


def _deepened(module: nn.Module, step: InsertDense) -> nn.Module:
    edit = dense_edit(module, step.after)
    if edit is None or edit.like != step.like:
        raise EditError(f"{step.after!r} does not end in a dense block whose last layer is {step.like!r}")
    result = _reindex(module, edit.readers)
    insert_dense(module, step, edit, result, _reindex(module, edit.wider))
    return result


def _reindex(module: nn.Module, step: Reindex) -> nn.Module:
    dims = analyse(module)
    indices = {dims.find(name): index for name, index in step.indices.items()}
    shares = {dims.find(name): values for name, values in step.shares.items()}
    for group, index in indices.items():
        _check(group, index, shares.get(group))
    expansion = Expansion(module, dims, {g: index for g, index in indices.items() if MEAN in index})
    layouts = Layouts(dims, indices, shares)
    _check_readers(dims, layouts)
    _check_mixed(dims, layouts)
    result = copy.deepcopy(module, _gathered(module, dims, layouts, expansion, step.noise))
    rewire(module, result, dims, layouts)
    expansion.adjust(result)
    _follow_outside(result, dims, layouts)
    return result


def _follow_outside(module: nn.Module, dims: Analysis, layouts: Layouts) -> None:
    """Let the attributes of the layers that Python outside the graphs calls follow their new tensors."""
    for call in {call.path: call for call in dims.findings.calls}.values():
        labels = list(labelled_leaves((call.args, call.out)))
        if all(layouts.of(dims.unit_of[f.ids]) is None for label in labels for f in label.fields):
            continue
        call.rewrite(
            NodeEdit(
                node=call.node,
                module=module.get_submodule(call.path),
                shapes=tuple(_shape(out, dims, layouts) for out in labelled_leaves(call.out)),
                changed=frozenset(),
                inputs=tuple(_shape(v, dims, layouts) if isinstance(v, Labelled) else None for v in call.args),
                computed={},
                copies={},
                tensors={},
                old=tuple(out.shape for out in labelled_leaves(call.out)),
            )
        )


def _shape(value: Labelled, dims: Analysis, layouts: Layouts) -> tuple[int, ...]:
    """The shape that an edit asks for."""
    shape = list(value.shape)
    for f in value.fields:
        layout = layouts.of(dims.unit_of[f.ids])
        if layout is not None and layout.shape is not None:
            for dim, size in zip(f.dims, layout.shape, strict=True):
                shape[dim] = size
    return tuple(shape)


def _check(group: DimensionGroup, index: Sequence[int], shares: Sequence[float] | None) -> None:
    places = np.asarray(index, dtype=np.int64)
    where = f"group {group.name!r} of {group.units} units"
    if len(places) == 0:
        raise UsageError(f"the index of {where} is empty")
    if group.mixed:  # what is normalised over may have means
        places = places[places != MEAN]
    if len(places) == 0 or places.min() < 0 or places.max() >= group.units:
        raise UsageError(f"the index of {where} has an entry outside 0..{group.units - 1}")
    copies = np.bincount(places, minlength=group.units)
    frozen = np.flatnonzero(group.frozen)
    kept = places[group.frozen[places]]
    if not np.array_equal(kept, frozen):
        what = "cannot be edited" if not group.editable else f"must keep units {_some(frozen)} as they are"
        raise EditError(f"{where} {what}: {group.reason}")
    if copies.max() > 1:
        if group.single:
            raise EditError(f"{where} cannot hold copies: {'; '.join(group.single)}")
        both = [str(m) for m in group.members if m.role == "both"]
        if both:
            raise EditError(f"{where} cannot hold copies: {', '.join(both)} is both written and read")
    if shares is not None:
        if len(shares) != len(index):
            raise UsageError(f"{where}: {len(shares)} shares for {len(index)} units")
        factors, means = np.asarray(shares), np.asarray(index) == MEAN
        if factors[means].any():
            raise UsageError(f"{where}: the share of a mean must be 0")
        total = np.bincount(places, weights=factors[~means], minlength=group.units)
        if not np.allclose(total[copies > 0], 1.0, atol=1e-9):
            raise UsageError(f"{where}: the shares of a unit's copies must sum to 1")


def _check_readers(dims: Analysis, layouts: Layouts) -> None:
    """No layer may be left without an input or an output."""
    for (name, axis), units in dims.axis_units.items():
        layout = layouts.of(units)
        if layout is not None and len(layout.old) == 0:
            raise EditError(f"nothing would be left of axis {axis} of {name}")


def _check_mixed(dims: Analysis, layouts: Layouts) -> None:
    """What is normalised over holds the same number of copies of everything that is left."""
    for units, what in dims.mixed:
        copies = layouts.copies[units]
        if copies.max(initial=0) > 1 and len(np.unique(copies[copies > 0])) > 1:
            names = [g.name for g in dims.groups if ((units >= g.start) & (units < g.start + g.units)).any()]
            raise EditError(
                f"{what} normalises over {' and '.join(map(repr, names))}: every unit needs the same number of copies"
            )


def _some(units: Any) -> str:
    shown = ", ".join(map(str, units[:6]))
    return f"{shown}, …" if len(units) > 6 else shown


def _gathered(
    module: nn.Module, dims: Analysis, layouts: Layouts, expansion: Expansion, noise: Noise | None
) -> dict[int, Any]:
    """A `deepcopy` memo that maps each changed tensor to its new version."""
    memo: dict[int, Any] = {}
    for name, tensor, axes in changed_tensors(module, dims, layouts):
        roles = {axis: dims.findings.axes[name, axis].roles for axis in axes}
        read = [axis for axis in axes if "consumer" in roles[axis]]
        draw = {} if noise is None else draws(noise, name, tensor, roles)
        memo[id(tensor)] = _like(tensor, _gather(name, tensor.detach(), axes, read, layouts, expansion, draw))
    return memo


def _gather(
    name: str,
    tensor: torch.Tensor,
    axes: Mapping[int, Layout],
    read: Sequence[int],
    layouts: Layouts,
    expansion: Expansion,
    draw: Mapping[int, Draw],
) -> torch.Tensor:
    result = tensor

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
                shared = shared_out(before, axis, *kept, draw.get(axis))
                result = result.index_fill(axis, places, 0.0).index_copy(axis, copies, shared)
            else:
                result = expansion.fill(name, before, result, axis, places)
        elif axis in read and (share != 1.0).any():
            result = shared_out(result, axis, torch.from_numpy(old), torch.from_numpy(share), draw.get(axis))
        elif len(old) and old[-1] - old[0] + 1 == len(old) and bool((np.diff(old) == 1).all()):
            result = result.narrow(axis, int(old[0]), len(old))
        else:
            result = result.index_select(axis, index)
        if axis in draw and axis not in read:
            result = perturbed(result, axis, np.where(means, MEAN, old), draw[axis])
    return result


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new`` with a storage of its own, as the kind of tensor that ``old`` is."""
    layout = memory_format(old)
    if layout != torch.contiguous_format or new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr():
        new = new.clone(memory_format=layout)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new
