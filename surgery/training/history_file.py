"""The table of a run's epochs, which is written without torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.storage.folders import write_table

if TYPE_CHECKING:
    from surgery.training.history import History

HISTORY = "history.csv"
"""The file in the folder of a run with one row for each epoch."""

_COLUMNS = ("images", "loss", "lr", "accuracy", "seconds")


def write_history(trainings: Mapping[str, History | None], folder: Path) -> None:
    """Write ``history.csv`` into ``folder``: a row for each epoch of each training, named by task.

    Nothing is written where nothing was trained. ``accuracy`` is empty where an epoch was not scored.

    Args:
        trainings: records by task; None for a task that was left out.
        folder: it must exist.

    Example:
        >>> surgery.write_history({"train": surgery.train(model, data, epochs=3)}, Path("runs/mine"))
    """
    rows = [
        {"task": task, "epoch": number, **dict.fromkeys(_COLUMNS), **epoch.figures}
        for task, history in trainings.items()
        if history is not None
        for number, epoch in enumerate(history.epochs, 1)
    ]
    if rows:
        write_table(rows, folder / HISTORY)


def append_epoch(path: Path, task: str, number: int, figures: Mapping[str, float]) -> None:
    """Append an epoch to a table as `write_history` writes it; a new one begins with the names of its columns."""
    row = {"task": task, "epoch": number, **dict.fromkeys(_COLUMNS), **figures}
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, list(row))
        if not file.tell():
            table.writeheader()
        table.writerow(row)
