"""Net2WiderNet: more channels, the same function (Chen, Goodfellow, Shlens 2016, section 3.1)."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.frozen import why_nothing_changes
from surgery.axes.groups import DimensionGroup
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.edit.apply import apply
from surgery.edit.copies import Noise
from surgery.edit.means import normalised_streams
from surgery.edit.names import resolve
from surgery.edit.reindex import Reindex
from surgery.edit.step import MEAN
from surgery.errors import EditError, NothingChangedWarning, UsageError, whole_number

Width = float | int

MAPPINGS = ("random", "balanced")
SYMMETRY = ("uneven", "zero-sum", "noise")


def widen(
    module: nn.Module,
    width: float | Mapping[Any, Width],
    *,
    mapping: str = "random",
    break_symmetry: str | None = None,
    noise: float = 0.05,
    seed: int = 0,
    round_to: int = 1,
    outputs: Outputs = None,
) -> nn.Module:
    """Widen a network without changing what it computes.

    New channels copy old ones, and the layers that read a channel share its weights out among its copies.

    Args:
        module: a traced module.
        width: a factor of at least 1 for every group, or for each of some selectors (`surgery.selectors`) a factor
            (``float``) or an absolute width in channels (``int``): ``{"layer3": 2.0, "layer1.0.conv1": 96}``. A
            selector stands for every group that a layer it matches writes, each of which gets the factor, or the
            width. The most specific selector decides.
        mapping: ``"random"``: the paper's mapping g, the old channels first, then uniform draws. ``"balanced"``: each
            channel is copied as often as the others, or once more; drawn is which. What a LayerNorm or GroupNorm
            normalises over is always copied whole.
        break_symmetry: copies that are read with equal weights get equal gradients, and unless there is dropout stay
            equal in training. None: the paper's even split, which leaves them so. ``"uneven"``: each copy is read with
            a factor of its own, drawn around the even one. ``"zero-sum"``: the even split, and noise on each weight
            that reads a copy, adding up to zero over the copies of a channel; it is limited to half of the copy's share
            of the weight, so that the shares can add up to it without rounding. ``"noise"``: the paper's noise on the
            weights that write the copies, all but the first: *inexact*, the network no longer computes the same.
        noise: standard deviation of ``"zero-sum"`` and ``"noise"``, in those of the weight that it is added to.
        seed: of the draws; the same for the same group, whatever else is widened.
        round_to: new widths, absolute ones too, are rounded up to a multiple of this, in channels.
        outputs: the outputs of the network that may change: ``"free"`` for all, or their names (`surgery.outputs`).
            Channels alone do, positions and the batch never. `surgery.verify` compares what is left.

    One factor for every group leaves alone what cannot grow by it exactly (`unwidened`).

    Returns:
        a new module. It computes the same function, except with ``break_symmetry="noise"``.

    Warns:
        NothingChangedWarning: a single factor above 1 leaves the network as it is.

    Raises:
        UsageError: a factor below 1, a width below the present one or not made of whole units, an unknown name, output,
            mapping or way to break the symmetry, a ``noise`` that is not above 0.
        EditError: a named layer cannot be widened exactly by that much.

    Example:
        >>> wide = surgery.widen(traced, {"layer3": 2.0, "layer1.0.conv1": 96})
        >>> surgery.verify(wide, traced).ok
        True
    """
    step = widen_plan(
        module,
        width,
        mapping=mapping,
        break_symmetry=break_symmetry,
        noise=noise,
        seed=seed,
        round_to=round_to,
        outputs=outputs,
    )
    if not (step.indices or isinstance(width, Mapping) or width == 1):
        why = _why_nothing_grows(module, width, round_to, step.outputs)
        warnings.warn(f"widen changed nothing: {why}", NothingChangedWarning, stacklevel=2)
    return apply(module, step)


def _why_nothing_grows(module: nn.Module, width: float, round_to: int, free: tuple[str, ...]) -> str:
    left = unwidened(module, width, round_to=round_to, outputs=free)
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    return f"{next(iter(left.values()))}{more}" if left else why_nothing_changes(analyse(module, free))


def widen_plan(
    module: nn.Module,
    width: float | Mapping[Any, Width],
    *,
    mapping: str = "random",
    break_symmetry: str | None = None,
    noise: float = 0.05,
    seed: int = 0,
    round_to: int = 1,
    outputs: Outputs = None,
) -> Reindex:
    """The step that `widen` takes."""
    if mapping not in MAPPINGS:
        raise UsageError(f"mapping must be 'random' or 'balanced', not {mapping!r}")
    if break_symmetry is not None and break_symmetry not in SYMMETRY:
        raise UsageError(f"break_symmetry must be 'uneven', 'zero-sum', 'noise' or None, not {break_symmetry!r}")
    seed = whole_number("seed", seed, 0)
    free = parse_outputs(outputs)
    indices = _plan(module, width, mapping, seed, round_to, free)[0]
    if break_symmetry == "uneven":
        drawn = {name: _draw_shares(name, index, seed) for name, index in indices.items()}
        return Reindex(indices, {name: shares for name, shares in drawn.items() if shares}, outputs=free)
    if break_symmetry is None:
        return Reindex(indices, outputs=free)
    kind = "zero-sum" if break_symmetry == "zero-sum" else "plain"
    return Reindex(indices, noise=Noise(kind, _real_number("noise is a number", noise), seed), outputs=free)


def unwidened(
    module: nn.Module, width: float | Mapping[Any, Width], *, round_to: int = 1, outputs: Outputs = None
) -> dict[str, str]:
    """The editable groups that `widen` leaves as they are because it could not widen them exactly.

    Args:
        module, width, round_to, outputs: as for `widen`.

    Returns:
        by group name, why.

    Raises:
        UsageError, EditError: as `widen`.

    Example:
        >>> surgery.unwidened(traced, 1.5)
        {}
    """
    return _plan(module, width, "random", 0, round_to, parse_outputs(outputs))[1]


def _plan(
    module: nn.Module,
    width: float | Mapping[Any, Width],
    mapping: str,
    seed: int,
    round_to: int,
    free: tuple[str, ...],
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The index of each group that grows, and why others do not."""
    round_to = whole_number("round_to", round_to, 1)
    analysis = analyse(module, free)
    named = isinstance(width, Mapping)
    if isinstance(width, Mapping):
        wishes = resolve(analysis, module, width)
    else:
        wishes = dict.fromkeys((g for g in analysis.groups if g.editable), _real_number(_WIDTH, width))
    indices: dict[str, tuple[int, ...]] = {}
    left: dict[str, str] = {}
    for group, wish in wishes.items():
        try:
            index = _draw_index(module, analysis, group, _wanted_units(group, wish, round_to), mapping, seed)
        except EditError as error:
            if named:
                raise
            left[group.name] = str(error)
            continue
        if len(index) > group.units:
            indices[group.name] = tuple(index)
    if not named:
        _drop_uneven(analysis, indices, left)
    return indices, left


