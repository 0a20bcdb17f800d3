"""The findings about a module: what the rules say about ties, frozen ids, roles, norms and factored axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from surgery.axes.labels import Field, Fields, Ids, Labelled, Pairing
from surgery.axes.network_outputs import NetworkOutput
from surgery.graph.outputs import leaves_in
from surgery.graph.rule_table import NodeEdit


class Reason(str):
    """Why channels must stay as they are; and the line of the model's Python that is so, where it is known."""

    line: str = ""

    @classmethod
    def at(cls, text: str, line: str) -> Reason:
        found = cls(text)
        found.line = line
        return found


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation over channels."""

    path: str
    """Of its layer; empty for a function."""
    key: tuple[str, str]
    """Scope and node."""
    shape: tuple[int, ...]
    """Of its weight, or of what a weight would be."""
    dims: tuple[int, ...]
    """Those of its dims along which the channels lie."""
    ids: Ids


@dataclass(frozen=True, eq=False)
class Grid:
    """Several axes. Only one of them may change."""

    ids: Ids
    """Their positions' ids, in the shape of the axes."""
    what: str
    """The op that needs it."""
    partners: tuple[tuple[int, Ids], ...] = ()
    """Axes of other tensors that run along one of these: its number, and their ids. Where it is the one that may
    change they change with it, and otherwise not at all."""


ParamKey = tuple[str, int]
"""Qualified name of a parameter or buffer, and an axis of it."""

Row = tuple[Ids, Ids, Ids, str]
"""Rows that must stay rows: the last id of each, the first of the one behind it, its own first; and for which op."""


NodeKey = tuple[str, str]
"""Scope (path of the traced module and which of its graphs) and node name."""


@dataclass
class ParamAxis:
    """An axis of a parameter or buffer: its positions' ids and what the ops that use it do with it."""

    name: str
    axis: int
    ids: Ids
    roles: set[str] = field(default_factory=set)


@dataclass
class Uses:
    """How often an attribute with axes of size 1 is used: in all, and as a parameter, whose axes are channels."""

    all: int = 0
    as_parameter: int = 0


@dataclass(frozen=True)
class Called:
    """A call of a layer by Python that is not traced."""

    path: str
    node: fx.Node
    """Stands for the call, in no graph that is run."""
    rewrite: Callable[[NodeEdit], None]
    args: tuple[Any, ...]
    outs: tuple[Labelled, ...]
    """The tensors that it gives."""

    @property
    def labels(self) -> tuple[Labelled, ...]:
        """The tensors that it takes and gives."""
        return *labelled_leaves(self.args), *self.outs


@dataclass
class Findings:
    """Everything the rules said."""

    count: int = 0
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    mixed: list[tuple[Ids, str]] = field(default_factory=list)
    """Axes that a normalisation computes statistics over: copies must come in equal numbers."""
    norms: list[Norm] = field(default_factory=list)
    """The normalisations that `mixed` tells of."""
    single: list[tuple[Ids, str]] = field(default_factory=list)
    """Axes that are contracted with one another: copies would count twice."""
    sums: list[tuple[NodeKey, Ids]] = field(default_factory=list)
    """Where that is."""
    contracted: list[Ids] = field(default_factory=list)
    """Axes that two activations are contracted over: they are read, though no layer contracts over them."""
    grids: list[Grid] = field(default_factory=list)
    """Axes that factor one (`surgery.axes.factored`)."""
    merged: dict[NodeKey, frozenset[int]] = field(default_factory=dict)
    """Where a reshape merges axes, which of its input's fields stay as they are so that another may change."""
    cuts: list[Ids] = field(default_factory=list)
    """Parts of axes that an op takes out."""
    rows: list[Row] = field(default_factory=list)
    values: set[ParamKey] = field(default_factory=set)
    """Parameter axes that are used other than in a role."""
    axes: dict[ParamKey, ParamAxis] = field(default_factory=dict)
    ones: dict[str, Uses] = field(default_factory=dict)
    """By name, attributes with axes of size 1, which most functions spread over whatever they meet."""
    buffers: frozenset[str] = frozenset()
    """Names of the tensors that are no parameters."""
    edges: list[tuple[Any, Any, str]] = field(default_factory=list)
    nodes: dict[NodeKey, Any] = field(default_factory=dict)
    """For each node its output, with a `Labelled` for each tensor."""
    graphs: dict[str, tuple[str, fx.Graph]] = field(default_factory=dict)
    """For each scope the path of its module and the graph."""
    outputs: list[NetworkOutput] = field(default_factory=list)
    """What the network returns, in each mode."""
    behind: list[tuple[Ids, str]] = field(default_factory=list)
    """What freezes outputs that may change; where they may not, it is not said."""
    calls: list[Called] = field(default_factory=list)
    """Layers that Python outside the graphs calls, as far as their attributes follow an edit."""

    def close(self) -> None:
        """Freeze axes of size 1 that are channels for some functions alone; make the arrays read-only that are handed
        on."""
        for (name, _), axis in self.axes.items():
            uses = self.ones.get(name)
            if uses is not None and uses.all != uses.as_parameter and len(axis.ids) == 1:
                why = "an attribute with one number is a parameter for it, and is used elsewhere"
                self.frozen.append((axis.ids, Reason(why)))
        fields = (f.ids for value in labelled_leaves(list(self.nodes.values())) for f in value.fields)
        for ids in (*fields, *(ids for _, ids in self.sums), *(norm.ids for norm in self.norms)):
            ids.flags.writeable = False


