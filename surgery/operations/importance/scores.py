"""The scores of a module's units by a criterion."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping

import numpy as np
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.groups import DimensionGroup
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.errors import ImportanceWarning, UsageError
from surgery.operations.importance.observed import Observed
from surgery.operations.importance.registry import How, Importance, Scores, UnitScores, find_entry
from surgery.operations.importance.scored import Scored


def unit_scores(module: nn.Module, importance: How = "magnitude", *, outputs: Outputs = None) -> UnitScores:
    """Say how much each unit of each group is worth keeping, the larger the more.

    What is returned is taken as an ``importance`` itself. So a criterion on data looks at them once for many edits.

    Args:
        module: a traced module. It is not changed.
        importance: the name of a criterion (`surgery.importance`), a function, or a `surgery.Importance`.
        outputs: the outputs of the network that may change, as for `surgery.slim`.

    Returns:
        the scores of each group that can be edited, (units,), by its name.

    Warns:
        ImportanceWarning: the criterion cannot score some groups, which are scored by another one; with the reason.

    Raises:
        UsageError: an unknown criterion; scores of another shape, or not finite; data as for `surgery.Importance` that
            are missing, without labels, or that the network does not take.

    Example:
        >>> scores = surgery.unit_scores(traced, surgery.Importance("taylor", data))
        >>> slims = [surgery.slim(traced, rate, importance=scores) for rate in (0.75, 0.5)]
    """
    analysis = analyse(module, parse_outputs(outputs))
    return score_units(module, analysis, importance, [group for group in analysis.groups if group.editable])


def score_units(module: nn.Module, analysis: Analysis, importance: How, groups: Iterable[DimensionGroup]) -> UnitScores:
    """As `unit_scores`, of some groups."""
    if isinstance(importance, Mapping):
        return _given(importance, groups)
    if not isinstance(importance, Importance):
        importance = Importance(importance)
    entry = find_entry(importance.criterion)
    observed = Observed(module, analysis, importance)
    values: dict[str, Scores] = {}
    instead: dict[str, str] = {}
    for group in groups:
        scored = Scored(module, analysis, group, observed)
        values[group.name] = _checked(entry.name, group, entry.function(scored))
        if scored.replaced:
            instead[group.name] = scored.replaced
    if instead:
        reasons = "; ".join(f"{name} {why}" for name, why in [*instead.items()][:4])
        more = f"; and {len(instead) - 4} more" if len(instead) > 4 else ""
        warnings.warn(
            f"importance {entry.name!r} cannot score {len(instead)} of {len(values)} groups, which are scored "
            f"otherwise: {reasons}{more}",
            ImportanceWarning,
            stacklevel=_levels(),
        )
    return UnitScores(values, entry.name, entry.across, instead, on_data=observed.looked)


def _levels() -> int:
    """How many callers up from here the caller of the package is."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("surgery."):
        frame, level = frame.f_back, level + 1
    return level


def _given(scores: Mapping[str, object], groups: Iterable[DimensionGroup]) -> UnitScores:
    """Scores by group as they were handed in, checked."""
    groups = list(groups)
    missing = next((group.name for group in groups if group.name not in scores), None)
    if missing is not None:
        raise UsageError(f"importance has no scores of group {missing!r}: surgery.unit_scores has those of every group")
    like = scores if isinstance(scores, UnitScores) else UnitScores({}, "scores")
    values = {group.name: _checked(like.name, group, scores[group.name]) for group in groups}
    return UnitScores(values, like.name, like.across, like.instead, on_data=like.on_data)


def _checked(name: str, group: DimensionGroup, scores: object) -> Scores:
    try:
        found = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"importance {name!r} gives group {group.name!r} what are no numbers: {error}") from error
    if found.shape != (group.units,):
        raise UsageError(
            f"importance {name!r} gives group {group.name!r} scores of shape {found.shape}, not ({group.units},): "
            "one for each unit is needed"
        )
    if not np.isfinite(found).all():
        raise UsageError(f"importance {name!r} gives group {group.name!r} scores that are not finite")
    return found
