"""Output of verbs: tables for people, JSON for programs, progress bars for long runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from surgery.cli.tables import Table
from surgery.progress import Progress as Told
from surgery.progress import tell_epoch


def emit(result: Any, as_json: bool, *tables: Table, note: str = "") -> None:
    """Print ``result`` as JSON, or the tables and the note that say the same to people."""
    if as_json:
        print(json.dumps(result))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        table.print(console)
    if note:
        console.print(Text(note), soft_wrap=True)


def table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    text: Iterable[str] = (),
    left: Iterable[str] = (),
) -> Table:
    """Make a table whose first column has names and the others figures.

    Args:
        text: columns of prose, which may be folded.
        left: columns set left, like names.
    """
    cells = tuple(tuple(str(cell) for cell in row) for row in rows)
    return Table(title, tuple(header), cells, frozenset(text), frozenset(left))


class Bars:
    """A `surgery.progress.Progress` that draws one bar for the whole run and one for its current stage.

    Drawing starts with the first progress, so a run that is refused prints one line only. If stderr is not a terminal,
    each stage prints a line, and another whenever `QUIET` seconds have passed without one.
    """

    QUIET = 30.0
    FIGURES = 40
    """Columns of a terminal reserved for a short bar and its figures: names are shortened to leave them free."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)  # this one, whatever an exporter makes of sys.stderr meanwhile
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=90,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said = 0.0

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, task: str, done: int, total: int) -> None:
        if task not in self._tasks:
            self._begin(task)
        elif task != "all" and done < total and monotonic() - self._said >= self.QUIET:
            self._say_unless_drawn(f"{task} {100 * done // total} %")
        self._progress.update(self._tasks[task], completed=done, total=total)
        if task != "all" and done == total:
            self._progress.update(self._tasks[task], visible=False)

    def _begin(self, task: str) -> None:
        self._progress.start()
        if task != "all":
            self._say_unless_drawn(f"{task} …")
        room = max(self._console.width - self.FIGURES, 1)
        label = "whole run" if task == "all" else task
        label = label if len(label) <= room else f"{label[: room - 1]}…"
        self._tasks[task] = self._progress.add_task(f"{label:<{min(28, room)}}", total=None)

    def epoch(self, task: str, number: int, figures: Mapping[str, float]) -> None:
        """Print the loss, the accuracy where it is known, and the learning rate."""
        accuracy = f", accuracy {figures['accuracy']:.2%}" if "accuracy" in figures else ""
        self.say(f"{task}, epoch {number}: loss {figures['loss']:.4g}{accuracy}, rate {figures['lr']:.3g}")

    def say(self, line: str) -> None:
        """Print a line, above the bars where they are drawn."""
        self._console.print(Text(line), soft_wrap=True)
        self._said = monotonic()

    def _say_unless_drawn(self, line: str) -> None:
        if not self._console.is_terminal:
            self.say(line)


class Whole:
    """A `surgery.progress.Progress` that passes each report on and adds the progress of the whole run (``"all"``).

    ``shares`` lists the tasks in order, each with the time it is likely to take; only proportions matter, and a run may
    skip a task.
    """

    def __init__(self, shares: Mapping[str, float], progress: Told) -> None:
        self._shares = shares
        self._progress = progress

    def __call__(self, task: str, done: int, total: int) -> None:
        self._progress(task, done, total)
        names = list(self._shares)
        before = sum(self._shares[name] for name in names[: names.index(task)])
        whole = (before + self._shares[task] * done / total) / sum(self._shares.values())
        self._progress("all", round(1000 * whole), 1000)

    def epoch(self, task: str, number: int, figures: Mapping[str, float]) -> None:
        """Pass on the figures of an epoch."""
        tell_epoch(self._progress, task, number, figures)
