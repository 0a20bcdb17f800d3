"""The record of a training: scores, epochs, and how the model grew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from surgery.counting.cost import Cost
from surgery.errors import UsageError
from surgery.operations.verify import Verification
from surgery.settings import renamed


@dataclass(frozen=True)
class Score:
    """Number of test images that were classified correctly, and of all."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval of the accuracy; ``z`` is the normal quantile, 1.96 for 95 %."""
        n, p = self.total, self.accuracy
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)

    def guessed(self, classes: int) -> bool:
        """Whether the score is no better than guessing: the interval contains ``1 / classes``, or lies below."""
        return self.interval()[0] <= 1 / classes


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images: their number, mean loss, learning rate at the end, score on the test images,
    seconds."""

    images: int
    loss: float
    lr: float
    score: Score | None
    seconds: float

    @property
    def figures(self) -> dict[str, float]:
        """The epoch as numbers by name; ``accuracy`` only where it was scored."""
        scored = {} if self.score is None else {"accuracy": self.score.accuracy}
        return {"images": self.images, "loss": self.loss, "lr": self.lr, **scored, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Epoch:
        """Read an epoch from the plain JSON data of `History.to_dict`."""
        return cls(**{**content, "score": content["score"] and Score(**content["score"])})


@dataclass(frozen=True)
class Grown:
    """The record of a growth, with proof that the outputs did not change.

    Attributes:
        epoch: the epoch after it, counted from 0.
        images: number of training images from then on.
        steps: the steps of the recipe, as in its JSON; empty where only the data grew.
        before, after: costs of one image; None where only the data grew.
        check: outputs after against outputs before, on one batch of training images in ``eval()``; None likewise.
        score: on the test images right after it, if each epoch is scored.
        seconds: time to grow and compare.
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
    """The result of `surgery.train`.

    Attributes:
        epochs: the record of each epoch.
        steps: number of optimizer steps.
        growths: the record of each growth.
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
            UsageError: this is one stage of a longer procedure, whose result holds the module.
        """
        if self.trained is None:
            raise UsageError("this history is of one stage: the result of the whole procedure holds the module")
        return self.trained

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs) + sum(growth.seconds for growth in self.growths)

    def without_module(self) -> tuple[nn.Module, History]:
        """The trained model, and the history without it, to keep without the memory of the model."""
        return self.module, replace(self, trained=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the model."""
        return {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "steps": self.steps,
            "growths": [growth.to_dict() for growth in self.growths],
        }
