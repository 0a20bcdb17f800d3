"""Growing in the middle of training: a wider and deeper model, and more data (Net2Net's lifelong learning).

Chen, Goodfellow, Shlens 2016, section 1: a system that goes on learning is given more data and needs more capacity, and
should not begin anew each time.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Subset

from surgery.counting.cost import cost
from surgery.edit.recipe import Recipe, recipe
from surgery.errors import UsageError, unknown_name
from surgery.operations.deepen import deepen
from surgery.operations.verify import verify
from surgery.operations.widen import Width, widen
from surgery.training.data.data import Data, Images, _labels, count
from surgery.training.history import Grown, Score
from surgery.training.optimizer import NEW


@dataclass(frozen=True)
class Growth:
    """What grows before an epoch: the model in width, then in depth, and the training images.

    Attributes:
        widen: as in `surgery.widen`.
        deepen: as in `surgery.deepen`.
        images: the training images from then on: another data set, or the fraction in (0, 1] of the whole of
            ``data.train``. A fraction is one of each class, drawn by the training's seed; a larger one contains a
            smaller one.
        state: what the optimiser's state of further copies begins with: ``"copied"`` or ``"zero"``
            (`surgery.transfer_optimizer`).
        widen_options: more for `surgery.widen`. The symmetry between copies is broken by ``"zero-sum"`` noise unless
            ``break_symmetry`` says otherwise; the seed is the training's unless ``seed`` does.
        deepen_options: more for `surgery.deepen`.
    """

    widen: float | Mapping[str, Width] | None = None
    deepen: Mapping[str, int] | Iterable[str] | str | None = None
    images: float | Images | None = None
    state: str = "copied"
    widen_options: Mapping[str, Any] = field(default_factory=dict)
    deepen_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.deepen, Iterator):  # a rehearsal would use it up
            object.__setattr__(self, "deepen", tuple(self.deepen))

    @property
    def changes_model(self) -> bool:
        return self.widen is not None or self.deepen is not None


@dataclass(frozen=True)
class Stage:
    """Epochs of a training in which nothing grows, and the growth before them."""

    first: int
    epochs: int
    images: Images
    growth: Growth | None


def stages(data: Data, epochs: int, grow: Mapping[int, Growth], seed: int) -> tuple[Stage, ...]:
    """The stages of a training of ``epochs`` epochs that grows before those that ``grow`` has.

    Raises:
        UsageError: an epoch that there is not, a growth of nothing, an unknown ``state``, a fraction out of range,
            fewer images than before, or fewer than 2.
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
    result: list[Stage] = []
    images = data.train
    for first, end in itertools.pairwise([*sorted({0, *grow}), epochs]):
        step = grow.get(first)
        if step is not None and step.images is not None:
            before, images = images, _images(data, step.images, first, seed)
            if result and count(images) < count(before):
                raise UsageError(
                    f"before epoch {first} the training images would go from {count(before)} to {count(images)}: "
                    "data can only grow"
                )
            if count(images) < 2:
                raise UsageError(f"from epoch {first} on there would be {count(images)} training images: 2 are needed")
        result.append(Stage(first, end - first, images, step))
    return tuple(result)


def grown(model: nn.Module, growth: Growth, seed: int) -> nn.Module:
    """``model`` after ``growth``; the same object where only the data grows.

    Raises what `surgery.widen` and `surgery.deepen` do.
    """
    if growth.widen is not None:
        options = {"break_symmetry": "zero-sum", "seed": seed, **growth.widen_options}
        model = widen(model, growth.widen, **options)
    if growth.deepen is not None:
        model = deepen(model, growth.deepen, **{"seed": seed, **growth.deepen_options})
    return model


def rehearse(model: nn.Module, plan: Sequence[Stage], seed: int) -> None:
    """Let ``model`` grow as planned, so that what cannot be done is refused before the training and not in it."""
    for stage in plan:
        if stage.growth is not None:
            model = grown(model, stage.growth, seed)


def grown_record(
    stage: Stage, before: nn.Module, after: nn.Module, batch: Tensor, score: Score | None, started: float
) -> Grown:
    """What the growth before ``stage`` did, which began at the time ``started``; ``batch`` is of images."""
    if after is before:
        return Grown(stage.first, count(stage.images), (), None, None, None, score, time.perf_counter() - started)
    steps = Recipe(None, recipe(after).steps[len(recipe(before).steps) :])
    return Grown(
        epoch=stage.first,
        images=count(stage.images),
        steps=tuple(json.loads(steps.to_json())["steps"]),
        before=cost(before, batch),
        after=cost(after, batch),
        check=verify(after, before, batch),
        score=score,
        seconds=time.perf_counter() - started,
    )


def _images(data: Data, wanted: float | Images, epoch: int, seed: int) -> Images:
    if not isinstance(wanted, (int, float)):
        return wanted
    if not 0 < wanted <= 1:
        raise UsageError(f"the fraction of images from epoch {epoch} on is {wanted}: it must be above 0 and at most 1")
    return data.train if wanted == 1 else _fraction(data.train, wanted, seed)


def _fraction(images: Images, fraction: float, seed: int) -> Images:
    """So much of each class, at least one image; those of a smaller fraction are among those of a larger one."""
    labels = _labels(images)
    random = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        chosen += members[: max(1, round(fraction * len(members)))].tolist()
    return Subset(images, sorted(chosen))
