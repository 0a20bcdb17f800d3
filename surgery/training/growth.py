"""Growth during training: a wider and deeper model, and more data (Net2Net's lifelong learning).

Chen, Goodfellow, Shlens 2016, section 1: a system that keeps learning gets more data and needs more capacity, without
a new start each time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from surgery.counting.cost import cost
from surgery.edit.recipe import Recipe, recipe
from surgery.operations.deepen import deepen
from surgery.operations.verify import verify
from surgery.operations.widen import Width, widen
from surgery.training.data.data import Images
from surgery.training.history import Grown, Score


@dataclass(frozen=True)
class Growth:
    """Growth before an epoch: of the model in width, then in depth, and of the training images.

    Attributes:
        widen: as in `surgery.widen`.
        deepen: as in `surgery.deepen`.
        images: the training images from then on: another data set, or a fraction in (0, 1] of ``data.train``. A
            fraction is drawn from each class by the training's seed; a larger one contains a smaller one.
        state: initial optimizer state of further copies, ``"copied"`` or ``"zero"`` (`surgery.transfer_optimizer`).
        widen_options: options of `surgery.widen`. By default ``break_symmetry="zero-sum"``, and the training's seed.
        deepen_options: options of `surgery.deepen`.

    With a checkpoint, layers are selected by text: a class or predicate cannot be stored in it.

    Example:
        >>> surgery.train(traced, data, grow={4: surgery.Growth(widen={"layer3": 1.5}, deepen={"layer4": 1})})
    """

    widen: float | Mapping[str, Width] | None = None
    deepen: Mapping[str, int] | Iterable[str] | str | None = None
    images: float | Images | None = None
    state: str = "copied"
    widen_options: Mapping[str, Any] = field(default_factory=dict)
    deepen_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.deepen, Iterator):  # the rehearsal would exhaust it
            object.__setattr__(self, "deepen", tuple(self.deepen))

    @property
    def changes_model(self) -> bool:
        return self.widen is not None or self.deepen is not None


def grow_model(model: nn.Module, growth: Growth, seed: int) -> nn.Module:
    """Grow ``model``; return the same object where only the data grows. Raises as `surgery.widen` and `deepen`."""
    if growth.widen is not None:
        options = {"break_symmetry": "zero-sum", "seed": seed, **growth.widen_options}
        model = widen(model, growth.widen, **options)
    if growth.deepen is not None:
        model = deepen(model, growth.deepen, **{"seed": seed, **growth.deepen_options})
    return model


def record_growth(
    epoch: int, images: int, before: nn.Module, after: nn.Module, batch: Tensor, score: Score | None, started: float
) -> Grown:
    """Record the growth before ``epoch``, which began at time ``started``, on a ``batch`` of images."""
    if after is before:
        return Grown(epoch, images, (), None, None, None, score, time.perf_counter() - started)
    steps = Recipe(None, recipe(after).steps[len(recipe(before).steps) :])
    return Grown(
        epoch=epoch,
        images=images,
        steps=tuple(json.loads(steps.to_json())["steps"]),
        before=cost(before, batch),
        after=cost(after, batch),
        check=verify(after, before, batch),
        score=score,
        seconds=time.perf_counter() - started,
    )
