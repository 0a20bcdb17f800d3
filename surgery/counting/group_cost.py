"""What each dimension group carries: the parameters and the multiply-accumulates that would go with its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.groups import DimensionGroup
from surgery.axes.labels import Ids
from surgery.counting.cost import weight_macs


@dataclass(frozen=True)
class GroupCost:
    """What a dimension group carries.

    ``params`` are the elements of parameters that lie at one of the group's channels along any of their axes, each
    counted once: those that would go if all of its channels went. ``macs`` are the multiply-accumulates, of one sample,
    of these elements: of a layer's MACs, the share of its weight that they are.

    A weight lies between two groups and counts for both, so the figures of all groups add up to more than the model's.
    Products of activations with each other, as in attention, belong to no weight and so to no group.
    """

    params: int
    macs: int


def group_costs(
    module: nn.Module, groups: list[DimensionGroup], macs: Mapping[str, int] | None = None
) -> dict[str, GroupCost]:
    """The cost of each of the ``groups`` of a traced module, by name; read off shapes, nothing is run or slimmed.

    ``macs`` is what `surgery.counting.cost.weight_macs` found, where that is known already.
    """
    macs = weight_macs(module) if macs is None else macs
    analysis, parameters = analyse(module), dict(module.named_parameters())
    return {group.name: _cost(analysis, group, parameters, macs) for group in groups}


def _cost(
    analysis: Analysis, group: DimensionGroup, parameters: Mapping[str, nn.Parameter], macs: Mapping[str, int]
) -> GroupCost:
    left: dict[str, float] = {}
    """For each parameter, the share that lies at none of the group's channels."""
    for member in group.members:
        if member.name in parameters:
            left[member.name] = left.get(member.name, 1.0) * (
                1 - _share(group, analysis.axis_units[member.name, member.axis])
            )
    params = sum(round(parameters[name].numel() * (1 - rest)) for name, rest in left.items())
    carried = sum(round(macs.get(name, 0) * (1 - rest)) for name, rest in left.items())
    return GroupCost(params, carried)


def _share(group: DimensionGroup, units: Ids) -> float:
    """The share of an axis's positions that hold units of the group."""
    own = (units >= group.start) & (units < group.start + group.units)
    return float(np.mean(own)) if units.size else 0.0
