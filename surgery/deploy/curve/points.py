"""The result of a tradeoff run as data: a point for each model, and the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from surgery.deploy.curve.seeds import Estimate, Repeat, estimate, paired
from surgery.deploy.measure.benchmark import BenchmarkResult, Ratio
from surgery.deploy.measure.environment import Environment
from surgery.deploy.measure.ratios import noise
from surgery.models import short
from surgery.settings import TradeoffSettings
from surgery.training.data.data import Data, Normalisation
from surgery.training.history import History, Score
from surgery.units import counted, quantity


@dataclass(frozen=True)
class Point:
    """One model of the curve. Accuracy and latency are measured on its ONNX file.

    With several seeds ``score``, ``latency``, ``training`` and ``control`` are of the first, ``repeats`` of the rest.

    Attributes:
        name: the operations on the dense model, as `candidates.parse` reads them: ``0.5`` for a split rate.
        rate: the split rate; None unless it is one number for the whole model.
        folder: folder of its checkpoint and ONNX file, relative to the run's.
        macs: multiply-accumulates of one image.
        speedup: latency of the first point over this one's, with its interval; None for the first.
        training: the records of its training by stage; empty if it was not trained.
        budget: how its widths were found, as data of `surgery.Budgeted`, if it was slimmed to a budget.
        control: the score of a model of the same sizes that was trained from scratch, with ``control="scratch"``;
            ``control_history`` is the record of its training.
        repeats: the same candidate, trained with further seeds.
    """

    name: str
    rate: float | None
    folder: str
    params: int
    macs: int
    score: Score
    latency: BenchmarkResult
    speedup: Ratio | None
    training: Mapping[str, History]
    budget: Mapping[str, Any] | None = None
    control: Score | None = None
    control_history: History | None = None
    repeats: tuple[Repeat, ...] = ()

    @property
    def scores(self) -> tuple[Score, ...]:
        """The score with each seed."""
        return (self.score, *(one.score for one in self.repeats))

    @property
    def accuracy(self) -> float:
        """The accuracy, or its mean over seeds."""
        return _mean(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy: Wilson's, or Student's over seeds."""
        return _interval(self.scores)

    @property
    def controls(self) -> tuple[Score, ...]:
        """The score of the control with each seed."""
        return tuple(one for one in (self.control, *(one.control for one in self.repeats)) if one is not None)

    @property
    def control_accuracy(self) -> float | None:
        """The accuracy of the control, or its mean over seeds."""
        return _mean(self.controls) if self.controls else None

    @property
    def control_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, as ``interval``."""
        return _interval(self.controls) if self.controls else None

    @property
    def takes(self) -> float | None:
        """The final cost in the unit of the budget; for latency, the median of this run."""
        if self.budget is None:
            return None
        own = {"latency_ms": self.latency.p50_ms, "macs": self.macs, "params": self.params}
        return float(own.get(self.budget["kind"], self.budget["measured"]))

    @property
    def over(self) -> bool:
        """Whether the model exceeds its budget."""
        return self.budget is not None and self.takes is not None and self.takes > self.budget["limit"]

    @property
    def gain(self) -> str:
        """The speed-up as text, without its interval."""
        return "1" if self.speedup is None else f"{self.speedup.value:.2f}"

    @property
    def gain_with_interval(self) -> str:
        """The speed-up as text, with its interval."""
        return self.gain if self.speedup is None else f"{self.gain} ({self.speedup.low:.2f} – {self.speedup.high:.2f})"

    def budget_text(self, value: float) -> str:
        """A value in the unit of the budget, as text."""
        latency = self.budget is not None and self.budget["kind"] == "latency_ms"
        return f"{value:.3f} ms" if latency else quantity(value)

    @property
    def history(self) -> History | None:
        """The record of the last stage of training; None if there was none."""
        return list(self.training.values())[-1] if self.training else None

    def quantile_ms(self, q: float) -> float:
        """The latency in ms that a fraction ``q`` of the queries did not exceed."""
        return float(np.quantile(self.latency.samples_ms, q))

    def to_row(self) -> dict[str, Any]:
        """The point as one flat row, for tables; accuracies are fractions, and images are counted over all seeds."""
        low, high = self.interval
        scratch_low, scratch_high = self.control_interval or (None, None)
        return {
            "candidate": self.name,
            "split_rate": self.rate,
            "folder": self.folder,
            "params": self.params,
            "macs": self.macs,
            "onnx_bytes": self.latency.file_bytes,
            "peak_memory_bytes": self.latency.peak_memory_bytes,
            "correct": sum(score.correct for score in self.scores),
            "tested": sum(score.total for score in self.scores),
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "scratch_accuracy": self.control_accuracy,
            "scratch_low": scratch_low,
            "scratch_high": scratch_high,
            **{f"p{p}_ms": self.quantile_ms(p / 100) for p in (10, 25, 50, 75, 90, 99)},
            "throughput": self.latency.throughput,
            "speedup": self.speedup.value if self.speedup else 1.0,
            "speedup_low": self.speedup.low if self.speedup else 1.0,
            "speedup_high": self.speedup.high if self.speedup else 1.0,
        }


@dataclass(frozen=True)
class DataSummary:
    """The data of a run; images are scaled to ``image_size`` pixels and normalised."""

    source: str
    train_images: int
    test_images: int
    classes: tuple[str, ...]
    image_size: int
    normalisation: Normalisation

    @classmethod
    def of(cls, data: Data) -> DataSummary:
        return cls(data.source, *data.counts, data.classes, data.image_size, data.normalisation)


@dataclass(frozen=True)
class Tradeoff:
    """A measured speed/accuracy curve.

    Attributes:
        settings: as given, with the weights and threads that were used.
        points: in order of falling split rate; points without a rate come last.
        history: the training of the dense model; None if it was not trained.
        reused: models that were loaded from an earlier run: ``dense``, and names of points.
        check: the A/A check of latencies, the ratio of the first point to itself.
    """

    source: str
    data: DataSummary
    settings: TradeoffSettings
    points: tuple[Point, ...]
    history: History | None
    reused: tuple[str, ...]
    environment: Environment
    seconds: float
    command: str
    check: Ratio | None = None

    @property
    def too_noisy(self) -> str:
        """Which speed-ups cannot be told apart, if the A/A check shows that the machine was noisy; else empty."""
        others = {point.name: point.speedup.inverse for point in self.points if point.speedup is not None}
        return noise(self.check, "the first model", others)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a reader should know before the figures: which cannot be told apart, and which models only guess."""
        found = [self.too_noisy] if self.too_noisy else []
        classes = len(self.data.classes)
        guess = [point.name for point in self.points if all(score.guessed(classes) for score in point.scores)]
        if guess:
            whom = "every model" if len(guess) == len(self.points) else f"at {', '.join(guess)} the model"
            chance = f"{1 / len(self.data.classes):.1%}"
            found.append(f"{whom} is no better than guessing, which gives {chance}: train longer, or see the settings")
        return tuple(found)

    @property
    def name(self) -> str:
        """The model's name, without the rest of its source."""
        return short(self.source)

    @property
    def controlled(self) -> bool:
        """Whether models of the same sizes were trained from scratch, too."""
        return any(point.control is not None for point in self.points)

    @property
    def seeded(self) -> bool:
        """Whether candidates were trained with several seeds."""
        return any(point.repeats for point in self.points)

    def difference(self, point: Point) -> Estimate | None:
        """The accuracy of ``point`` less that of the first one, paired by seed; None of the first, or for one seed."""
        first = self.points[0]
        if point is first or not point.repeats:
            return None
        return paired([score.accuracy for score in point.scores], [score.accuracy for score in first.scores])

    @property
    def conditions(self) -> str:
        """How points were timed and scored, in a line."""
        side, threads = self.data.image_size, counted(self.points[0].latency.threads, "thread")
        over = f", {self.settings.seeds} seeds" if self.seeded else ""
        return (
            f"ONNX Runtime, CPU, {threads}, one {side} x {side} image at a time; {self.data.test_images} test images"
            f"{over}"
        )

    @property
    def front(self) -> tuple[Point, ...]:
        """The Pareto front, from fast to slow: points that no other beats in both median latency and accuracy."""
        found = pareto([(p.latency.p50_ms, p.accuracy) for p in self.points])
        return tuple(sorted((self.points[i] for i in found), key=lambda p: p.latency.p50_ms))

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each point; ``pareto`` says whether it is on the front.

        With several seeds, ``difference`` is the accuracy less that of the first point, paired by seed.
        """
        front = self.front
        return [
            {**point.to_row(), "pareto": point in front, **(self._over_seeds(point) if self.seeded else {})}
            for point in self.points
        ]

    def _over_seeds(self, point: Point) -> dict[str, Any]:
        found = self.difference(point)
        return {
            "seeds": len(point.scores),
            "difference": found and found.mean,
            "difference_low": found and found.low,
            "difference_high": found and found.high,
        }

    def to_dict(self) -> dict[str, Any]:
        """All data, raw latency samples included, as plain JSON data."""
        points = [
            {
                **row,
                "budget": point.budget and {**point.budget, "takes": point.takes},
                "training": {stage: history.to_dict() for stage, history in point.training.items()},
                "scratch": point.control_history and point.control_history.to_dict(),
                **({"repeats": [_repeat(one) for one in point.repeats]} if point.repeats else {}),
                "benchmark": point.latency.to_dict(),
            }
            for row, point in zip(self.rows(), self.points, strict=True)
        ]
        return {
            "schema": 2,
            "source": self.source,
            "command": self.command,
            "data": asdict(self.data),
            "settings": {"candidates": [point.name for point in self.points], **self.settings.to_dict()},
            "points": points,
            "history": self.history.to_dict() if self.history else None,
            "reused": list(self.reused),
            "environment": self.environment.to_dict(),
            "seconds": self.seconds,
            "check": self.check and asdict(self.check),
            "too_noisy": self.too_noisy or None,
            "doubts": list(self.doubts),
        }


def _mean(scores: Sequence[Score]) -> float:
    return scores[0].accuracy if len(scores) == 1 else estimate([score.accuracy for score in scores]).mean


def _interval(scores: Sequence[Score]) -> tuple[float, float]:
    if len(scores) == 1:
        return scores[0].interval()
    found = estimate([score.accuracy for score in scores])
    return max(0.0, found.low), min(1.0, found.high)


def _repeat(one: Repeat) -> dict[str, Any]:
    """As plain JSON data."""
    return {
        "seed": one.seed,
        "score": asdict(one.score),
        "training": {stage: history.to_dict() for stage, history in one.training.items()},
        "scratch_score": one.control and asdict(one.control),
        "scratch": one.control_history and one.control_history.to_dict(),
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no different one beats or equals in both."""

    def dominated(cost: float, value: float) -> bool:
        return any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)

    return [i for i, (cost, value) in enumerate(points) if not dominated(cost, value)]
