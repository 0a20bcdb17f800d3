"""Dimension groups: the axes that must change together, and the channels in them that can be chosen one by one."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.axes.labels import Ids
from surgery.axes.ledger import Findings, ParamKey
from surgery.axes.numbering import Named, Numbering
from surgery.errors import UsageError, unknown_name
from surgery.graph.rule_table import layer_tensors

Edge = tuple[Any, Any, str]
"""Two axes of parameters or activations, and the op that ties them."""


@dataclass(frozen=True)
class Member:
    """An axis of a parameter (or buffer) in a group.

    Example:
        >>> str(Member("fc.weight", 1, "consumer"))
        'fc.weight[1]'
    """

    name: str
    """Qualified name, as in the state dict."""
    axis: int
    role: str
    """``producer`` (the layer writes the channels), ``consumer`` (it contracts over them) or ``per-channel``;
    ``both`` for an axis that is written and read."""

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
        start: number of the first unit among those of the whole module.
        frozen: for each unit, whether it must stay as it is.
        mixed: layers that normalise over the group, so that copies are exact only in equal numbers.
        single: ops that contract the group with itself, so that no copies can be made.

    Example:
        >>> traced = surgery.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(5, 3))
        >>> group = surgery.dimension_groups(traced)[0]
        >>> group.name, group.units, [str(member) for member in group.members]
        ('0', 4, ['0.weight[0]', '0.bias[0]', '2.weight[1]'])
    """

    name: str
    size: int
    units: int
    members: tuple[Member, ...]
    editable: bool
    reason: str
    start: int = field(repr=False)
    frozen: NDArray[np.bool_] = field(repr=False)
    mixed: tuple[str, ...] = field(repr=False)
    single: tuple[str, ...] = field(repr=False)
    access: NDArray[np.uint64] = field(repr=False)
    writers: NDArray[np.uint64] = field(repr=False)
    edges: Sequence[Edge] = field(repr=False)

    @cached_property
    def classes(self) -> Ids:
        """For each unit, a number that is equal for units with the same readers and writers.

        A ``chunk`` gives the halves of a layer's output to different readers: two classes. Numbers rise from 0.
        """
        return _renumber(self.access)

    @cached_property
    def segments(self) -> Ids:
        """For each unit, a number that is equal for units with the same writers: the parts of a concatenation that
        is added to something have different ones. Coarser than `classes`."""
        return _renumber(self.writers)

    @cached_property
    def free(self) -> tuple[tuple[Ids, ...], ...]:
        """The units that may be dropped: of each segment, those of each class."""
        found = []
        for segment in np.unique(self.segments):
            units = np.flatnonzero((self.segments == segment) & ~self.frozen)
            classes = self.classes[units]
            found.append(tuple(units[classes == c] for c in np.unique(classes)))
        return tuple(parts for parts in found if parts)

    def permutation(self, seed: int = 0) -> list[int]:
        """Draw an admissible permutation: any within a class, with frozen units in their place.

        It moves something wherever something can be moved.

        Returns:
            a permutation of ``range(units)``, as `surgery.reindex` takes it.
        """
        random = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        index, classes = np.arange(self.units), self.classes
        for number in np.unique(classes):
            places = np.flatnonzero((classes == number) & ~self.frozen)
            order = random.permutation(places)
            index[places] = np.roll(places, 1) if np.array_equal(order, places) else order
        return [int(i) for i in index]

    def why(self, a: str | Member, b: str | Member) -> list[str]:
        """Explain why two members change together.

        Args:
            a, b: members, as in ``str(member)`` (``"fc.weight[1]"``), or by a parameter's or layer's name.

        Returns:
            the shortest path of ops that ties them, from ``a`` to ``b``.

        Raises:
            UsageError: a name is not a member's, or nothing ties the two.

        Example:
            >>> group.why("0", "2")
            ['0.weight[0]', '0', '1', '2', '2.weight[1]']
        """
        import networkx as nx  # takes a tenth of a second, and is needed here alone

        first, last = self._member(a), self._member(b)
        graph = nx.Graph()
        for one, other, op in self.edges:
            graph.add_edge(one, other, op=op)
        try:
            nodes = nx.shortest_path(graph, *(("param", m.name, m.axis) for m in (first, last)))
        except (nx.NetworkXNoPath, nx.NodeNotFound) as error:
            raise UsageError(f"nothing ties {first} to {last}") from error
        ops = [graph.edges[pair]["op"] for pair in itertools.pairwise(nodes)]
        return [str(first), *(op for k, op in enumerate(ops) if k == 0 or op != ops[k - 1]), str(last)]

    def _member(self, which: str | Member) -> Member:
        if isinstance(which, Member):
            return which
        for named in ({str(m): m for m in reversed(self.members)}, {m.name: m for m in reversed(self.members)},
                      {m.layer: m for m in reversed(self.members)}):  # fmt: skip
            if which in named:
                return named[which]
        raise unknown_name(f"member of group {self.name!r}", which, map(str, self.members))


