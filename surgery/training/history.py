"""The record of a training: scores, epochs, and how the model grew."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from surgery.counting.cost import Cost
from surgery.errors import UsageError
from surgery.operations.verify import Verification
from surgery.settings import renamed


@dataclass(frozen=True)
class Score:
    """How many of the test images were classified correctly."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval for the accuracy; ``z`` is the normal quantile, 1.96 for 95 %."""
        n, p = self.total, self.accuracy
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)

    def guessed(self, classes: int) -> bool:
        """Whether this is no better than guessing: the interval goes down to one in ``classes``."""
        return self.interval()[0] <= 1 / classes


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images: how many there were, mean loss, learning rate at its end, score on the test
    images, seconds."""

    images: int
    loss: float
    lr: float
    score: Score | None
    seconds: float


@dataclass(frozen=True)
class Grown:
    """What a growth did, and that it changed nothing else.

    Attributes:
        epoch: the epoch that it came before, counted from 0.
        images: the number of training images from then on.
        steps: the steps of the recipe, as in its JSON; none where only the data grew, and then nothing is compared.
        before: what one image costs before.
        after: and after.
        check: the model's outputs after against those before, on one batch of training images in ``eval()``.
        score: on the test images at step 0, where each epoch is scored.
        seconds: what growing and comparing took.
    """

    epoch: int
    images: int
    steps: tuple[dict[str, Any], ...]
    before: Cost | None
    after: Cost | None
    check: Verification | None
    score: Score | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "steps": list(self.steps), "check": self.check and self.check.to_dict()}


@dataclass(frozen=True)
class History:
    """What `surgery.train` returns.

    Attributes:
        epochs: what happened, epoch by epoch.
        steps: steps of the optimizer.
        growths: how the model and the data grew.
    """

    epochs: tuple[Epoch, ...]
    steps: int
    growths: tuple[Grown, ...] = ()
    trained: nn.Module | None = field(default=None, repr=False, compare=False)

    model = renamed("module", "model")

    @property
    def module(self) -> nn.Module:
        """The trained model: a new module.

        Raises:
            UsageError: this is the history of one stage of a longer procedure, whose result holds the module.
        """
        if self.trained is None:
            raise UsageError("this history is of one stage: the result of the whole procedure holds the module")
        return self.trained

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs) + sum(growth.seconds for growth in self.growths)

    def without_module(self) -> tuple[nn.Module, History]:
        """The trained model, and the history alone, which may be kept without keeping the model in memory."""
        return self.module, replace(self, trained=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the model."""
        return {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "steps": self.steps,
            "growths": [growth.to_dict() for growth in self.growths],
        }
