"""What a reindex refuses: indices that are not of the group, and edits that would not be exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.edit.layout import Layouts
from surgery.edit.step import MEAN
from surgery.errors import EditError, UsageError


def check_index(group: DimensionGroup, index: Sequence[int], shares: Sequence[float] | None) -> None:
    """Refuse an index of a group that names what is not there, or drops, moves or copies what must stay.

    Raises:
        UsageError: an entry is out of range, or the shares of a unit's copies do not sum to 1.
        EditError: a frozen unit is not where it was, or the group cannot hold copies.
    """
    places = np.asarray(index, dtype=np.int64)
    where = f"group {group.name!r} of {group.units} units"
    if len(places) == 0:
        raise UsageError(f"the index of {where} is empty")
    if group.mixed:  # what is normalised over may have means
        places = places[places != MEAN]
    if len(places) == 0 or places.min() < 0 or places.max() >= group.units:
        raise UsageError(f"the index of {where} has an entry outside 0..{group.units - 1}")
    copies = np.bincount(places, minlength=group.units)
    frozen = np.flatnonzero(group.frozen)
    kept = places[group.frozen[places]]
    if not np.array_equal(kept, frozen):
        what = "cannot be edited" if not group.editable else f"must keep units {_some(frozen)} as they are"
        raise EditError(f"group {group.name!r} {what}: {group.reason}")
    if copies.max() > 1:
        if group.single:
            raise EditError(f"{where} cannot hold copies: {'; '.join(group.single)}")
        both = [str(m) for m in group.members if m.role == "both"]
        if both:
            raise EditError(f"{where} cannot hold copies: {', '.join(both)} is both written and read")
    if shares is not None:
        if len(shares) != len(index):
            raise UsageError(f"{where}: {len(shares)} shares for {len(index)} units")
        factors, means = np.asarray(shares), np.asarray(index) == MEAN
        if factors[means].any():
            raise UsageError(f"{where}: the share of a mean must be 0")
        total = np.bincount(places, weights=factors[~means], minlength=group.units)
        if not np.allclose(total[copies > 0], 1.0, atol=1e-9):
            raise UsageError(f"{where}: the shares of a unit's copies must sum to 1")


def check_layouts(analysis: Analysis, layouts: Layouts) -> None:
    """Refuse layouts that leave nothing of an axis, or that copy what is normalised over in unequal numbers."""
    _check_readers(analysis, layouts)
    _check_mixed(analysis, layouts)


def _check_readers(analysis: Analysis, layouts: Layouts) -> None:
    """No layer may be left without an input or an output."""
    for (name, axis), units in analysis.axis_units.items():
        layout = layouts.of(units)
        if layout is not None and len(layout.old) == 0:
            raise EditError(f"nothing would be left of axis {axis} of {name}")


def _check_mixed(analysis: Analysis, layouts: Layouts) -> None:
    """What is normalised over holds the same number of copies of everything that is left."""
    for units, what in analysis.mixed:
        copies = layouts.copies[units]
        if copies.max(initial=0) > 1 and len(np.unique(copies[copies > 0])) > 1:
            names = [g.name for g in analysis.groups if ((units >= g.start) & (units < g.start + g.units)).any()]
            raise EditError(
                f"{what} normalises over {' and '.join(map(repr, names))}: every unit needs the same number of copies"
            )


def _some(units: Any) -> str:
    shown = ", ".join(map(str, units[:6]))
    return f"{shown}, …" if len(units) > 6 else shown
