"""Where the tensors of an edited module come from: what a state that belongs to weights needs to follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.axes.groups import analyse
from surgery.axes.labels import Ids
from surgery.edit.apply import apply
from surgery.edit.insert_dense import dense_edit
from surgery.edit.layout import Layouts, changed_tensors
from surgery.edit.recipe import MEAN, InsertDense, Reindex, Step, recipe
from surgery.errors import UsageError
from surgery.graph.traced import named_tensors


@dataclass(frozen=True, eq=False)
class AxisOrigin:
    """An axis that was gathered.

    Attributes:
        old: for each position the old one that it copies, or `MEAN` for the mean of all; int64, shape (n,).
        new: for each position whether it was made by an edit: a further copy of what another position holds too, or a
            mean; bool, shape (n,).
    """

    old: Tensor
    new: Tensor


@dataclass(frozen=True, eq=False)
class Origin:
    """The tensor, by its qualified name, that an edited one was gathered from; for each axis how, or None as it was."""

    name: str
    axes: tuple[AxisOrigin | None, ...]


def origins(before: nn.Module, after: nn.Module) -> dict[str, Origin | None]:
    """Where each parameter and buffer of ``after`` comes from, which passes made from ``before``.

    Args:
        before: a traced module.
        after: a module whose recipe begins with that of ``before``.

    Returns:
        by qualified name, tied tensors under each of theirs; None for what an inserted layer brought.

    The edits are composed, whatever layers they inserted in between. For several that gather, the modules in between
    are made again, one at a time.

    Raises:
        UsageError: ``after`` was not made from ``before``.
    """
    moved: dict[str, list[AxisOrigin | None]] = {}
    steps = _steps_between(before, after)
    last = max((k for k, step in enumerate(steps) if isinstance(step, (Reindex, InsertDense))), default=-1)
    module = before
    for k, step in enumerate(steps[: last + 1]):
        _follow(module, step, moved)
        if k < last:
            module = apply(module, step)
    old, new = named_tensors(before), named_tensors(after)
    first = {id(tensor): name for name, tensor in reversed(old.items())}
    found: dict[str, Origin | None] = dict.fromkeys(new)
    lost = [name for name in old if name not in new]
    if lost:
        raise UsageError(f"{lost[0]} is not in the edited module: it was not made from the other one")
    for name in filter(old.__contains__, new):
        axes = moved.get(first[id(old[name])], [None] * old[name].ndim)
        expected = tuple(
            size if axis is None else len(axis.old) for axis, size in zip(axes, old[name].shape, strict=True)
        )
        if tuple(new[name].shape) != expected:
            raise UsageError(
                f"{name} has the shape {tuple(new[name].shape)}, where the recipe makes {expected} of the other "
                f"module's {tuple(old[name].shape)}: the module was not made from that one"
            )
        found[name] = Origin(name, tuple(axes))
    return found


def _steps_between(before: nn.Module, after: nn.Module) -> Sequence[Step]:
    done, steps = recipe(before).steps, recipe(after).steps
    if steps[: len(done)] != done:
        raise UsageError("the module was not made from the other one: its recipe does not begin with the other's")
    return steps[len(done) :]


def _follow(module: nn.Module, step: Step, moved: dict[str, list[AxisOrigin | None]]) -> None:
    """Compose what a step does to the tensors of ``module`` with what was done to them before."""
    gathers, kept = _gathers(module, step)
    if gathers is None:
        return
    analysis = analyse(module)
    layouts = Layouts(analysis, {analysis.find(name): index for name, index in gathers.indices.items()}, {})
    for name, tensor, axes in changed_tensors(module, analysis, layouts):
        if id(tensor) in kept:
            continue
        known = moved.setdefault(name, [None] * tensor.ndim)
        for axis, layout in axes.items():
            unit = layout.unit
            known[axis] = _composed(known[axis], layout.old, layouts.is_mean[unit], layouts.further[unit])


def _gathers(module: nn.Module, step: Step) -> tuple[Reindex | None, frozenset[int]]:
    """How a step gathers what is there before it, and the ids of tensors that it leaves as they are."""
    if isinstance(step, InsertDense) and (edit := dense_edit(module, step.after)) is not None:
        return edit.readers, edit.kept
    return (step if isinstance(step, Reindex) else None), frozenset()


def _composed(first: AxisOrigin | None, old: Ids, mean: NDArray[np.bool_], further: NDArray[np.bool_]) -> AxisOrigin:
    places, new = torch.from_numpy(old), torch.from_numpy(further)
    source = places if first is None else first.old[places]
    return AxisOrigin(
        old=source.masked_fill(torch.from_numpy(mean), MEAN),
        new=new if first is None else new | first.new[places],
    )
