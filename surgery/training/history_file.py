"""The table of a run's epochs, which is written without torch."""

from __future__ import annotations

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
