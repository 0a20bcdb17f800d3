"""Masks of parameters: bool tensors by name, kept apart from the module."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.errors import UsageError, unknown_name
from surgery.graph.traced import named_tensors
from surgery.selectors import Where, each_selector, matches
from surgery.settings import IMPORTANCE


def by_first_name(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks on their parameters' devices, those of tied parameters once, under the first name.

    Raises:
        UsageError: a mask for no parameter, of another shape, or not of bools; or two for one tied parameter.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None:
            raise unknown_name("parameter", name, parameters)
        if mask.shape != parameter.shape:
            raise UsageError(f"mask of {name!r} has shape {tuple(mask.shape)}, not {tuple(parameter.shape)}")
        if mask.dtype != torch.bool:
            raise UsageError(f"mask of {name!r} must hold bools, not {mask.dtype}")
        own, mask = first[id(parameter)], mask.to(parameter.device)
        if own in found and not torch.equal(found[own], mask):
            raise UsageError(f"{name!r} is tied to another parameter, and their masks differ")
        found[own] = mask
    return found


def tensors_of(module: nn.Module, where: Where) -> set[int]:
    """Ids of the parameters and buffers that selectors name, or that stand in the layers they name.

    Raises:
        UsageError: a selector matches nothing.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    known = named_tensors(module)
    names = {name for s in each_selector(where) for name in matches(modules, s, known, "layer or parameter")}
    return {id(t) for n, t in known.items() if n in names or any(n.startswith(f"{name}.") for name in names)}


def largest(scores: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of ``scores``, (n,); of equal ones at the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - count + 1).values
    keep = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return keep


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
