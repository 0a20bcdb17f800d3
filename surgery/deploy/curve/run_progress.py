"""The overall progress of a run of many tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from surgery.progress import Progress, tell_epoch


class RunProgress:
    """Reports the overall progress of a run, from the progress and the expected duration of its tasks."""

    def __init__(self, weights: Mapping[str, float], progress: Progress | None) -> None:
        self._weights = weights
        self._total = sum(weights.values())
        self._finished = 0.0
        self._progress = progress

    @contextmanager
    def task(self, name: str) -> Iterator[Progress]:
        """Report the begin and the end of a task; yield the callback for its steps."""
        self(name, 0, 1)
        yield self
        self(name, 1, 1)
        self._finished += self._weights[name]

    def __call__(self, task: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(task, done, total)
            whole = self._finished + self._weights[task] * done / total
            self._progress("all", round(1000 * whole / self._total), 1000)

    def epoch(self, task: str, number: int, figures: Mapping[str, float]) -> None:
        """Pass on the figures of an epoch."""
        tell_epoch(self._progress, task, number, figures)


@dataclass(frozen=True)
class PartProgress:
    """Reports the progress of ``whole`` from the progress of its parts, with equal weights."""

    progress: Progress
    whole: str
    names: Sequence[str]

    def __call__(self, task: str, done: int, total: int) -> None:
        self.progress(self.whole, round(1000 * (self.names.index(task) + done / total) / len(self.names)), 1000)

    def epoch(self, task: str, number: int, figures: Mapping[str, float]) -> None:
        """Pass on the figures of an epoch of a part."""
        tell_epoch(self.progress, f"{self.whole}, {task}", number, figures)
