"""What a tradeoff run found, as data: one point for each model, and which of them are worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from surgery.deploy.measure.benchmark import BenchmarkResult, Ratio
from surgery.deploy.measure.environment import Environment
from surgery.deploy.measure.ratios import noise
from surgery.models import short
from surgery.settings import TradeoffSettings
from surgery.training.data.data import Data, Normalisation
from surgery.training.history import History, Score


@dataclass(frozen=True)
class Point:
    """One model of the curve. Accuracy and latency are those of its ONNX file."""

    name: str
    """What was done to the dense model, as `candidates.parse` reads it: ``0.5`` for a split rate."""
    rate: float | None
    """Split rate at which it was carved; None where it is not one for the whole model."""
    folder: str
    """Where its checkpoint and its ONNX file are, relative to the run's folder."""
    params: int
    macs: int
    """Multiply-accumulates of one image."""
    score: Score
    latency: BenchmarkResult
    speedup: Ratio | None
    """Latency of the first point over this one's, with its interval; None for the first itself."""
    training: Mapping[str, History]
    """How it was trained after it was carved, by stage; empty if it was not."""

    budget: Mapping[str, Any] | None = None
    """How its widths were found, where it was slimmed to a budget: `surgery.deploy.budget.budget.Budgeted` as data."""

    @property
    def takes(self) -> float | None:
        """What there is a budget of, as it was found in the end: for latency, the median of this run."""
        if self.budget is None:
            return None
        own = {"latency_ms": self.latency.p50_ms, "macs": self.macs, "params": self.params}
        return float(own.get(self.budget["kind"], self.budget["measured"]))

    @property
    def over(self) -> bool:
        """Whether it takes more than its budget."""
        return self.budget is not None and self.takes is not None and self.takes > self.budget["limit"]

    @property
    def history(self) -> History | None:
        """How its last stage of training went; None if there was none."""
        return list(self.training.values())[-1] if self.training else None

    def quantile_ms(self, q: float) -> float:
        """Latency in ms that a fraction ``q`` of the timed queries did not exceed."""
        return float(np.quantile(self.latency.samples_ms, q))

    def to_row(self) -> dict[str, Any]:
        """The point as one flat row, for tables; accuracies are fractions."""
        low, high = self.score.interval()
        return {
            "candidate": self.name,
            "split_rate": self.rate,
            "folder": self.folder,
            "params": self.params,
            "macs": self.macs,
            "onnx_bytes": self.latency.file_bytes,
            "peak_memory_bytes": self.latency.peak_memory_bytes,
            "correct": self.score.correct,
            "tested": self.score.total,
            "accuracy": self.score.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            **{f"p{p}_ms": self.quantile_ms(p / 100) for p in (10, 25, 50, 75, 90, 99)},
            "throughput": self.latency.throughput,
            "speedup": self.speedup.value if self.speedup else 1.0,
            "speedup_low": self.speedup.low if self.speedup else 1.0,
            "speedup_high": self.speedup.high if self.speedup else 1.0,
        }


@dataclass(frozen=True)
class DataSummary:
    """The data a run was trained and tested on; images are scaled to ``image_size`` pixels and normalised."""

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
    """A measured speed/accuracy curve; ``points`` are in order of falling split rate, and what has none comes last."""

    source: str
    data: DataSummary
    settings: TradeoffSettings
    """As given, with the weights and the threads that were used."""
    points: tuple[Point, ...]
    history: History | None
    """How the dense model was trained; None if it was not."""
    reused: tuple[str, ...]
    """What was trained by an earlier run and taken over: ``dense``, and names of points."""
    environment: Environment
    seconds: float
    command: str
    check: Ratio | None = None
    """The A/A check of the latencies: the first point's ratio to itself."""

    @property
    def too_noisy(self) -> str:
        """That the machine was too noisy for these speed-ups, if the A/A check shows it; else empty."""
        return noise(self.check, self.points[0].folder)

    @property
    def name(self) -> str:
        """The model's name without what its source says besides it."""
        return short(self.source)

    @property
    def front(self) -> tuple[Point, ...]:
        """The Pareto front, from fast to slow: the points that no other beats in median latency and accuracy both."""
        found = pareto([(p.latency.p50_ms, p.score.accuracy) for p in self.points])
        return tuple(sorted((self.points[i] for i in found), key=lambda p: p.latency.p50_ms))

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each point, with whether it is on the Pareto front."""
        front = self.front
        return [{**point.to_row(), "pareto": point in front} for point in self.points]

    def to_dict(self) -> dict[str, Any]:
        """Everything, raw latency samples included, as plain JSON data."""
        points = [
            {
                **row,
                "budget": point.budget and {**point.budget, "takes": point.takes},
                "training": {stage: history.to_dict() for stage, history in point.training.items()},
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
        }


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no different one beats or equals in both."""

    def dominated(cost: float, value: float) -> bool:
        return any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)

    return [i for i, (cost, value) in enumerate(points) if not dominated(cost, value)]
