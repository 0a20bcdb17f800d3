"""What no operation can change in a model: the groups that must stay as they are, the network's ends aside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup

UNREAD = "no layer contracts over it"
ENDS = frozenset({"network input", "network output", "vocabulary", "kernel size", UNREAD})


@dataclass(frozen=True)
class Unedited:
    """Channels that cannot be edited for another reason than that they are the network's inputs or outputs."""

    channels: int
    total: int
    """Channels of all groups but the network's inputs and outputs."""
    macs: float
    """The part of the multiply-accumulates of all weights, in [0, 1], that is done at these channels; of the parameters
    where none of them is known to be a weight's."""
    groups: tuple[tuple[str, int, str], ...]
    """The groups that hold them, largest first: name, channels, and the reason."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        groups = [{"name": name, "channels": channels, "reason": reason} for name, channels, reason in self.groups]
        return {"channels": self.channels, "total": self.total, "macs": self.macs, "groups": groups}

    def __str__(self) -> str:
        text = f"{self.channels} of {self.total} channels ({self.macs:.0%} of the MACs) could not be edited"
        return f"{text}: {describe(self.groups)}" if self.groups else text


def frozen_units(analysis: Analysis) -> NDArray[np.bool_]:
    """For each unit, whether it cannot be edited though it is no input or output of the network."""
    flags = np.zeros(analysis.count, dtype=bool)
    for group in analysis.groups:
        if not is_end(group):
            flags[group.start : group.start + group.units] = group.frozen
    return flags


def frozen_groups(analysis: Analysis) -> tuple[tuple[str, int, str], ...]:
    """The groups with units that cannot be edited, as in `Unedited.groups`."""
    return _by_size(g for g in analysis.groups if g.frozen.any() and not is_end(g) and not is_read_only(g))


def why_nothing_changes(analysis: Analysis) -> str:
    """Why an operation on all groups leaves a model as it is, in one line."""
    held = frozen_groups(analysis) or _by_size(g for g in analysis.groups if not g.editable)
    if any(g.editable for g in analysis.groups) or not held:
        return "every group that can be edited is left with as many channels as it has"
    return f"no channels can be edited: {describe(held)}"


def is_end(group: DimensionGroup) -> bool:
    """Whether a group cannot be edited for no other reason than that it is the network's input or output."""
    reasons = group.reason.split("; ") if group.reason else []
    return bool(reasons) and all(reason in ENDS for reason in reasons)


def is_read_only(group: DimensionGroup) -> bool:
    """Whether no layer writes the channels of a group: what reads an axis that is no longer known to hold any."""
    return all(member.role == "consumer" for member in group.members)


def describe(groups: tuple[tuple[str, int, str], ...], most: int = 3) -> str:
    """The largest groups and their reasons, in one line."""
    said = [f"{name!r} ({channels} channels: {reason})" for name, channels, reason in groups[:most]]
    return ", ".join([*said, f"and {len(groups) - most} more"] if len(groups) > most else said)


def _by_size(groups: Iterable[DimensionGroup]) -> tuple[tuple[str, int, str], ...]:
    return tuple(sorted(_described(groups), key=lambda group: -group[1]))


def _described(groups: Iterable[DimensionGroup]) -> Iterator[tuple[str, int, str]]:
    for group in groups:
        yield group.name, round(group.size * int(group.frozen.sum()) / max(group.units, 1)), group.reason
