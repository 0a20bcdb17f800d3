"""The masks of KELS and WELS, and the dense network under them.

Knowledge Evolution (Taha, Shrivastava, Davis, CVPR 2021, section 3) splits each layer by a mask into a fit-hypothesis
and a reset-hypothesis. With KELS the mask keeps the first ``ceil(s * n)`` of ``n`` channels, so that the fit-hypothesis
is a network of its own; with WELS it keeps weights at random, wherever they are. Masks are bool tensors by the names of
parameters, kept apart from the module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.groups import DimensionGroup
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.edit.apply import apply
from surgery.edit.switch_off import SwitchOff, mask_text
from surgery.errors import UsageError, unknown_name, whole_number
from surgery.graph.traced import info, named_tensors
from surgery.operations.importance.registry import How
from surgery.operations.slim import Rate, fit_units, valid_rate
from surgery.selectors import Where, each_selector, matches


def split_masks(
    module: nn.Module,
    rate: Rate,
    *,
    kind: str = "kels",
    seed: int = 0,
    round_to: int = 1,
    importance: How = "prefix",
    ranking: str = "local",
    outputs: Outputs = None,
) -> dict[str, torch.Tensor]:
    """The fit-hypothesis as a bool tensor for each parameter (True: kept).

    Args:
        module: a traced module.
        rate: the split rate, as for `slim`; for WELS a single one.
        kind: ``"kels"``: the channels that `slim` keeps. ``"wels"``: of each weight of two or more dimensions exactly
            ``ceil(s * numel)`` entries, drawn without replacement; vectors are kept whole.
        seed: of the draw, at least 0; KELS draws nothing.
        round_to, importance, ranking, outputs: which channels the fit-hypothesis has, as in `slim`; for KELS alone.

    Returns:
        by qualified name, tied parameters under each of theirs.

    Raises:
        UsageError: a rate outside (0, 1], an unknown kind, importance, ranking or output, scores as for `slim`, or
            several rates for WELS.

    Example:
        >>> masks = surgery.split_masks(traced, 0.5, kind="wels", seed=1)
        >>> masks["conv1.weight"].shape == traced.conv1.weight.shape
        True
    """
    seed = whole_number("seed", seed, 0)
    if kind == "kels":
        analysis = analyse(module, parse_outputs(outputs))
        return _kels_masks(module, analysis, fit_units(analysis, module, rate, round_to, importance, ranking))
    if kind == "wels":
        info(module)
        if isinstance(rate, Mapping):
            raise UsageError("WELS takes one rate for the whole network")
        if importance != "prefix" or ranking != "local":
            raise UsageError("importance is of channels: leave it out for WELS, which keeps scattered weights")
        if outputs is not None:
            raise UsageError("outputs are of channels: leave them out for WELS, which keeps scattered weights")
        return _wels_masks(module, valid_rate(rate), seed)
    raise unknown_name("kind of mask", kind, ["kels", "wels"])


def masked(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> nn.Module:
    """The dense module with its reset-hypothesis switched off: a copy whose masked entries are zero.

    A LayerNorm or GroupNorm of the copy computes its statistics over the channels that the masks keep in part or whole.
    Sums over channels (a product of two activations) run over the same channels. The recipe of the copy
    has a step for it (`surgery.SwitchOff`), so that it can be saved.

    Args:
        module: a traced module.
        masks: for parameters, by name, a bool tensor of their shape (True: kept).

    Returns:
        a new module.

    Raises:
        UsageError: a mask for no parameter, of another shape, or not of bools; or two for one tied parameter.
        EditError: a norm whose statistics cannot leave channels out, or already do.

    Example:
        >>> surgery.masked(traced, surgery.split_masks(traced, 0.5))
    """
    info(module)
    return apply(module, SwitchOff({name: mask_text(mask) for name, mask in by_first_name(module, masks).items()}))


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


def _kels_masks(
    module: nn.Module, analysis: Analysis, kept: Mapping[DimensionGroup, NDArray[np.bool_]]
) -> dict[str, torch.Tensor]:
    keep = np.ones(analysis.count, dtype=bool)
    for group, flags in kept.items():
        keep[group.start : group.start + group.units] = flags
    masks = {}
    names = {id(p): name for name, p in reversed(list(module.named_parameters()))}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        for axis in range(parameter.ndim):
            units = analysis.axis_units.get((names[id(parameter)], axis))
            if units is not None:
                shape = [-1 if a == axis else 1 for a in range(parameter.ndim)]
                mask &= torch.from_numpy(keep[units]).view(shape)
        masks[name] = mask.to(parameter.device)
    return masks


def _wels_masks(module: nn.Module, rate: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, torch.Tensor] = {}
    for parameter in module.parameters():
        if parameter.ndim < 2:
            drawn[id(parameter)] = torch.ones_like(parameter, dtype=torch.bool)
            continue
        count = math.ceil(round(rate * parameter.numel(), 6))
        mask = largest(torch.rand(parameter.numel(), generator=generator), count)
        drawn[id(parameter)] = mask.view(parameter.shape).to(parameter.device)
    return {name: drawn[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}
