"""KELS and WELS: which part of a network is its fit-hypothesis, and the slim network that it is.

Knowledge Evolution (Taha, Shrivastava, Davis, CVPR 2021, section 3) splits each layer by a mask into a fit-hypothesis
and a reset-hypothesis. With KELS the mask keeps the first ``ceil(s * n)`` of ``n`` channels, so that the fit-hypothesis
is a network of its own; with WELS it keeps weights at random, wherever they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.frozen import why_nothing_changes
from surgery.axes.groups import DimensionGroup
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.edit.apply import apply
from surgery.edit.names import resolve
from surgery.edit.reindex import Reindex
from surgery.edit.switch_off import SwitchOff, mask_text
from surgery.errors import NothingChangedWarning, UsageError, unknown_name, whole_number
from surgery.graph.tracing import info
from surgery.operations.masks import Scores, by_first_name, largest, unit_scores

Rate = float | Mapping[Any, float]
"""One split rate, or one for each selector (`surgery.selectors`)."""


def slim(
    module: nn.Module, rate: Rate, *, round_to: int = 1, importance: str = "prefix", outputs: Outputs = None
) -> nn.Module:
    """Carve the KELS slim network out of a dense one.

    It computes what the dense network computes with its reset-hypothesis switched off (`masked`).

    Args:
        module: a traced module.
        rate: the split rate ``s`` in (0, 1], or one for each of some selectors (`surgery.selectors`):
            ``{"layer4": 0.25, nn.Linear: 0.5}``; the most specific decides. Every group keeps
            the first ``ceil(s * n)`` of what each of its producers writes; where different layers read different
            parts of it (a ``chunk``), each part keeps its share.
        round_to: kept channels are rounded up to a multiple of this, as far as there are any.
        importance: which channels are kept: ``"prefix"``, the first (KELS), or ``"magnitude"``, as many of those with
            the largest weights.
        outputs: the outputs of the network that may change: ``"free"`` for all, or their names (`surgery.outputs`).
            Channels alone do, positions and the batch never. `surgery.verify` compares what is left.

    Returns:
        a new module.

    Warns:
        NothingChangedWarning: a single rate below 1 leaves the network as it is; with the largest groups that cannot be
            edited, and why (`surgery.unedited` has all).

    Raises:
        UsageError: a rate outside (0, 1], or an unknown name, importance or output.

    Example:
        >>> slim = surgery.slim(traced, 0.5)
        >>> surgery.verify(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5))).ok
        True
    """
    step = slim_plan(module, rate, round_to=round_to, importance=importance, outputs=outputs)
    if not (step.indices or isinstance(rate, Mapping) or rate == 1):
        why = why_nothing_changes(analyse(module, step.outputs))
        warnings.warn(f"slim changed nothing: {why}", NothingChangedWarning, stacklevel=2)
    return apply(module, step)


def slim_plan(
    module: nn.Module, rate: Rate, *, round_to: int = 1, importance: str = "prefix", outputs: Outputs = None
) -> Reindex:
    """The step that `slim` takes."""
    free = parse_outputs(outputs)
    return slim_step(analyse(module, free), module, rate, round_to, importance, free)


def slim_step(
    analysis: Analysis,
    module: nn.Module,
    rate: Rate,
    round_to: int = 1,
    importance: str = "prefix",
    free: tuple[str, ...] = (),
) -> Reindex:
    """As `slim_plan`; ``analysis`` is of ``module``, with these outputs ``free``."""
    kept = fit_units(analysis, module, rate, round_to, importance)
    indices = {g.name: tuple(np.flatnonzero(keep).tolist()) for g, keep in kept.items() if not keep.all()}
    return Reindex(indices, outputs=free)


def split_masks(
    module: nn.Module,
    rate: Rate,
    *,
    kind: str = "kels",
    seed: int = 0,
    round_to: int = 1,
    importance: str = "prefix",
    outputs: Outputs = None,
) -> dict[str, torch.Tensor]:
    """The fit-hypothesis as a bool tensor for each parameter (True: kept).

    Args:
        module: a traced module.
        rate: the split rate, as for `slim`; for WELS a single one.
        kind: ``"kels"``: the channels that `slim` keeps. ``"wels"``: of each weight of two or more dimensions exactly
            ``ceil(s * numel)`` entries, drawn without replacement; vectors are kept whole.
        seed: of the draw, at least 0; KELS draws nothing.
        round_to, importance, outputs: which channels the fit-hypothesis has, as in `slim`; for KELS alone.

    Returns:
        by qualified name, tied parameters under each of theirs.

    Raises:
        UsageError: a rate outside (0, 1], an unknown kind, importance or output, or several rates for WELS.

    Example:
        >>> masks = surgery.split_masks(traced, 0.5, kind="wels", seed=1)
        >>> masks["conv1.weight"].shape == traced.conv1.weight.shape
        True
    """
    seed = whole_number("seed", seed, 0)
    if kind == "kels":
        analysis = analyse(module, parse_outputs(outputs))
        return _kels_masks(module, analysis, fit_units(analysis, module, rate, round_to, importance))
    if kind == "wels":
        info(module)
        if isinstance(rate, Mapping):
            raise UsageError("WELS takes one rate for the whole network")
        if importance != "prefix":
            raise UsageError("importance is of channels: leave it out for WELS, which keeps scattered weights")
        if outputs is not None:
            raise UsageError("outputs are of channels: leave them out for WELS, which keeps scattered weights")
        return _wels_masks(module, _valid_rate(rate), seed)
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


def fit_units(
    analysis: Analysis, module: nn.Module, rate: Rate, round_to: int = 1, importance: str = "prefix"
) -> dict[DimensionGroup, NDArray[np.bool_]]:
    """For each unit of each group that a rate is for, whether `slim` keeps it."""
    whole_number("round_to", round_to, 1)
    if isinstance(rate, Mapping):
        rates = resolve(analysis, module, {name: _valid_rate(r) for name, r in rate.items()})
    else:
        rates = dict.fromkeys((g for g in analysis.groups if g.editable), _valid_rate(rate))
    scores = unit_scores(module, analysis, importance)
    return {group: _keep_best(group, r, round_to, scores[group]) for group, r in rates.items()}


def _valid_rate(rate: float) -> float:
    if isinstance(rate, bool) or not (isinstance(rate, Real) and 0 < rate <= 1):
        raise UsageError(f"split rate must be in (0, 1], not {rate}")
    return float(rate)


def _keep_best(group: DimensionGroup, rate: float, round_to: int, scores: Scores) -> NDArray[np.bool_]:
    """The units of each class with the largest scores, of equal ones the first; their number is shared out so that each
    segment keeps ``ceil(s * n)``."""
    keep = group.frozen.copy()
    step = max(1, math.ceil(round_to * group.units / group.size))
    for parts in group.free:
        free = sum(map(len, parts))
        count = math.ceil(round(rate * free, 9))
        count = min(free, math.ceil(count / step) * step)
        for part, n in zip(parts, _share_out(count, [len(p) for p in parts]), strict=True):
            keep[part[np.argsort(-scores[part], kind="stable")[:n]]] = True
    return keep


def _share_out(total: int, sizes: list[int]) -> list[int]:
    """``total`` in parts proportional to ``sizes``, by largest remainder; no part empty while there is enough."""
    exact = [total * s / sum(sizes) for s in sizes]
    parts = [max(1, math.floor(e)) for e in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda k: parts[k] - exact[k])
    for k in by_remainder * 2:
        if sum(parts) < total and parts[k] < sizes[k]:
            parts[k] += 1
    for k in reversed(by_remainder):
        if sum(parts) > total and parts[k] > 1:
            parts[k] -= 1
    return parts


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
