"""How much each unit of a dimension group is worth keeping."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.errors import unknown_name
from surgery.settings import IMPORTANCE

Scores = NDArray[np.float64]


def unit_scores(module: nn.Module, analysis: Analysis, importance: str) -> dict[DimensionGroup, Scores]:
    """A score for each unit of each group, the larger the more it is worth keeping; of equal ones the first is kept.

    ``"prefix"`` scores all alike. ``"magnitude"`` is DepGraph's group importance with the L2 norm (Fang et al., CVPR
    2023, section 3.3): the squared weights that go with a unit, in every parameter of the group and in units of their
    mean over the units, averaged over the parameters.

    Raises `UsageError` for another importance.
    """
    if importance not in IMPORTANCE:
        raise unknown_name("importance", importance, IMPORTANCE)
    scores = {group: np.zeros(group.units) for group in analysis.groups}
    if importance == "prefix":
        return scores
    parameters = dict(module.named_parameters())
    for group in analysis.groups:
        for member in group.members:
            if member.name not in parameters:
                continue
            weight = parameters[member.name].detach().double().square().movedim(member.axis, 0)
            along = weight.reshape(len(weight), -1).sum(1).cpu().numpy()
            units = analysis.axis_units[member.name, member.axis] - group.start
            held = (units >= 0) & (units < group.units)
            found = np.bincount(units[held], weights=along[held], minlength=group.units)
            if found.mean() > 0:
                scores[group] += found / found.mean() / len(group.members)
    return scores
