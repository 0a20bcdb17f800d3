"""The analysis of a traced module: which units it has, the groups they fall into, and where they are in its graphs.

`analyse` is called once in an operation, and what it returns is handed on. It is a value: nothing changes it, and a
change of the module makes `analyse` return another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from surgery.axes.factored import settle
from surgery.axes.groups import DimensionGroup, list_groups
from surgery.axes.labels import Ids
from surgery.axes.ledger import Called, Findings, Grid, NodeKey, Norm, ParamKey
from surgery.axes.network_outputs import NetworkOutput, Outputs, match_outputs, parse_outputs
from surgery.axes.numbering import Named, number_units
from surgery.axes.state import State, read_state
from surgery.axes.untraced import collect_findings
from surgery.errors import unknown_name
from surgery.graph.traced import example_inputs, info


def dimension_groups(module: nn.Module, *, outputs: Outputs = None) -> list[DimensionGroup]:
    """List the dimension groups of a traced module. The module is not changed.

    Args:
        module: a traced module.
        outputs: the outputs that may change, as for `surgery.slim`.

    Returns:
        the groups in the order of the forward pass. Every axis of every parameter that holds channels is in some
        group; groups that cannot be edited are listed too, with the reason.

    Raises:
        UsageError: ``module`` is not a traced module, or has no output of that name.
        TraceError: it no longer runs on inputs like those it was traced with.

    Example:
        >>> traced = surgery.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.rand(5, 3))
        >>> [(group.name, group.editable, group.reason) for group in surgery.dimension_groups(traced)]
        [('0', True, ''), ('2', False, 'network output; no layer contracts over it'), …]
    """
    return list(analyse(module, parse_outputs(outputs)).groups)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of the axes of one traced module, in one state of it.

    Attributes:
        groups: the dimension groups.
        count: how many units there are, including those that are in no group.
        unit_of: the unit of each id that a `Field` of `values` holds.
        axis_units: the units along each axis of a parameter or buffer.
        roles: for each of these axes what the ops do with it: ``producer``, ``consumer``, ``per-channel``.
        frozen: for each unit, whether it must stay as it is.
        written: for each unit, whether a layer writes it, as it does channels.
        fence: for each unit, whether a run of units must not pass from the one before it to it.
        reasons: units that must stay as they are by a rule, and why.
        mixed: units over which a normalisation computes statistics, and the layer.
        single: units that are contracted with one another, and the op.
        norms: the normalisations that `mixed` tells of.
        sums: the nodes that add something up over the units of the given ids.
        values: the output of each node, with a `Labelled` for each tensor.
        merged: for reshapes that merge axes, the fields of the input, by number, that their output does not hold.
        graphs: for each scope the path of its module and the graph.
        calls: layers that Python outside the graphs calls, as far as their attributes follow an edit.
        outputs: what the network returns.
    """

    groups: tuple[DimensionGroup, ...]
    count: int
    unit_of: Ids
    axis_units: Mapping[ParamKey, Ids]
    roles: Mapping[ParamKey, frozenset[str]]
    frozen: NDArray[np.bool_]
    written: NDArray[np.bool_]
    fence: NDArray[np.bool_]
    reasons: Named
    mixed: Named
    single: Named
    norms: tuple[Norm, ...]
    sums: tuple[tuple[NodeKey, Ids], ...]
    values: Mapping[NodeKey, Any]
    merged: Mapping[NodeKey, frozenset[int]]
    graphs: Mapping[str, tuple[str, fx.Graph]]
    calls: tuple[Called, ...]
    outputs: tuple[NetworkOutput, ...]

    def find(self, name: str) -> DimensionGroup:
        """The group of that name, or the one that a layer of that name writes.

        Raises:
            UsageError: there is none.
        """
        group = next((g for g in self.groups if g.name == name), None) or self.layers.get(name)
        if group is None:
            raise unknown_name("layer", name, [*self.layers, *(g.name for g in self.groups)])
        return group

    def is_output(self, group: DimensionGroup) -> bool:
        """Whether the network returns any of a group's channels."""
        held = (self.unit_of[f.ids] for output in self.outputs for f in output.value.fields)
        return any(((units >= group.start) & (units < group.start + group.units)).any() for units in held)

    @cached_property
    def layers(self) -> Mapping[str, DimensionGroup]:
        """Groups by the names of the layers, parameters and parameter axes that write or carry them."""
        names: dict[str, DimensionGroup] = {}
        for role in ("producer", "both", "per-channel"):
            for group in self.groups:
                for member in group.members:
                    if member.role == role:
                        for name in (member.layer, member.name, str(member)):
                            names.setdefault(name, group)
        return MappingProxyType(names)


def analyse(module: nn.Module, free: tuple[str, ...] = ()) -> Analysis:
    """Analyse a traced module, or return an earlier analysis of it if nothing that it depends on has changed.

    The analysis is kept with the module, not in a table: it refers to the graphs, and so to the module and its weights.

    Args:
        free: the outputs that may change (`surgery.axes.network_outputs.parse_outputs`).
    """
    state = read_state(module)
    known: Remembered | None = module.__dict__.get("_analysis")
    if known is None or known.state != state:
        known = module.__dict__["_analysis"] = Remembered(state, {})
    if free not in known.analyses:
        known.analyses[free] = _analyse(module, free)
    return known.analyses[free]


def _analyse(module: nn.Module, free: tuple[str, ...]) -> Analysis:
    # A batch of one cannot be told from other axes of size 1, nor a batch times heads from the heads.
    args, kwargs = example_inputs(module, batch_size=2 if info(module).batched else None)
    findings = collect_findings(module, args, kwargs, info(module).modes)
    findings.close()
    freed = match_outputs(free, (output.name for output in findings.outputs))
    settled = settle(findings, _output_grids(findings, freed))
    numbering = number_units(findings, settled, freed)
    return Analysis(
        groups=list_groups(findings, numbering),
        count=len(numbering.frozen),
        unit_of=numbering.unit_of,
        axis_units=numbering.axis_units,
        roles=numbering.roles,
        frozen=numbering.frozen,
        written=numbering.written,
        fence=numbering.fence,
        reasons=numbering.reasons,
        mixed=numbering.mixed,
        single=numbering.single,
        norms=tuple(findings.norms),
        sums=tuple(findings.sums),
        values=MappingProxyType(findings.nodes),
        merged=MappingProxyType(findings.merged),
        graphs=MappingProxyType(findings.graphs),
        calls=tuple(findings.calls),
        outputs=tuple(findings.outputs),
    )


def _output_grids(findings: Findings, freed: Collection[str]) -> list[Grid]:
    """The axes of free outputs that factor one: only one of them may change, so that the output stays a tensor."""
    free = (output for output in findings.outputs if output.name in freed)
    return [Grid(f.ids, f"output {o.name!r}") for o in free for f in o.value.fields if len(f.dims) > 1]


@dataclass(frozen=True, eq=False)
class Remembered:
    """The analyses of one state of a module, by the outputs that may change. A copy of it does not take them along."""

    state: State
    analyses: dict[tuple[str, ...], Analysis]

    def __reduce__(self) -> Any:
        return type(None), ()