def pair(a: Ids, b: Ids) -> tuple[Ids, Ids]:
    """Both arrays flat, in the shape that they broadcast to. (`numpy.broadcast_arrays` does not take those of which
    `Findings.close` has closed the array that they are a view of.)"""
    shape = np.broadcast_shapes(a.shape, b.shape)
    return np.broadcast_to(a, shape).ravel(), np.broadcast_to(b, shape).ravel()


class Ledger:
    """Receives what rules say and writes it into the findings."""

    whole = places = False
    line = ""
    """The line of the model's Python that the op which is looked at stands for."""
    pairing: Pairing | None = None
    """How reshapes label their results: see `surgery.axes.labels.reshape_fields`."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def tensor(self, value: torch.Tensor | None, dims: Iterable[int] | None = None) -> Labelled | None:
        """A parameter or buffer, with as many of its axes labelled as this ledger knows."""
        return None if value is None else Labelled(value)

    def parameter(self, given: Labelled, dims: int) -> Labelled:
        """What a function is given as a parameter. Its axes of size 1, which other functions spread over whatever they
        meet, are channels here, as a layer's are: the first ``dims`` are labelled."""
        return given

    def unmerged(self, fields: Fields) -> Fields:
        """The fields of a reshape's input that its output holds, as far as that is known."""
        return fields

    def fresh(self, size: int) -> Ids:
        ids = np.arange(self.findings.count, self.findings.count + size, dtype=np.int64)
        self.findings.count += size
        return ids

    def tie(self, a: Field, b: Field, why: str) -> None:
        self.tie_ids(a.ids, b.ids)
        self.edge(a.key, b.key, why)

    def tie_ids(self, a: Ids, b: Ids) -> None:
        self.findings.ties.append(pair(a, b))

    def freeze(self, ids: Ids, reason: str) -> None:
        self.findings.frozen.append((ids.ravel(), Reason.at(reason, self.line)))

    def edge(self, a: Any, b: Any, why: str) -> None:
        if a is not None and b is not None and a != b:
            self.findings.edges.append((a, b, why))


def labelled_leaves(tree: Any) -> Iterable[Labelled]:
    """Every `Labelled` in a value, whatever holds it."""
    return (tree,) if isinstance(tree, Labelled) else [leaf for _, leaf in leaves_in(tree, Labelled)]


class Silent(Ledger):
    """Takes the place of a run where only a rule's output is wanted: it drops what the rule says."""

    whole = True

    def __init__(self, pairing: Pairing, *, places: bool = False, gone: frozenset[int] = frozenset()) -> None:
        super().__init__(Findings())
        self.pairing, self.places, self.gone = pairing, places, gone

    def unmerged(self, fields: Fields) -> Fields:
        return tuple(f for k, f in enumerate(fields) if k not in self.gone)

    def fresh(self, size: int) -> Ids:
        return np.full(size, -1, dtype=np.int64)

    def tie_ids(self, a: Ids, b: Ids) -> None: ...
