"""Hints for a student that was carved out of its teacher: each stage keeps to the teacher's values of its channels.

Which channels of a stage are left is known, so nothing has to learn to translate between the two: there is no
regressor, which would begin at random and pull a compensated student away from where it already is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.edit.layout import Layouts
from surgery.edit.reindex import Reindex
from surgery.edit.step import Step
from surgery.errors import EditError, UsageError
from surgery.settings import option
from surgery.taps.network import Tap, TappedNetwork
from surgery.taps.stages import stages
from surgery.training.distilling.objectives import Compared, Objective, Values

Kept = Mapping[str, tuple[int, ...]]
"""For each stage by name, the channels of the dense model that a student still has there."""


@dataclass(frozen=True)
class KeptHint(Objective):
    """The squared error of the student's values at the end of each stage, relative to the variance of the teacher's
    values of the same channels; the mean over stages.

    Attributes:
        kept: for each stage by name, the teacher's channels that the student has.
    """

    kept: tuple[tuple[str, tuple[int, ...]], ...]
    weight: float = option(1.0, "Of the loss.", least=0)

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        pairs = []
        for name, channels in self.kept:
            value = teacher.tap(name)
            index = (*[slice(None)] * _channel_axis(teacher, value), list(channels))
            pairs.append((student.tap(name), value.through((operator.getitem, (index,)))))
        return Compared(tuple(pairs))

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        errors = [relative_error(one, other) for one, other in zip(ours, theirs, strict=True)]
        return self.weight * torch.stack(errors).mean()


def relative_error(values: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error over the variance of what is wanted: 0 where both are equal, 1 for its mean."""
    tiny = torch.finfo(wanted.dtype).tiny
    return (values - wanted).square().mean() / wanted.var(correction=0).clamp_min(tiny)


def all_channels(dense: nn.Module) -> Kept:
    """All channels of each stage whose channels lie along one axis; none where the network has no stages."""
    try:
        names = [stage.name for stage in stages(dense)]
        network = TappedNetwork(dense, "model", mode="training and evaluation")
    except (EditError, UsageError):
        return {}
    found = {}
    for name in names:
        try:
            found[name] = tuple(range(network.layout(network.tap(name)).channels))
        except (EditError, UsageError):  # the stage ends at a value that no layer or container gives
            continue
    return found


def keep_channels(kept: Kept, student: nn.Module, steps: Sequence[Step]) -> Kept:
    """The channels that are left when ``steps`` are done to ``student``, which has those of ``kept``.

    A stage is left out where its channels cannot be told apart, or where its student would have others than its values
    have.
    """
    for step in steps:
        if isinstance(step, Reindex):
            kept = _index(kept, student, step)
    return kept


def _index(kept: Kept, student: nn.Module, step: Reindex) -> Kept:
    network = TappedNetwork(student, "student", mode="evaluation")
    analysis = network.analysis
    layouts = Layouts(analysis, {analysis.find(name): index for name, index in step.indices.items()}, {})
    found = {}
    for name, channels in kept.items():
        value = network.tap(name)
        axis = _channel_axis(network, value)
        field = network.flows[0].value(value.nodes[0]).at(axis)
        if field is None:
            found[name] = channels
        elif field.dims == (axis,):
            layout = layouts.along(field)
            found[name] = channels if layout is None else tuple(channels[k] for k in layout.old)
    return found


def _channel_axis(network: TappedNetwork, value: Tap) -> int:
    return len(network.shape(value)) - 1 if network.layout(value).last else 1
