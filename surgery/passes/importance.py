"""Which channels of a group are worth keeping: the first, as KELS has it, or those with the largest weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from surgery.errors import unknown_name
from surgery.graph.dims import DimensionGroup, Dimensions

IMPORTANCE = ("prefix", "magnitude")

Scores = np.ndarray[Any, np.dtype[np.float64]]


def unit_scores(module: nn.Module, dims: Dimensions, importance: str) -> dict[DimensionGroup, Scores]:
    """A score for each unit of each group, the larger the more it is worth keeping; of equal ones the first is kept.

    ``"prefix"`` scores all alike. ``"magnitude"`` is DepGraph's group importance with the L2 norm (Fang et al., CVPR
    2023, section 3.3): the squared weights that go with a unit, in every parameter of the group and in units of their
    mean over the units, averaged over the parameters.

    Raises `UsageError` for another importance.
    """
    if importance not in IMPORTANCE:
        raise unknown_name("importance", importance, IMPORTANCE)
    scores = {group: np.zeros(group.units) for group in dims.groups}
    if importance == "prefix":
        return scores
    parameters = dict(module.named_parameters())
    for group in dims.groups:
        for member in group.members:
            if member.name not in parameters:
                continue
            weight = parameters[member.name].detach().double().square().movedim(member.axis, 0)
            along = weight.reshape(len(weight), -1).sum(1).cpu().numpy()
            units = dims.axis_units[member.name, member.axis] - group.start
            held = (units >= 0) & (units < group.units)
            found = np.bincount(units[held], weights=along[held], minlength=group.units)
            if found.mean() > 0:
                scores[group] += found / found.mean() / len(group.members)
    return scores