def list_groups(findings: Findings, numbering: Numbering) -> tuple[DimensionGroup, ...]:
    """The groups of a numbering, in its order; those that hold buffers alone are left out."""
    group_of = np.full(len(numbering.frozen), -1, dtype=np.int64)
    for k, (start, stop) in enumerate(numbering.ranges):
        group_of[start:stop] = k
    members: list[list[Member]] = [[] for _ in numbering.ranges]
    for (name, axis), units in numbering.axis_units.items():
        member = Member(name, axis, _role(numbering.roles[name, axis]))
        for k in np.unique(group_of[units]):
            members[k].append(member)
    reasons, mixed, single = (
        _by_group(said, group_of, len(members)) for said in (numbering.reasons, numbering.mixed, numbering.single)
    )
    edges = tuple(findings.edges)
    groups: dict[str, DimensionGroup] = {}
    for k, (start, stop) in enumerate(numbering.ranges):
        if all(member.name in findings.buffers for member in members[k]):
            continue
        part = slice(start, stop)
        if numbering.unread[part].any():
            reasons[k]["no layer contracts over it"] = None
        first = numbering.axis_units[numbering.first[k]]
        held = first[group_of[first] == k]
        name = _name(numbering.first[k], numbering.roles, groups)
        groups[name] = DimensionGroup(
            name=name,
            size=(stop - start) * len(held) // max(len(np.unique(held)), 1),
            units=stop - start,
            members=tuple(members[k]),
            editable=not numbering.frozen[part].all(),
            reason="; ".join(reasons[k]),
            start=start,
            frozen=numbering.frozen[part],
            mixed=tuple(mixed[k]),
            single=tuple(single[k]),
            access=numbering.access[part],
            writers=numbering.writers[part],
            edges=edges,
        )
    return tuple(groups.values())


def _role(roles: frozenset[str]) -> str:
    if {"producer", "consumer"} <= roles:
        return "both"
    return next(r for r in ("producer", "consumer", "per-channel") if r in roles)


def _by_group(said: Named, group_of: Ids, count: int) -> list[dict[str, None]]:
    """For each group, the names or reasons that concern any of its units, without repetition."""
    result: list[dict[str, None]] = [{} for _ in range(count)]
    for units, what in said:
        for k in np.unique(group_of[units]):
            if k >= 0:
                result[k][what] = None
    return result


def _name(first: ParamKey, roles: Any, taken: Any) -> str:
    """The name of a group after its first axis: the layer's, if no group before it has that name."""
    member = Member(*first, "")
    name = f"input of {member.layer}" if roles[first] == {"consumer"} else member.layer
    return str(member) if name in taken else name


def _renumber(signature: NDArray[np.uint64]) -> Ids:
    """Numbers from 0 in the order of first appearance."""
    _, first, inverse = np.unique(signature, return_index=True, return_inverse=True)
    numbers = np.asarray(np.argsort(np.argsort(first))[inverse], dtype=np.int64)
    numbers.setflags(write=False)
    return numbers
