"""The search for a model that keeps to a limit: make one by the prediction, measure it, correct the prediction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from surgery.deploy.budget.predict import Latency, Linear
from surgery.deploy.budget.widths import Levels, Widths
from surgery.errors import BudgetWarning, EditError
from surgery.progress import Progress
from surgery.units import counted

KINDS: Mapping[str, str] = {"latency_ms": "ms", "macs": "MACs", "params": "parameters", "bytes": "bytes"}
"""Kinds of budgets, and their units."""


@dataclass(frozen=True)
class Figure:
    """A figure of a search, told as soon as it is known.

    Attributes:
        what: ``"dense"``; ``"smallest"``, the narrowest model that is allowed; ``"probe"``, for latency, a model that
            teaches the prediction; ``"trial"``, a model on the way.
        kind, limit: of the budget.
        measured: in the unit of the budget.
        predicted: of a trial; else None.
        name: which probe; else empty.
    """

    what: str
    kind: str
    limit: float
    measured: float
    predicted: float | None = None
    name: str = ""


Told = Callable[[Figure], None]
"""Receives the figures of a search, each as soon as it is known."""


@dataclass(frozen=True)
class Trial:
    """The prediction and the measurement of a model on the way."""

    predicted: float
    measured: float


class Search:
    """Makes and measures models until one keeps to the limit and nearly uses it."""

    def __init__(
        self,
        space: Widths,
        predict: Latency | Linear,
        measure: Callable[[nn.Module], float],
        limit: float,
        tolerance: float,
        kind: str,
        told: Told,
    ) -> None:
        self._space, self._predict, self._measure = space, predict, measure
        self._limit, self._tolerance, self._kind = limit, tolerance, kind
        self._told = told
        self._scale = 1.0
        self.trials: list[Trial] = []

    def run(self, rounds: int, tell: Progress) -> tuple[Levels, Trial]:
        """Return the measured levels that keep to the limit with the least damage.

        Raises `EditError` if even the smallest model exceeds the limit.
        """
        timed = isinstance(self._predict, Latency)
        aim = self._limit * (1 - self._tolerance / 2 if timed else 1)
        fitting: list[tuple[float, Levels, Trial]] = []
        seen: set[tuple[int, ...]] = set()
        for number in range(rounds):
            levels = self._space.fit(lambda kept: self._predict(kept) * self._scale, aim)
            if tuple(levels) in seen:
                if fitting:
                    break
                aim *= 1 - self._tolerance
                continue
            seen.add(tuple(levels))
            trial = self._try(levels)
            tell("search", number + 1, rounds)
            if trial.measured <= self._limit:
                fitting.append((self._space.harm(levels), levels, trial))
                if trial.measured >= self._limit * (1 - self._tolerance):
                    break
        if not fitting:
            levels = self._space.smallest
            trial = self._try(levels)
            if trial.measured > self._limit:
                raise unreachable(self._limit, trial.measured, self._kind, self._space.levels[-1])
            fitting.append((self._space.harm(levels), levels, trial))
            self._warn()
        tell("search", rounds, rounds)
        _, levels, trial = min(fitting, key=lambda item: item[0])
        return levels, trial

    def _warn(self) -> None:
        """Say that only the smallest model is left, and what the others took."""
        *others, last = self.trials
        if not others:
            return
        unit = KINDS[self._kind]
        taken = sorted(trial.measured for trial in others)
        warnings.warn(
            f"only the smallest model allowed was measured within {self._limit:.4g} {unit} (it takes "
            f"{last.measured:.4g}); {counted(len(others), 'model')} before it, predicted to keep to it, took "
            f"{taken[0]:.4g} to {taken[-1]:.4g}. Try again on a machine without other work, or allow more",
            BudgetWarning,
            stacklevel=4,
        )

    def _try(self, levels: Levels) -> Trial:
        """Measure a model, and correct the prediction by it."""
        kept = self._space.shares(levels[:, None])
        predicted = float(self._predict(kept)[0]) * self._scale
        module = self._space.make(levels)
        measured = self._measure(module)
        if isinstance(self._predict, Latency):
            self._predict.learn(kept[:, 0], measured)
        self._scale = measured / float(self._predict(kept)[0])
        self.trials.append(Trial(predicted, measured))
        self._told(Figure("trial", self._kind, self._limit, measured, predicted))
        return self.trials[-1]


def unreachable(limit: float, taken: float, kind: str, least: float) -> EditError:
    """Make the error for a limit that the smallest model exceeds."""
    unit = KINDS[kind]
    return EditError(
        f"no model of these widths keeps to {limit:.10g} {unit}: the smallest, {least:g} of every width, takes "
        f"{taken:.10g} {unit}; allow more, or begin with a smaller model"
    )
