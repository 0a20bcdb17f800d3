"""KELS: the slim network that the fit-hypothesis of a dense one is.

Knowledge Evolution (Taha, Shrivastava, Davis, CVPR 2021, section 3) keeps the first ``ceil(s * n)`` of each layer's
``n`` channels, so that what is kept is a network of its own. `surgery.operations.masks` has the masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.frozen import why_nothing_changes
from surgery.axes.groups import DimensionGroup
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.edit.names import resolve
from surgery.edit.reindex import Reindex, carve
from surgery.errors import NothingChangedWarning, UsageError, whole_number
from surgery.operations.importance.ranking import Kept, check_ranking, keep_best
from surgery.operations.importance.registry import How
from surgery.operations.importance.scores import score_units

Rate = float | Mapping[Any, float]
"""One split rate, or one for each selector (`surgery.selectors`)."""


def slim(
    module: nn.Module,
    rate: Rate,
    *,
    round_to: int = 1,
    importance: How = "prefix",
    ranking: str = "local",
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
        importance: which channels are kept: ``"prefix"``, the first (KELS), ``"magnitude"``, as many of those with
            the largest weights, or another criterion of the registry (`surgery.importance`) by its name; a function
            like those there; a criterion with its data, as in ``surgery.Importance("taylor", data)``; or scores by
            group (`surgery.unit_scores`).
        ranking: ``"local"``: every group keeps its own share. ``"global"``: the best channels of all groups together
            are kept, so that the rate is the share of all of them; ``"isomorphic"``: likewise, but of groups with the
            same kinds of layers (`surgery.operations.importance.ranking`). Groups of different rates are ranked apart,
            and every class of a group keeps a channel.
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
        ImportanceWarning: groups that the criterion cannot score, and are scored by another one.

    Raises:
        UsageError: a rate outside (0, 1], or an unknown name, importance, ranking or output; scores as for
            `surgery.unit_scores`, or a ranking of groups whose scores do not compare; calibration without inputs, with
            inputs that the network does not take, or that give activations which are not finite.

    Example:
        >>> slim = surgery.slim(traced, 0.5)
        >>> surgery.verify(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5))).ok
        True
        >>> better = surgery.slim(traced, 0.5, calibration=data)  # nearer to the dense network, without training
    """
    step = slim_plan(module, rate, round_to=round_to, importance=importance, ranking=ranking, outputs=outputs)
    if not (step.indices or isinstance(rate, Mapping) or rate == 1):
        why = why_nothing_changes(analyse(module, step.outputs))
        warnings.warn(f"slim changed nothing: {why}", NothingChangedWarning, stacklevel=2)
    return carve(module, step, calibration)


def slim_plan(
    module: nn.Module,
    rate: Rate,
    *,
    round_to: int = 1,
    importance: How = "prefix",
    ranking: str = "local",
    outputs: Outputs = None,
) -> Reindex:
    """The step that `slim` takes."""
    free = parse_outputs(outputs)
    return slim_step(analyse(module, free), module, rate, round_to, importance, ranking, free=free)


def slim_step(
    analysis: Analysis,
    module: nn.Module,
    rate: Rate,
    round_to: int = 1,
    importance: How = "prefix",
    ranking: str = "local",
    *,
    free: tuple[str, ...] = (),
) -> Reindex:
    """As `slim_plan`; ``analysis`` is of ``module``, with these outputs ``free``."""
    kept = fit_units(analysis, module, rate, round_to, importance, ranking)
    indices = {g.name: tuple(np.flatnonzero(keep).tolist()) for g, keep in kept.items() if not keep.all()}
    return Reindex(indices, outputs=free)


def fit_units(
    analysis: Analysis,
    module: nn.Module,
    rate: Rate,
    round_to: int = 1,
    importance: How = "prefix",
    ranking: str = "local",
) -> dict[DimensionGroup, Kept]:
    """For each unit of each group that a rate is for, whether `slim` keeps it."""
    whole_number("round_to", round_to, 1)
    check_ranking(ranking)
    if isinstance(rate, Mapping):
        rates = resolve(analysis, module, {name: valid_rate(r) for name, r in rate.items()})
    else:
        rates = dict.fromkeys((g for g in analysis.groups if g.editable), valid_rate(rate))
    scores = score_units(module, analysis, importance, rates)
    return keep_best(module, rates, round_to, scores, ranking)


def valid_rate(rate: float) -> float:
    if isinstance(rate, bool) or not (isinstance(rate, Real) and 0 < rate <= 1):
        raise UsageError(f"split rate must be in (0, 1], not {rate}")
    return float(rate)
