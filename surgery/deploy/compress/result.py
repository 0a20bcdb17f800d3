"""The result of a compression as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from surgery.counting.cost import Cost
from surgery.deploy.compress.steps import CompressStep
from surgery.deploy.curve.points import DataSummary
from surgery.deploy.measure.benchmark import Comparison
from surgery.deploy.measure.environment import Environment
from surgery.graph.traced import info
from surgery.settings import CompressSettings
from surgery.training.history import Score


@dataclass(frozen=True)
class Compressed:
    """The result of `surgery.compress`.

    Attributes:
        module: the student, traced, in evaluation mode.
        dense: the traced model that it was made from, and that taught it.
        kind: of the budget: ``"macs"``, ``"params"``, ``"bytes"`` or ``"latency_ms"``.
        limit: the budget.
        measured: what the student takes, as `surgery.Budgeted` has it; never above ``limit``.
        steps: the record of each step. Scores in it are on the validation images.
        validation: score of the dense model on the validation images.
        dense_score, score: scores of both on the test images, which nothing before has seen.
        dense_cost, cost: of both, by `surgery.cost`.
        data: the data, with the validation images among those to train on.
        settings: how it was done.
        environment: where.
        seconds: time for all.
        command: the command that made it.
        timing: latencies of both ONNX files, with ``onnx``.
    """

    module: nn.Module = field(repr=False, compare=False)
    dense: nn.Module = field(repr=False, compare=False)
    kind: str
    limit: float
    measured: float
    steps: tuple[CompressStep, ...]
    validation: Score
    dense_score: Score
    score: Score
    dense_cost: Cost
    cost: Cost
    data: DataSummary
    settings: CompressSettings
    environment: Environment
    seconds: float
    command: str
    timing: Comparison | None = None

    @property
    def source(self) -> str:
        """What the dense model was built from, or its class."""
        return info(self.dense).source or "a model of one's own"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a reader should know before the figures."""
        found = []
        if self.dense_score.guessed(len(self.data.classes)):
            found.append("the dense model is no better than guessing: train it first")
        if not any(step.rates for step in self.steps):
            found.append("nothing was carved: the model keeps to the budget as it is")
        if self.timing is not None and self.timing.too_noisy:
            found.append(self.timing.too_noisy)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the models."""
        return {
            "schema": 1,
            "command": self.command,
            "source": self.source,
            "kind": self.kind,
            "limit": self.limit,
            "measured": self.measured,
            "dense": {
                "score": asdict(self.dense_score),
                "validation": asdict(self.validation),
                **self.dense_cost.to_dict(),
            },
            "student": {"score": asdict(self.score), **self.cost.to_dict()},
            "steps": [step.to_dict() for step in self.steps],
            "data": asdict(self.data),
            "settings": self.settings.to_dict(),
            "environment": self.environment.to_dict(),
            "seconds": self.seconds,
            "timing": self.timing and self.timing.to_dict(),
            "doubts": list(self.doubts),
        }
