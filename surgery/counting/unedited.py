"""How much of a model no operation can change: channels, and the work done at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.frozen import ENDS, UNREAD, Unedited, frozen_groups, frozen_units, is_end, is_read_only
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.counting.cost import weight_macs


def unedited(module: nn.Module) -> Unedited:
    """Count the channels of a traced module that cannot be edited, the network's inputs and outputs aside.

    Args:
        module: a traced module; nothing is run.

    Returns:
        their number, their part of the multiply-accumulates, and the groups that hold them with the reasons.

    Raises:
        UsageError: ``module`` is not a traced module.

    Example:
        >>> print(surgery.unedited(traced))
        8 of 24 channels (31% of the MACs) could not be edited: 'stem' (8 channels: cumsum has no rule)
    """
    analysis = analyse(module)
    flags, groups = frozen_units(analysis), frozen_groups(analysis)
    macs = _macs_or_sizes(module)
    held = 0.0
    for name, parameter in module.named_parameters():
        rest = 1.0  # the share that lies at none of these channels
        for axis in range(parameter.ndim):
            units = analysis.axis_units.get((name, axis))
            if units is not None and units.size:
                rest *= 1 - float(np.mean(flags[units]))
        held += macs[name] * (1 - rest)
    total = sum(macs.values())
    return Unedited(
        channels=sum(channels for _, channels, _ in groups),
        total=sum(group.size for group in analysis.groups if not (is_end(group) or is_read_only(group))),
        macs=held / total if total else 0.0,
        groups=groups,
    )


@dataclass(frozen=True)
class HeldBack:
    """A reason for which channels cannot be edited, and what lies at them."""

    reason: str
    macs: float
    """The part of the multiply-accumulates of all weights, in [0, 1]; the parts of all reasons add up to what cannot be
    edited. Of the parameters, where nothing is known to be multiplied."""
    channels: int
    groups: tuple[str, ...]
    """Names of the groups that hold them."""
    line: str
    """The line of the model's Python that it is about, ``"resnet.py:92"``; empty where it is not known."""
    more: int = 0
    """How many other layers or ops hold channels for the same reason."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "groups": list(self.groups)}

    def __str__(self) -> str:
        place = f" ({self.line})" if self.line else ""
        return f"{self.macs:.0%} of the MACs: {self.reason}{place}{f', and {self.more} more' if self.more else ''}"


def held_back(module: nn.Module, *, outputs: Outputs = None) -> tuple[HeldBack, ...]:
    """List why channels of a traced module cannot be edited, the network's inputs and outputs too.

    A channel counts for the first reason that was found for it. A weight between two such channels counts once, and for
    another reason than that one of them is an input or output of the network, where there is one. What several layers
    do alike is one reason.

    Args:
        module: a traced module; nothing is run.
        outputs: the outputs that may change, as for `surgery.slim`.

    Returns:
        the reasons, that with the largest part of the multiply-accumulates first.

    Raises:
        UsageError: ``module`` is not a traced module, or has no output of that name.

    Example:
        >>> print(*surgery.held_back(traced), sep="\\n")
        23% of the MACs: network input
        6% of the MACs: network output
    """
    analysis = analyse(module, parse_outputs(outputs))
    texts, reason_of = _first_reasons(analysis)
    macs = _macs_or_sizes(module)
    at_end = np.array([text in ENDS for text in texts], dtype=bool)
    held = np.zeros(len(texts))
    for name, parameter in module.named_parameters():
        axes = [analysis.axis_units.get((name, axis)) for axis in range(parameter.ndim)]
        shares = [_shares(reason_of[units], len(texts)) for units in axes if units is not None and units.size]
        rest = float(macs[name])
        for share in shares:
            held += rest * np.where(at_end, 0, share)
            rest *= 1 - share[~at_end].sum()
        for share in shares:
            others = 1 - share[~at_end].sum()
            if others > 0:
                held += rest * np.where(at_end, share, 0) / others
                rest *= 1 - share[at_end].sum() / others
    total = sum(macs.values())
    kinds: dict[str, list[int]] = {}
    for k, text in enumerate(texts):
        kinds.setdefault(text.partition(" ")[2] or text, []).append(k)
    found = [_held_back(analysis, texts, reason_of, held / total if total else held, alike) for alike in kinds.values()]
    return tuple(sorted((one for one in found if one.channels), key=lambda one: (-one.macs, -one.channels)))


def _first_reasons(analysis: Analysis) -> tuple[list[str], NDArray[np.int64]]:
    """The reasons in order, and for each unit the number of the first that holds it; -1 where it can be edited."""
    reason_of = np.full(analysis.count, -1, dtype=np.int64)
    texts: dict[str, int] = {}
    for units, text in analysis.reasons:
        new = units[reason_of[units] < 0]
        if new.size:
            reason_of[new] = texts.setdefault(text, len(texts))
    unread = analysis.frozen & (reason_of < 0)
    if unread.any():
        reason_of[unread] = texts.setdefault(UNREAD, len(texts))
    return list(texts), reason_of


def _shares(reasons: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Of the positions of an axis, the part that is held for each reason."""
    return np.bincount(reasons[reasons >= 0].ravel(), minlength=count) / reasons.size


def _held_back(
    analysis: Analysis, texts: Sequence[str], reason_of: NDArray[np.int64], macs: NDArray[np.float64], alike: list[int]
) -> HeldBack:
    """What is held for any of some reasons."""
    channels, groups = 0, []
    for group in analysis.groups:
        own = np.isin(reason_of[group.start : group.start + group.units], alike)
        if own.any():
            channels += round(group.size * int(own.sum()) / group.units)
            groups.append(group.name)
    first = max(alike, key=lambda k: macs[k])
    line = getattr(texts[first], "line", "")
    return HeldBack(str(texts[first]), float(macs[alike].sum()), channels, tuple(groups), line, len(alike) - 1)


def _macs_or_sizes(module: nn.Module) -> dict[str, int]:
    """The multiply-accumulates of each parameter; their sizes, where none is known to have any."""
    known = weight_macs(module)
    macs = {name: known.get(name, 0) for name, _ in module.named_parameters()}
    if not any(macs.values()):
        macs = {name: parameter.numel() for name, parameter in module.named_parameters()}
    return macs
