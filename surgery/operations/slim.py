"""KELS: the slim network that the fit-hypothesis of a dense one is.

Knowledge Evolution (Taha, Shrivastava, Davis, CVPR 2021, section 3) keeps the first ``ceil(s * n)`` of each layer's
``n`` channels, so that what is kept is a network of its own. `surgery.operations.masks` has the masks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.frozen import why_nothing_changes
from surgery.axes.groups import DimensionGroup
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.edit.names import resolve
from surgery.edit.reindex import Reindex, carve
from surgery.errors import NothingChangedWarning, UsageError, whole_number
from surgery.operations.importance import Scores, unit_scores

Rate = float | Mapping[Any, float]
"""One split rate, or one for each selector (`surgery.selectors`)."""


def slim(
    module: nn.Module,
    rate: Rate,
    *,
    round_to: int = 1,
    importance: str = "prefix",
    outputs: Outputs = None,
    calibration: Any = None,
) -> nn.Module:
    """Carve the KELS slim network out of a dense one.

    It computes what the dense network computes with its reset-hypothesis switched off (`masked`); with ``calibration``,
    as nearly as it can what the dense network computes.

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
        calibration: inputs on which the layers that read an edited axis are fitted to what the dense network gave
            (`surgery.edit.compensate`), so that kept channels take over what removed ones said: a tensor, a tuple of
            positional inputs or a mapping of named ones, an iterable of batches, or a data set as for
            `surgery.as_data`, of which 512 training images are taken. What a batch holds behind the inputs is left out.
            Both networks run once on all of it; values that wait are in temporary files. By default nothing is fitted.

    Returns:
        a new module.

    Warns:
        NothingChangedWarning: a single rate below 1 leaves the network as it is; with the largest groups that cannot be
            edited, and why (`surgery.unedited` has all).

    Raises:
        UsageError: a rate outside (0, 1], or an unknown name, importance or output; calibration without inputs, with
            inputs that the network does not take, or that give activations which are not finite.

    Example:
        >>> slim = surgery.slim(traced, 0.5)
        >>> surgery.verify(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5))).ok
        True
        >>> better = surgery.slim(traced, 0.5, calibration=data)  # nearer to the dense network, without training
    """
    step = slim_plan(module, rate, round_to=round_to, importance=importance, outputs=outputs)
    if not (step.indices or isinstance(rate, Mapping) or rate == 1):
        why = why_nothing_changes(analyse(module, step.outputs))
        warnings.warn(f"slim changed nothing: {why}", NothingChangedWarning, stacklevel=2)
    return carve(module, step, calibration)


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


def fit_units(
    analysis: Analysis, module: nn.Module, rate: Rate, round_to: int = 1, importance: str = "prefix"
) -> dict[DimensionGroup, NDArray[np.bool_]]:
    """For each unit of each group that a rate is for, whether `slim` keeps it."""
    whole_number("round_to", round_to, 1)
    if isinstance(rate, Mapping):
        rates = resolve(analysis, module, {name: valid_rate(r) for name, r in rate.items()})
    else:
        rates = dict.fromkeys((g for g in analysis.groups if g.editable), valid_rate(rate))
    scores = unit_scores(module, analysis, importance)
    return {group: _keep_best(group, r, round_to, scores[group]) for group, r in rates.items()}


def valid_rate(rate: float) -> float:
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
