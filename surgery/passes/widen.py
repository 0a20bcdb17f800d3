"""Net2WiderNet: more channels, the same function (Chen, Goodfellow, Shlens 2016, section 3.1)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
from torch import nn

from surgery.errors import EditError, UsageError
from surgery.graph.dims import DimensionGroup, Dimensions, dimensions
from surgery.passes.apply import apply
from surgery.passes.average import normalised_streams
from surgery.passes.names import resolve
from surgery.passes.recipe import MEAN, Reindex

Width = float | int


def widen(module: nn.Module, width: float | Mapping[str, Width], *, seed: int = 0, round_to: int = 1) -> nn.Module:
    """Widen a network without changing what it computes.

    New channels copy random old ones (the paper's mapping g: the old channels first, then uniform draws), and the
    layers that read a channel divide its weights by the number of its copies.

    Args:
        module: a traced module.
        width: a factor of at least 1 for every group, or for each of some layers, containers or globs a factor
            (``float``) or an absolute width in channels (``int``).
        seed: of the draws; the same for the same group, whatever else is widened.
        round_to: new widths are rounded up to a multiple of this.

    One factor for every group leaves alone what cannot grow by it exactly (`unwidened`).

    Raises:
        UsageError: a factor below 1, a width below the present one or not made of whole units, an unknown name.
        EditError: a named layer cannot be widened exactly by that much.
    """
    return apply(module, widen_plan(module, width, seed=seed, round_to=round_to))


def widen_plan(module: nn.Module, width: float | Mapping[str, Width], *, seed: int = 0, round_to: int = 1) -> Reindex:
    """The step that `widen` takes."""
    return Reindex(_plan(module, width, seed, round_to)[0])


def unwidened(module: nn.Module, width: float | Mapping[str, Width], *, round_to: int = 1) -> dict[str, str]:
    """The editable groups that `widen` leaves as they are, for growing them would not be exact, and why."""
    return _plan(module, width, 0, round_to)[1]


def _plan(
    module: nn.Module, width: float | Mapping[str, Width], seed: int, round_to: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The index of each group that grows, and why others do not."""
    if round_to < 1:
        raise UsageError(f"round_to must be at least 1, not {round_to}")
    dims = dimensions(module)
    named = isinstance(width, Mapping)
    if isinstance(width, Mapping):
        wishes = resolve(dims, module, width)
    else:
        wishes = dict.fromkeys((g for g in dims.groups if g.editable), float(width))
    indices: dict[str, tuple[int, ...]] = {}
    left: dict[str, str] = {}
    for group, wish in wishes.items():
        try:
            index = _index(module, dims, group, _units(group, wish, round_to), seed)
        except EditError as error:
            if named:
                raise
            left[group.name] = str(error)
            continue
        if len(index) > group.units:
            indices[group.name] = tuple(index)
    if not named:
        _drop_uneven(dims, indices, left)
    return indices, left


def _drop_uneven(dims: Dimensions, indices: dict[str, tuple[int, ...]], left: dict[str, str]) -> None:
    """Leave alone the groups that one layer normalises over and that would not all grow by the same factor."""
    factor = np.ones(dims.count)
    owner = {g.name: g for g in dims.groups}
    for name, index in indices.items():
        group = owner[name]
        factor[group.start : group.start + group.units] = len(index) / group.units
    uneven = True
    while uneven:
        uneven = False
        for units, what in dims.mixed:
            if len(np.unique(factor[units])) > 1:
                for name in list(indices):
                    group = owner[name]
                    if ((units >= group.start) & (units < group.start + group.units)).any():
                        del indices[name]
                        left[name] = f"{what} normalises over it and others, which would not all grow by one factor"
                        factor[group.start : group.start + group.units] = 1.0
                        uneven = True


def _units(group: DimensionGroup, wish: Width, round_to: int) -> int:
    """The number of units that a factor or an absolute width asks for."""
    channels = group.size // group.units
    if isinstance(wish, float):
        if not (math.isfinite(wish) and wish >= 1):
            raise UsageError(f"a widening factor must be at least 1, not {wish}")
        units = math.floor(group.units * wish + 0.5)
    else:
        if wish < group.size or wish % channels:
            whole = f" and a multiple of {channels}" if channels > 1 else ""
            raise UsageError(f"width of {group.name!r} must be at least its {group.size} channels{whole}, not {wish}")
        units = wish // channels
    step = math.ceil(round_to / channels)
    return math.ceil(units / step) * step if units > group.units else units


def _index(module: nn.Module, dims: Dimensions, group: DimensionGroup, units: int, seed: int) -> list[int]:
    """The old units in order, then for each class its share of new copies; behind whole copies of what is normalised
    over, its mean."""
    extra = units - group.units
    places = list(range(group.units))
    free = np.flatnonzero(~group.frozen)
    if extra == 0:
        return places
    if group.single:
        raise EditError(f"group {group.name!r} cannot hold copies: {'; '.join(group.single)}")
    if group.mixed:
        copies, rest = divmod(units, group.units)
        try:
            if len(free) < group.units:
                raise EditError("a part of it must stay as it is")
            if rest:
                normalised_streams(module, dims, group)
        except EditError as error:
            more = f" and {len(group.mixed) - 2} more" if len(group.mixed) > 3 else ""
            norms = ", ".join(group.mixed[: 2 if more else 3]) + more
            raise EditError(
                f"group {group.name!r} is normalised over by {norms}: "
                f"only whole factors are exact, not {group.units} to {units} units ({error})"
            ) from error
        return places * copies + [MEAN] * rest
    random = np.random.default_rng([seed, zlib.crc32(group.name.encode())])
    classes = group.classes[free]
    bounds = [round(extra * k / len(free)) for k in range(len(free) + 1)]
    for number in np.unique(classes):
        inside = np.flatnonzero(classes == number)
        count = bounds[inside[-1] + 1] - bounds[inside[0]]
        places += [int(u) for u in random.choice(free[inside], size=count)]
    return places
