"""How much of a model no operation can change: channels, and the work done at them."""

from __future__ import annotations

import numpy as np
from torch import nn

from surgery.axes.analysis import analyse
from surgery.axes.frozen import Unedited, frozen_groups, frozen_units, is_end, is_read_only
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
    known = weight_macs(module)
    macs = {name: known.get(name, 0) for name, _ in module.named_parameters()}
    if not any(macs.values()):
        macs = {name: parameter.numel() for name, parameter in module.named_parameters()}
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
