"""Units: ids that were tied become one unit (a channel; a head; a channel of every conv group), numbered through the
model, group after group. An axis is the sequence of the units that its positions hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from surgery.axes.factored import Settled
from surgery.axes.labels import Ids
from surgery.axes.ledger import Findings, ParamAxis, ParamKey
from surgery.axes.network_outputs import REASON

T = TypeVar("T", bound=np.generic)
Named = tuple[tuple[Ids, str], ...]
"""Units, and the name of an op or a reason."""


@dataclass(frozen=True, eq=False)
class Numbering:
    """The units of a module: arrays with one entry for each unit, or, `unit_of`, for each id.

    Attributes:
        unit_of: the unit of each id.
        ranges: first unit of each group, and the one behind its last.
        first: the axis that each group is named after.
        axis_units: the units along each axis of a parameter or buffer.
        roles: what the ops do with each of these axes.
        frozen: whether the unit must stay as it is.
        unread: whether that is only because no layer contracts over it.
        written: whether a layer writes the unit, as it does channels.
        access: a number that is equal for units which the same axes hold.
        writers: a number that is equal for units which the same axes write.
        fence: whether other axes hold the unit than hold the one before it.
        reasons: units that the rules froze, and why.
        mixed: units that a normalisation computes statistics over, and which one.
        single: units that are contracted with one another, and by which op.
    """

    unit_of: Ids
    ranges: tuple[tuple[int, int], ...]
    first: tuple[ParamKey, ...]
    axis_units: Mapping[ParamKey, Ids]
    roles: Mapping[ParamKey, frozenset[str]]
    frozen: NDArray[np.bool_]
    unread: NDArray[np.bool_]
    written: NDArray[np.bool_]
    access: NDArray[np.uint64]
    writers: NDArray[np.uint64]
    fence: NDArray[np.bool_]
    reasons: Named
    mixed: Named
    single: Named


def number_units(findings: Findings, settled: Settled, free: Collection[str] = ()) -> Numbering:
    """Number the connected components of the ids so that each group is a range.

    Args:
        free: names of the outputs that may change.

    Returns:
        the units, with what the rules said about their ids.
    """
    roles = {key: _roles(axis, key in findings.values) for key, axis in findings.axes.items()}
    order, ranges, first = _number(settled.component, findings.axes, roles)
    unit_of = _read_only(order[settled.component])
    count = int(order.max(initial=-1)) + 1
    axis_units = {key: _read_only(unit_of[axis.ids]) for key, axis in findings.axes.items()}
    written = _flags(count, [axis_units[key] for key, axis in findings.axes.items() if "producer" in axis.roles])
    freed = written & _find_freed(findings, unit_of, count, free)
    held_out = [unit_of[f.ids].ravel() for o in findings.outputs if not o.said for f in o.value.fields]
    rows = [(unit_of[last], unit_of[behind], unit_of[own], why) for last, behind, own, why in settled.rows]
    reasons = [
        *_by_unit(unit_of, settled.frozen),
        *((units[~freed[units]], REASON) for units in held_out),
        *((units[freed[units]], why) for units, why in _by_unit(unit_of, findings.behind)),
        (_find_unlearned(findings.buffers, axis_units, roles, count), "values of a buffer"),
        *((last[last == behind], why) for last, behind, _, why in rows),
    ]
    consumed = [units for key, units in axis_units.items() if "consumer" in roles[key]]
    read = freed | _flags(count, [*consumed, *(unit_of[ids] for ids in findings.contracted)])
    held = [*axis_units.values(), *(unit_of[ids] for ids in findings.cuts)]
    frozen = ~read | _flags(count, [units for units, _ in reasons])
    access = _signature(held, frozen)
    fence = _fence(access, ranges)
    crossed = [(_find_crossings(last, behind, own, fence), why) for last, behind, own, why in rows]
    if any(len(units) for units, _ in crossed):
        reasons += crossed
        frozen = ~read | _flags(count, [units for units, _ in reasons])
        access = _signature(held, frozen)
        fence = _fence(access, ranges)
    return Numbering(
        unit_of=unit_of,
        ranges=tuple(ranges),
        first=tuple(first),
        axis_units=MappingProxyType(axis_units),
        roles=MappingProxyType(roles),
        frozen=_read_only(frozen),
        unread=_read_only(~read & ~_flags(count, [units for units, _ in reasons])),
        written=_read_only(written),
        access=_read_only(access),
        writers=_read_only(_signature([u for key, u in axis_units.items() if "producer" in roles[key]], frozen)),
        fence=_read_only(fence),
        reasons=_close(reasons),
        mixed=_close(_by_unit(unit_of, findings.mixed)),
        single=_close([*_by_unit(unit_of, findings.single), *_find_mixed_uses(findings, axis_units, roles)]),
    )


def _find_freed(findings: Findings, unit_of: Ids, count: int, free: Collection[str]) -> NDArray[np.bool_]:
    """For each unit, whether of all outputs it is in free ones alone, and in none along the first axis, the batch."""
    held: dict[bool, list[Ids]] = {True: [], False: []}
    for output in findings.outputs:
        for f in output.value.fields:
            held[output.name in free and 0 not in f.dims].append(unit_of[f.ids])
    return _flags(count, held[True]) & ~_flags(count, held[False])


def _roles(axis: ParamAxis, is_value: bool) -> frozenset[str]:
    """The roles of an axis; an axis that no op named a role of is written, or carries what it is added to."""
    return frozenset(axis.roles) or frozenset({"per-channel" if is_value else "producer"})


def _number(
    component: Ids, axes: Mapping[ParamKey, ParamAxis], roles: Mapping[ParamKey, frozenset[str]]
) -> tuple[Ids, list[tuple[int, int]], list[ParamKey]]:
    """Number the components so that each group is a range.

    Axes that are written and share a component are in one group. A layer that normalises or reads a concatenation does
    not tie its parts together.

    Returns:
        the new number of each component, the range of each group, and the axis that each group is named after.
    """
    total = int(component.max(initial=-1)) + 1
    written = [key for key in axes if "producer" in roles[key]]
    carried = [key for key in axes if "producer" not in roles[key] and roles[key] != {"consumer"}]
    read = [key for key in axes if roles[key] == {"consumer"}]
    order = np.full(total, -1, dtype=np.int64)
    ranges: list[tuple[int, int]] = []
    first: list[ParamKey] = []
    count = 0
    for pool in (written, carried, read):
        held = {key: component[axes[key].ids] for key in pool}
        held = {key: parts for key, parts in held.items() if (order[parts] < 0).any()}
        for keys in _split_by_component(held, total):
            seen = np.concatenate([held[key] for key in keys])
            values, at = np.unique(seen, return_index=True)
            values = values[np.argsort(at)]
            values = values[order[values] < 0]
            order[values] = np.arange(count, count + len(values))
            ranges.append((count, count + len(values)))
            first.append(keys[0])
            count += len(values)
    rest = np.flatnonzero(order < 0)
    order[rest] = np.arange(count, count + len(rest))
    return order, ranges, first


def _split_by_component(held: Mapping[ParamKey, Ids], total: int) -> list[list[ParamKey]]:
    """The axes in lists, so that axes of different lists share no component; in the order of the first of each."""
    if not held:
        return []
    row = np.repeat(np.arange(len(held)), [parts.size for parts in held.values()])
    column = len(held) + np.concatenate(list(held.values()))
    size = len(held) + total
    graph = coo_array((np.ones(len(row), dtype=np.int8), (row, column)), shape=(size, size))
    label = connected_components(graph, directed=False)[1][: len(held)]
    lists: dict[int, list[ParamKey]] = {}
    for key, number in zip(held, label, strict=True):
        lists.setdefault(int(number), []).append(key)
    return list(lists.values())


def _by_unit(unit_of: Ids, said: Iterable[tuple[Ids, str]]) -> list[tuple[Ids, str]]:
    return [(unit_of[ids], what) for ids, what in said]


def _find_unlearned(
    buffers: frozenset[str], axis_units: Mapping[ParamKey, Ids], roles: Mapping[ParamKey, frozenset[str]], count: int
) -> Ids:
    """Units of buffers' axes that no parameter writes or scales."""
    writing = [u for (name, axis), u in axis_units.items() if name not in buffers and roles[name, axis] != {"consumer"}]
    learned = _flags(count, writing)
    units = [u[~learned[u]] for (name, _), u in axis_units.items() if name in buffers]
    return np.concatenate([np.zeros(0, dtype=np.int64), *units])


