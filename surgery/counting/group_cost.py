"""What each dimension group carries: the parameters and multiply-accumulates that its channels take."""

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

    ``params`` counts the elements of parameters that lie at one of the group's channels along any axis, each once: all
    that would go with the channels. ``macs`` is their part of their layers' multiply-accumulates, for one sample.

    A weight lies between two groups and counts for both, so the figures of all groups add up to more than the model's.
    Products of activations with each other, as in attention, belong to no weight and so to no group.
    """

    params: int
    macs: int


def group_costs(
    module: nn.Module, groups: list[DimensionGroup], macs: Mapping[str, int] | None = None
) -> dict[str, GroupCost]:
    """Count what each dimension group carries, from shapes alone.

    Args:
        module: a traced module.
        groups: its groups, as `surgery.dimension_groups` returns them.
        macs: the result of `surgery.weight_macs`, if known already.

    Returns:
        The parameters and MACs of each group, by its name.

    Example:
        >>> surgery.group_costs(traced, surgery.dimension_groups(traced))["conv1"].macs
    """
    macs = weight_macs(module) if macs is None else macs
    analysis, parameters = analyse(module), dict(module.named_parameters())
    return {group.name: _cost(analysis, group, parameters, macs) for group in groups}


def _cost(
    analysis: Analysis, group: DimensionGroup, parameters: Mapping[str, nn.Parameter], macs: Mapping[str, int]
) -> GroupCost:
    left: dict[str, float] = {}  # for each parameter, the share that lies at none of the group's channels
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
