"""Sensitivity: the worth of each part of a model, in accuracy, and its cost, in time."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import nn

from surgery.counting.cost import Cost, cost
from surgery.deploy.budget.clock import Clock, Timer
from surgery.deploy.budget.judge import Judged, judge
from surgery.deploy.budget.parts import find_parts, slim_each_alone
from surgery.deploy.measure.benchmark import Ratio
from surgery.deploy.measure.environment import Environment, environment
from surgery.deploy.measure.ratios import noise
from surgery.errors import UsageError
from surgery.graph.traced import info
from surgery.models import short
from surgery.operations.importance.registry import How, importance_name, rank_on
from surgery.operations.importance.scores import unit_scores
from surgery.operations.slim import slim
from surgery.progress import Progress
from surgery.settings import TimingSettings, accepts
from surgery.storage.folders import write_table
from surgery.training.data.data import Data

_INK, _LOSS, _TIME = "#222222", "#b3452c", "#0b6e99"


@dataclass(frozen=True)
class Slimmed:
    """A model with one part slimmed, not trained since.

    Attributes:
        name: the part.
        groups: the dimension groups of the part.
        judged: score and loss on the test images.
        cost: MACs, parameters and bytes.
        latency_ms: median latency of one query.
        over_dense: latency relative to the dense model.
        ratio: ``over_dense`` with its interval; for the dense model the A/A check. None with a timer.
        iqr_ms: interquartile range of latency; None with a timer.
    """

    name: str
    groups: tuple[str, ...]
    judged: Judged
    cost: Cost
    latency_ms: float
    over_dense: float
    ratio: Ratio | None
    iqr_ms: float | None


@dataclass(frozen=True)
class Sensitivity:
    """The effect of slimming each part alone.

    Attributes:
        source: source of the model.
        data: name of the data set.
        classes: number of classes.
        rate, importance, by: as given to `surgery.sensitivity`; of a criterion the name.
        dense: the model as it is.
        rows: one for each part, in the order of the forward pass.
    """

    source: str
    data: str
    classes: int
    rate: float
    importance: str
    by: str
    dense: Slimmed
    rows: tuple[Slimmed, ...]
    environment: Environment

    def drop(self, row: Slimmed) -> float:
        """The loss of accuracy, as a fraction of the test images."""
        return self.dense.judged.score.accuracy - row.judged.score.accuracy

    def saved(self, row: Slimmed) -> float:
        """The saved fraction of the dense model's latency; negative if it became slower."""
        return 1 - row.over_dense

    @property
    def name(self) -> str:
        """The model's name, without the rest of its source."""
        return short(self.source)

    @property
    def too_noisy(self) -> str:
        """Which latencies cannot be told apart, if the A/A check shows that the machine was noisy; else empty."""
        return noise(self.dense.ratio, "the whole model")

    @property
    def doubts(self) -> tuple[str, ...]:
        """Sentences that a reader should see before the figures."""
        found = [self.too_noisy] if self.too_noisy else []
        if self.dense.judged.score.guessed(self.classes):
            found.append("the model is no better than guessing: train it (--epochs)")
        return tuple(found)

    def to_rows(self) -> list[dict[str, Any]]:
        """One flat row for each part, for tables; accuracies and shares are fractions."""
        return [self._row(row) for row in self.rows]

    def _row(self, row: Slimmed) -> dict[str, Any]:
        low, high = row.judged.score.interval()
        return {
            "part": row.name,
            "groups": " ".join(row.groups),
            "accuracy": row.judged.score.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_drop": self.drop(row),
            "loss": row.judged.loss,
            "loss_gain": row.judged.loss - self.dense.judged.loss,
            "latency_ms": row.latency_ms,
            "iqr_ms": row.iqr_ms,
            "time_saved": self.saved(row),
            "time_saved_low": 1 - row.ratio.high if row.ratio else None,
            "time_saved_high": 1 - row.ratio.low if row.ratio else None,
            "macs_saved": 1 - row.cost.macs / self.dense.cost.macs,
            "params_saved": 1 - row.cost.params / self.dense.cost.params,
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        own = {name: getattr(self, name) for name in ("source", "data", "classes", "rate", "importance", "by")}
        whole = {**asdict(self.dense.judged.score), "loss": self.dense.judged.loss}
        times = {"latency_ms": self.dense.latency_ms, "iqr_ms": self.dense.iqr_ms}
        return {
            "schema": 1,
            **own,
            "dense": {**whole, **self.dense.cost.to_dict(), **times},
            "parts": self.to_rows(),
            "environment": self.environment.to_dict(),
            "check": self.dense.ratio and asdict(self.dense.ratio),
            "too_noisy": self.too_noisy or None,
            "doubts": list(self.doubts),
        }


@accepts(TimingSettings)
def sensitivity(
    module: nn.Module,
    data: Data,
    *,
    rate: float = 0.5,
    by: str = "group",
    importance: How = "prefix",
    round_to: int = 1,
    limit: int | None = None,
    settings: TimingSettings = TimingSettings(),
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Slim each part of a trained model alone, and measure the loss of accuracy and the saving of time.

    Nothing is trained in between: the damage before fine-tuning ranks the parts. The damage of several parts together
    is not the sum of their separate damages.

    Args:
        module: a traced module. It is not changed.
        data: its test images, or ``limit`` of them, give the accuracy.
        rate: the rate at which each part is slimmed.
        by: a part is each dimension ``"group"``, or each ``"stage"`` (`surgery.deploy.budget.parts.find_parts`).
        importance, round_to: as in `surgery.slim`. A criterion on data that has none of its own looks at the training
            images of ``data``.
        limit: largest number of test images.
        settings: how models are timed, see `surgery.TimingSettings`; its fields may be given as keywords.
        timer: from modules by name to ms by name; replaces the measurement.
        progress: called with ``"score"`` and ``"time"``.

    Returns:
        A row for each part, in the order of the forward pass.

    Raises:
        UsageError: a rate outside (0, 1], or an unknown setting.
        EditError: nothing in the model can be slimmed.

    Example:
        >>> surgery.sensitivity(traced, data, rate=0.5, by="stage").to_rows()
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}: it must be at least 1")
    found = find_parts(module, by)
    worth = unit_scores(module, rank_on(importance, data))
    slim(module, rate, round_to=round_to, importance=worth)  # refuses at once
    modules = {"": module}
    modules.update(slim_each_alone(module, found, rate, round_to=round_to, importance=worth))
    scores = {}
    for done, (name, candidate) in enumerate(modules.items(), 1):
        scores[name] = judge(candidate, data.test, most=limit)
        if progress is not None:
            progress("score", done, len(modules))
    clock = Clock(settings, timer, check=True)
    times = clock.times(modules, progress)
    dense, *rows = (
        Slimmed(
            name=name,
            groups=tuple(group.name for group in found.get(name, ())),
            judged=scores[name],
            cost=cost(candidate),
            latency_ms=times[name].ms,
            over_dense=times[name].over_first,
            ratio=times[name].ratio,
            iqr_ms=times[name].iqr_ms,
        )
        for name, candidate in modules.items()
    )
    source = info(module).source or type(module).__name__
    name, classes = importance_name(importance), len(data.classes)
    return Sensitivity(source, data.source, classes, rate, name, by, dense, tuple(rows), environment())


def write_sensitivity(result: Sensitivity, folder: Path) -> None:
    """Write ``sensitivity.csv``, ``.json`` and ``.png``.

    Args:
        result: what `surgery.sensitivity` returned.
        folder: an existing folder.

    Example:
        >>> surgery.write_sensitivity(surgery.sensitivity(traced, data), Path("runs"))
    """
    write_table(result.to_rows(), folder / "sensitivity.csv")
    (folder / "sensitivity.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    _draw(result, folder / "sensitivity.png")


def _draw(result: Sensitivity, path: Path) -> None:
    """Draw two bars for each part: lost accuracy and saved time."""
    count = len(result.rows)
    doubts = [line for doubt in result.doubts for line in textwrap.wrap(doubt, 120)]
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(10, 1.9 + 0.3 * count + 0.2 * len(doubts)), dpi=150, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    lost, saved = figure.subplots(1, 2, sharey=True)
    places: Sequence[int] = range(count)
    accuracy = result.dense.judged.score.accuracy
    drops = [100 * result.drop(row) for row in result.rows]
    intervals = [[100 * (accuracy - bound) for bound in row.judged.score.interval()[::-1]] for row in result.rows]
    reach = [[max(0.0, d - i[0]) for d, i in zip(drops, intervals, strict=True)],
             [max(0.0, i[1] - d) for d, i in zip(drops, intervals, strict=True)]]  # fmt: skip
    lost.barh(places, drops, xerr=reach, color=_LOSS, ecolor=_INK, error_kw={"elinewidth": 1, "capsize": 2})
    lost.set_xlabel("accuracy lost, points (bars: 95% interval)")
    gains = [100 * result.saved(row) for row in result.rows]
    saved.barh(places, gains, color=_TIME)
    for place, row in zip(places, result.rows, strict=True):
        if row.ratio is not None:
            ends = [100 * (1 - row.ratio.high), 100 * (1 - row.ratio.low)]
            saved.plot(ends, [place, place], color=_INK, linewidth=1)
    saved.set_xlabel("time saved, % of the whole model's (lines: 95% interval)")
    lost.set_yticks(places, [row.name for row in result.rows], fontsize=8)
    lost.set_ylim(count - 0.4, -0.6)
    for axes in (lost, saved):
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{result.name} on {result.data}: each {result.by} alone at {result.rate:g} of its width, not trained since\n"
        f"the whole model: {accuracy:.1%}, {result.dense.latency_ms:.2f} ms" + "".join(f"\n{line}" for line in doubts),
        fontsize=11,
        x=0.02,
        ha="left",
    )
    figure.savefig(path)