def _drop_uneven(analysis: Analysis, indices: dict[str, tuple[int, ...]], left: dict[str, str]) -> None:
    """Leave alone the groups that one layer normalises over and that would not all grow by the same factor."""
    factor = np.ones(analysis.count)
    owner = {g.name: g for g in analysis.groups}
    for name, index in indices.items():
        group = owner[name]
        factor[group.start : group.start + group.units] = len(index) / group.units
    uneven = True
    while uneven:
        uneven = False
        for units, what in analysis.mixed:
            if len(np.unique(factor[units])) > 1:
                for name in list(indices):
                    group = owner[name]
                    if ((units >= group.start) & (units < group.start + group.units)).any():
                        del indices[name]
                        left[name] = f"{what} normalises over it and others, which would not all grow by one factor"
                        factor[group.start : group.start + group.units] = 1.0
                        uneven = True


_WIDTH = "a width is a factor (float) or, for a name, a number of channels (int)"


def _real_number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{what}, not {value!r}")
    return float(value)


def _wanted_units(group: DimensionGroup, wish: Width, round_to: int) -> int:
    """The number of units that a factor or an absolute width asks for."""
    channels = group.size // group.units
    number = _real_number(_WIDTH, wish)
    if isinstance(wish, Integral):
        width = int(wish)
        if width < group.size or width % channels:
            whole = f" and a multiple of {channels}" if channels > 1 else ""
            hint = f" (a factor is a float: {number})" if 0 < width < 10 else ""
            raise UsageError(
                f"width of {group.name!r} must be at least its {group.size} channels{whole}, not {width}{hint}"
            )
        units = width // channels
    else:
        if not (math.isfinite(number) and number >= 1):
            raise UsageError(f"a widening factor must be at least 1, not {wish}")
        units = math.floor(group.units * number + 0.5)
    step = round_to // math.gcd(round_to, channels)
    return math.ceil(units / step) * step if units > group.units else units


def _draw_index(
    module: nn.Module, analysis: Analysis, group: DimensionGroup, units: int, mapping: str, seed: int
) -> list[int]:
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
            if rest and analysis.is_output(group):
                raise EditError("an output of the network would hold means of its channels")
            if rest:
                normalised_streams(module, analysis, group)
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
        even, more = divmod(count, len(inside)) if mapping == "balanced" else (0, count)
        drawn = random.choice(free[inside], size=more, replace=mapping == "random")
        places += [*map(int, np.tile(free[inside], even)), *map(int, drawn)]
    return places


def _draw_shares(name: str, index: tuple[int, ...], seed: int) -> tuple[float, ...]:
    """For each new unit of a group its share of what its copies are read with, drawn; none where there are no copies.

    A share is the even one times a factor of 1/3 to 3, in few binary digits: the shares of a unit sum to 1 exactly.
    """
    places = np.asarray(index)
    held = np.flatnonzero(places != MEAN)
    old = places[held]
    copies = np.bincount(old)
    if copies.max() < 2:
        return ()
    draws = np.random.default_rng([seed, zlib.crc32(name.encode()), 1]).uniform(0.5, 1.5, len(old))
    grid = 2.0 ** (8 + np.ceil(np.log2(copies[old])))
    share = np.round(draws / np.bincount(old, weights=draws)[old] * grid) / grid
    first = np.unique(old, return_index=True)[1]
    share[first] += 1 - np.bincount(old, weights=share)[old[first]]
    shares = np.zeros(len(places))
    shares[held] = share
    return tuple(map(float, shares))
