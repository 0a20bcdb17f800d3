"""The phases of a training that grows: the epochs between growths, and their images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.data import Subset

from surgery.errors import UsageError, unknown_name
from surgery.training.data.data import Data, Images, count, labels_of, stratified_split
from surgery.training.growth import Growth, grow_model
from surgery.training.optimizer_state import NEW


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs of a training without growth, and the growth before them."""

    first: int
    epochs: int
    images: Images
    growth: Growth | None


def plan_phases(data: Data, epochs: int, grow: Mapping[int, Growth], seed: int) -> tuple[Phase, ...]:
    """Plan a training of ``epochs`` epochs with the growths of ``grow``, each before its epoch.

    Raises:
        UsageError: an epoch out of range, an empty growth, an unknown ``state``, a fraction out of range, fewer images
            than before, or fewer than 2.
    """
    if not isinstance(grow, Mapping) or not all(isinstance(growth, Growth) for growth in grow.values()):
        raise UsageError(f"grow is a mapping from epochs to surgery.Growth, not {grow!r}")
    for epoch, growth in grow.items():
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch not in range(epochs):
            raise UsageError(f"grow has epoch {epoch}: this training has epochs 0 to {epochs - 1}")
        if not growth.changes_model and growth.images is None:
            raise UsageError(f"the growth before epoch {epoch} has nothing to grow: give it widen, deepen or images")
        if growth.state not in NEW:
            raise unknown_name("state of new channels", growth.state, NEW)
    result: list[Phase] = []
    images = data.train
    for first, end in itertools.pairwise([*sorted({0, *grow}), epochs]):
        step = grow.get(first)
        if step is not None and step.images is not None:
            before, images = images, _choose_images(data, step.images, first, seed)
            if result and count(images) < count(before):
                raise UsageError(
                    f"before epoch {first} the training images would go from {count(before)} to {count(images)}: "
                    "data can only grow"
                )
            if count(images) < 2:
                raise UsageError(f"from epoch {first} on there would be {count(images)} training images: 2 are needed")
        result.append(Phase(first, end - first, images, step))
    return tuple(result)


def rehearse(model: nn.Module, plan: Sequence[Phase], seed: int) -> None:
    """Grow ``model`` as planned, so that an impossible growth is refused before the training."""
    for phase in plan:
        if phase.growth is not None:
            model = grow_model(model, phase.growth, seed)


def _choose_images(data: Data, wanted: float | Images, epoch: int, seed: int) -> Images:
    """The images from ``epoch`` on. A fraction is drawn from each class; a larger one contains a smaller one."""
    if not isinstance(wanted, (int, float)):
        return wanted
    if not 0 < wanted <= 1:
        raise UsageError(f"the fraction of images from epoch {epoch} on is {wanted}: it must be above 0 and at most 1")
    if wanted == 1:
        return data.train
    _, chosen = stratified_split(labels_of(data.train).tolist(), fraction=wanted, seed=seed)
    return Subset(data.train, chosen)