def _flags(count: int, sets: Iterable[Ids]) -> NDArray[np.bool_]:
    """For each unit whether it is in one of ``sets``."""
    flags = np.zeros(count, dtype=bool)
    for units in sets:
        flags[units] = True
    return flags


def _signature(sets: Sequence[Ids], frozen: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """For each unit, a number that stands for which of ``sets`` hold it and whether it is frozen."""
    marks = np.random.default_rng(0).integers(1, 2**62, size=len(sets), dtype=np.uint64)
    signature = np.zeros(len(frozen), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for units, mark in zip(sets, marks, strict=True):
            np.add.at(signature, units, mark)
    signature ^= frozen
    return signature


def _fence(access: NDArray[np.uint64], ranges: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
    """For each unit, whether other axes hold it than hold the unit before it."""
    fence = np.ones(len(access), dtype=bool)
    fence[1:] = access[1:] != access[:-1]
    fence[[start for start, _ in ranges]] = True
    return fence


def _find_crossings(last: Ids, behind: Ids, own: Ids, fence: NDArray[np.bool_]) -> Ids:
    """Of the last units of rows, those which the first unit of the next row continues although the rows are alike: a
    run of units would pass from one row to the next."""
    return np.asarray(last[(behind == last + 1) & (behind == own) & ~fence[behind]], dtype=np.int64)


def _find_mixed_uses(
    findings: Findings, axis_units: Mapping[ParamKey, Ids], roles: Mapping[ParamKey, frozenset[str]]
) -> list[tuple[Ids, str]]:
    """Axes that are contracted over and used in another way."""
    return [
        (axis_units[key], f"{key[0]} is contracted over and used in another way")
        for key, held in roles.items()
        if "consumer" in held and (len(held) > 1 or key in findings.values)
    ]


def _close(said: Iterable[tuple[Ids, str]]) -> Named:
    return tuple((_read_only(units), what) for units, what in said)


def _read_only(array: NDArray[T]) -> NDArray[T]:
    array.flags.writeable = False
    return array
