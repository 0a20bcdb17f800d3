"""Dimension groups: the axes that must change together, and the channels in them that can be chosen one by one.

Positions that the op rules tied are one *unit* (a channel; a head; a channel of every conv group). Units are numbered
through the model, group after group, and an axis is the sequence of the units that its positions hold.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn

from surgery.axes.labels import Ids
from surgery.axes.ledger import Findings, Grid, ParamAxis
from surgery.axes.recording import collect_findings
from surgery.errors import UsageError, unknown_name
from surgery.graph.table import layer_tensors
from surgery.graph.traced import example_inputs, info, traced_parts


def dimension_groups(module: nn.Module) -> list[DimensionGroup]:
    """The dimension groups of a traced module, in the order of the forward pass.

    Every axis of every parameter that holds channels is in some group; groups that cannot be edited are listed too,
    with the reason. Pure: the module is not changed, and the result is remembered until the module is gone.
    """
    return list(analyse(module).groups)


@dataclass(frozen=True)
class Member:
    """An axis of a parameter (or buffer) in a group."""

    name: str
    """Qualified name, as in the state dict."""
    axis: int
    role: str
    """``producer`` (the layer writes the channels), ``consumer`` (it contracts over them) or ``per-channel``."""

    @property
    def layer(self) -> str:
        """Qualified name of the layer; of the parameter itself where it stands alone in its container."""
        return self.name.rpartition(".")[0] if self.name.rpartition(".")[2] in layer_tensors() else self.name

    def __str__(self) -> str:
        return f"{self.name}[{self.axis}]"


@dataclass(frozen=True, eq=False)
class DimensionGroup:
    """Axes that must change together.

    Attributes:
        name: the layer that first produces the channels.
        size: positions of that layer's axis, as far as they are this group's.
        units: how many things can be chosen independently; an index into the group is a list of units in
            ``range(units)``. Equal to ``size`` unless channels go together: heads, channels per conv group.
        members: every parameter axis that holds channels of the group.
        editable: whether any unit may be dropped, copied or moved.
        reason: why it is not editable, or why only in part; empty otherwise.
    """

    name: str
    size: int
    units: int
    members: tuple[Member, ...]
    editable: bool
    reason: str
    start: int = field(repr=False)
    owner: Analysis = field(repr=False)

    @property
    def frozen(self) -> NDArray[np.bool_]:
        """For each unit, whether it must stay as it is."""
        return self.owner.frozen[self.start : self.start + self.units]

    @property
    def classes(self) -> Ids:
        """For each unit, a number that is equal for units with the same readers and writers.

        A ``chunk`` gives the halves of a layer's output to different readers: two classes. Numbers rise from 0.
        """
        return _numbered(self.owner.access[self.start : self.start + self.units])

    @property
    def segments(self) -> Ids:
        """For each unit, a number that is equal for units with the same writers: the parts of a concatenation that
        is added to something have different ones. Coarser than `classes`."""
        return _numbered(self.owner.writers[self.start : self.start + self.units])

    @property
    def mixed(self) -> tuple[str, ...]:
        """Layers that normalise over the group, so that copies are exact only in equal numbers."""
        return self._touched(self.owner.mixed)

    @property
    def single(self) -> tuple[str, ...]:
        """Ops that contract the group with itself, so that no copies can be made."""
        return self._touched(self.owner.single)

    def permutation(self, seed: int = 0) -> list[int]:
        """A random admissible permutation of ``range(units)``: any within a class, frozen units in their place.

        It moves something wherever something can be moved.
        """
        random = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        index = np.arange(self.units)
        for number in np.unique(self.classes):
            places = np.flatnonzero((self.classes == number) & ~self.frozen)
            order = random.permutation(places)
            index[places] = np.roll(places, 1) if np.array_equal(order, places) else order
        return [int(i) for i in index]

    def why(self, a: str | Member, b: str | Member) -> list[str]:
        """The path of ops that ties two members, ``a`` and ``b`` included.

        Members are given as in ``str(member)`` (``"fc.weight[1]"``), or by a parameter's or layer's name.
        """
        return self.owner.path(self._member(a), self._member(b))

    def _member(self, which: str | Member) -> Member:
        if isinstance(which, Member):
            return which
        for named in ({str(m): m for m in reversed(self.members)}, {m.name: m for m in reversed(self.members)},
                      {m.layer: m for m in reversed(self.members)}):  # fmt: skip
            if which in named:
                return named[which]
        raise unknown_name(f"member of group {self.name!r}", which, map(str, self.members))

    def _touched(self, axes: list[tuple[Ids, str]]) -> tuple[str, ...]:
        stop = self.start + self.units
        return tuple(dict.fromkeys(what for units, what in axes if ((units >= self.start) & (units < stop)).any()))


class Analysis:
    """What the analysis of one traced module found: its units, and the groups they fall into."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        component = settle(findings)
        axes = list(findings.axes.values())
        for axis in axes:
            if not axis.roles:
                axis.roles.add("per-channel" if (axis.name, axis.axis) in findings.values else "producer")
        order, ranges, chosen = _number(component, axes)
        self.unit_of: Ids = order[component]
        self.count = int(order.max(initial=-1)) + 1
        self.axis_units = {(a.name, a.axis): self.unit_of[a.ids] for a in axes}
        frozen = [*findings.frozen, (self._constants(findings), "values of a buffer")]
        for left, right, _, what in findings.rows:
            frozen.append((left[self.unit_of[left] == self.unit_of[right]], what))
        self.frozen, self.unread = self._frozen(findings, frozen)
        self.mixed = [(self.unit_of[ids], what) for ids, what in findings.mixed]
        self.single = [(self.unit_of[ids], what) for ids, what in findings.single]
        for a in axes:
            if "consumer" in a.roles and (len(a.roles) > 1 or (a.name, a.axis) in findings.values):
                self.single.append((self.unit_of[a.ids], f"{a.name} is contracted over and used in another way"))
        cuts = [self.unit_of[ids] for ids in findings.cuts]
        held = [self.axis_units[a.name, a.axis] for a in axes]
        written = [u for u, a in zip(held, axes, strict=True) if "producer" in a.roles]
        self.writers = self._signature(written)
        self.access = self._signature([*held, *cuts])
        self.fence = self._differs(ranges)
        crossed = [(self._crossed(*row), what) for *row, what in findings.rows]
        if any(len(ids) for ids, _ in crossed):
            frozen += crossed
            self.frozen, self.unread = self._frozen(findings, frozen)
            self.writers = self._signature(written)
            self.access = self._signature([*held, *cuts])
            self.fence = self._differs(ranges)
        self.groups = self._groups(findings, axes, ranges, chosen, frozen)

    def find(self, name: str) -> DimensionGroup:
        """The group of that name, or the one that a layer of that name writes."""
        group = next((g for g in self.groups if g.name == name), None) or self.layers.get(name)
        if group is None:
            raise unknown_name("layer", name, [*self.layers, *(g.name for g in self.groups)])
        return group

    @cached_property
    def layers(self) -> dict[str, DimensionGroup]:
        """Groups by the names of the layers, parameters and parameter axes that write or carry them."""
        names: dict[str, DimensionGroup] = {}
        for role in ("producer", "both", "per-channel"):
            for group in self.groups:
                for member in group.members:
                    if member.role == role:
                        for name in (member.layer, member.name, str(member)):
                            names.setdefault(name, group)
        return names

    @cached_property
    def graph(self) -> nx.Graph:
        """Axes of parameters and activations, joined by the ops that tie them."""
        graph = nx.Graph()
        for a, b, op in self.findings.edges:
            graph.add_edge(a, b, op=op)
        return graph

    def path(self, a: Member, b: Member) -> list[str]:
        """Ops on the shortest path between two parameter axes."""
        ends = [("param", m.name, m.axis) for m in (a, b)]
        try:
            nodes = nx.shortest_path(self.graph, *ends)
        except (nx.NetworkXNoPath, nx.NodeNotFound) as error:
            raise UsageError(f"nothing ties {a} to {b}") from error
        ops = [self.graph.edges[pair]["op"] for pair in itertools.pairwise(nodes)]
        return [str(a), *(op for k, op in enumerate(ops) if k == 0 or op != ops[k - 1]), str(b)]

    def _crossed(self, left: Ids, right: Ids, first: Ids) -> Ids:
        """Of the last channels of rows, those that the first of the row behind them continues although rows are alike:
        a run of units would pass from one row to the next."""
        unit, behind, own = (self.unit_of[ids] for ids in (left, right, first))
        return np.asarray(left[(behind == unit + 1) & (behind == own) & ~self.fence[behind]], dtype=np.int64)

    def _constants(self, findings: Findings) -> Ids:
        """Ids of buffers' axes that no parameter writes or scales."""
        learned = np.zeros(self.count, dtype=bool)
        for a in findings.axes.values():
            if a.name not in findings.buffers and a.roles != {"consumer"}:
                learned[self.unit_of[a.ids]] = True
        ids = [a.ids[~learned[self.unit_of[a.ids]]] for a in findings.axes.values() if a.name in findings.buffers]
        return np.concatenate([np.zeros(0, dtype=np.int64), *ids])

    def _frozen(
        self, findings: Findings, reasons: list[tuple[Ids, str]]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Units that a rule froze, or that no layer contracts over; and the latter alone."""
        frozen = np.zeros(self.count, dtype=bool)
        for ids, _ in reasons:
            frozen[self.unit_of[ids]] = True
        read = np.zeros(self.count, dtype=bool)
        for axis in findings.axes.values():
            if "consumer" in axis.roles:
                read[self.axis_units[axis.name, axis.axis]] = True
        for ids in findings.contracted:
            read[self.unit_of[ids]] = True
        return frozen | ~read, ~read & ~frozen

    def _signature(self, sets: list[Ids]) -> NDArray[np.uint64]:
        """For each unit, a number that stands for which of ``sets`` hold it and whether it is frozen."""
        marks = np.random.default_rng(0).integers(1, 2**62, size=len(sets), dtype=np.uint64)
        signature = np.zeros(self.count, dtype=np.uint64)
        with np.errstate(over="ignore"):
            for units, mark in zip(sets, marks, strict=True):
                np.add.at(signature, units, mark)
        signature ^= self.frozen
        return signature

    def _differs(self, ranges: list[tuple[int, int]]) -> NDArray[np.bool_]:
        """For each unit, whether other axes hold it than hold the unit before it."""
        differs = np.ones(self.count, dtype=bool)
        differs[1:] = self.access[1:] != self.access[:-1]
        differs[[start for start, _ in ranges]] = True
        return differs

    def _groups(
        self,
        findings: Findings,
        axes: list[ParamAxis],
        ranges: list[tuple[int, int]],
        first: list[ParamAxis],
        frozen: list[tuple[Ids, str]],
    ) -> tuple[DimensionGroup, ...]:
        group_of = np.full(self.count, -1, dtype=np.int64)
        for k, (start, stop) in enumerate(ranges):
            group_of[start:stop] = k
        members: list[list[Member]] = [[] for _ in ranges]
        for axis in axes:
            member = Member(axis.name, axis.axis, _role(axis))
            for k in np.unique(group_of[self.axis_units[axis.name, axis.axis]]):
                members[k].append(member)
        reasons: list[dict[str, None]] = [{} for _ in ranges]
        for ids, reason in frozen:
            for k in np.unique(group_of[self.unit_of[ids]]):
                if k >= 0:
                    reasons[k][reason] = None
        groups: list[DimensionGroup] = []
        for k, (start, stop) in enumerate(ranges):
            if all(member.name in findings.buffers for member in members[k]):
                continue
            if self.unread[start:stop].any():
                reasons[k]["no layer contracts over it"] = None
            held = self.axis_units[first[k].name, first[k].axis]
            held = held[group_of[held] == k]
            size = (stop - start) * len(held) // max(len(np.unique(held)), 1)
            named = Member(first[k].name, first[k].axis, "")
            name = f"input of {named.layer}" if first[k].roles == {"consumer"} else named.layer
            if name in {g.name for g in groups}:
                name = str(named)
            editable = not self.frozen[start:stop].all()
            reason = "; ".join(reasons[k])
            groups.append(DimensionGroup(name, size, stop - start, tuple(members[k]), editable, reason, start, self))
        return tuple(groups)


def _numbered(signature: NDArray[np.uint64]) -> Ids:
    """Numbers from 0 in the order of first appearance."""
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse], dtype=np.int64)


def _role(axis: ParamAxis) -> str:
    if {"producer", "consumer"} <= axis.roles:
        return "both"
    return next(r for r in ("producer", "consumer", "per-channel") if r in axis.roles)


@dataclass(frozen=True, eq=False)
class Remembered:
    """An analysis, and the state of the graphs that it is of. It does not go with a copy of the module."""

    state: tuple[int, ...]
    analysis: Analysis

    def __reduce__(self) -> Any:
        return type(None), ()


def analyse(module: nn.Module) -> Analysis:
    """The analysis behind `dimension_groups`, computed once for each traced module and state of its graphs.

    It is kept with the module, not in a table: it refers to the graphs, and so to the module and its weights.
    """
    known = info(module)
    state = tuple(len(g.nodes) for _, part in traced_parts(module) for g in part.graphs)
    found: Remembered | None = module.__dict__.get("_dimensions")
    if found is None or found.state != state:
        inputs = example_inputs(module, batch_size=None)
        found = Remembered(state, Analysis(collect_findings(module, *inputs, known.modes)))
        module.__dict__["_dimensions"] = found
    return found.analysis


def _number(component: Ids, axes: list[ParamAxis]) -> tuple[Ids, list[tuple[int, int]], list[ParamAxis]]:
    """Number the components so that each group is a range.

    Axes that are written and share a component are in one group. A layer that normalises or reads a concatenation does
    not tie its parts together.

    Returns:
        the new number of each component, the range of each group, and the axis that each group is named after.
    """
    total = int(component.max(initial=-1)) + 1
    written = [a for a in axes if "producer" in a.roles]
    carried = [a for a in axes if "producer" not in a.roles and a.roles != {"consumer"}]
    read = [a for a in axes if a.roles == {"consumer"}]
    order = np.full(total, -1, dtype=np.int64)
    ranges: list[tuple[int, int]] = []
    first: list[ParamAxis] = []
    count = 0
    for pool in (written, carried, read):
        pool = [a for a in pool if (order[component[a.ids]] < 0).any()]
        for axes_of_group in _sharing(component, pool, total):
            seen = np.concatenate([component[a.ids] for a in axes_of_group])
            values, at = np.unique(seen, return_index=True)
            values = values[np.argsort(at)]
            values = values[order[values] < 0]
            order[values] = np.arange(count, count + len(values))
            ranges.append((count, count + len(values)))
            first.append(axes_of_group[0])
            count += len(values)
    rest = np.flatnonzero(order < 0)
    order[rest] = np.arange(count, count + len(rest))
    return order, ranges, first


def _sharing(component: Ids, pool: list[ParamAxis], total: int) -> list[list[ParamAxis]]:
    """The axes in lists, so that axes of different lists share no component; in the order of the first of each."""
    if not pool:
        return []
    row = np.repeat(np.arange(len(pool)), [a.ids.size for a in pool])
    column = len(pool) + np.concatenate([component[a.ids] for a in pool])
    size = len(pool) + total
    graph = coo_array((np.ones(len(row), dtype=np.int8), (row, column)), shape=(size, size))
    label = connected_components(graph, directed=False)[1][: len(pool)]
    lists: dict[int, list[ParamAxis]] = {}
    for axis, number in zip(pool, label, strict=False):
        lists.setdefault(int(number), []).append(axis)
    return list(lists.values())


def settle(findings: Findings) -> Ids:
    """Decide for every grid, add what follows to the findings, and number the connected components of all ids."""
    component = components(findings)
    undecided = findings.grids
    while undecided:
        free = [_free_axes(component[grid.ids]) for grid in undecided]
        left = [grid for grid, axes in zip(undecided, free, strict=True) if len(axes) > 1]
        for grid, axes in zip(undecided, free, strict=True):
            if len(axes) <= 1:
                _fix(findings, grid, *axes)
        if len(left) == len(undecided):
            for grid in left:
                rows = grid.ids.reshape(-1, grid.ids.shape[-1])
                _tie(findings, rows[:1], rows)
        undecided = left
        component = components(findings)
    return component


def components(findings: Findings) -> Ids:
    """For each id the number of its connected component under the ties."""
    if not findings.ties:
        return np.arange(findings.count, dtype=np.int64)
    a = np.concatenate([t[0] for t in findings.ties])
    b = np.concatenate([t[1] for t in findings.ties])
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(findings.count, findings.count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _free_axes(component: Ids) -> list[int]:
    """The axes along which positions are not all one."""
    return [k for k in range(component.ndim) if (component != component.take([0], axis=k)).any()]


def _fix(findings: Findings, grid: Grid, axis: int | None = None) -> None:
    for number, ids in grid.partners:
        if number == axis:
            _tie(findings, np.moveaxis(grid.ids, axis, -1), ids)
        else:
            findings.frozen.append((ids, f"{grid.what} shares it among heads, or other parts of an axis"))
    before = math.prod(grid.ids.shape[:axis]) if axis else 1
    if before > 1:
        rows = grid.ids.reshape(before, -1)
        what = f"{grid.what} reads parts of it that cannot be told apart"
        findings.rows.append((rows[:-1, -1], rows[1:, 0], rows[:-1, 0], what))


def _tie(findings: Findings, a: Ids, b: Ids) -> None:
    x, y = np.broadcast_arrays(a, b)
    findings.ties.append((x.ravel(), y.ravel()))
