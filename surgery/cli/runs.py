"""Runs that can be interrupted and resumed, in one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import surgery
from surgery.cli.output import Bars, Whole
from surgery.progress import Progress
from surgery.settings import TrainSettings
from surgery.storage.folders import unfinished, unfinished_folder

if TYPE_CHECKING:
    from surgery import Engine


@contextmanager
def one_after_the_other(engine: Engine) -> Iterator[None]:
    """Run the block in the main process first, then in the others."""
    if not engine.main:
        engine.wait()
    yield
    if engine.main:
        engine.wait()


@contextmanager
def under_way(
    engine: Engine,
    out: Path,
    settings: Mapping[str, Any],
    shares: Mapping[str, float],
    training: TrainSettings,
    *,
    force: bool,
) -> Iterator[tuple[Path, Progress | None]]:
    """Give the folder of a run's checkpoints, and the function to report progress to.

    The main process makes the folder, draws the progress, logs epochs to the table in the folder and to the tracker of
    ``training``, and removes the folder when the block ends; the others wait for it.
    """
    if not engine.main:
        engine.wait()
        yield unfinished(out), None
        return
    with Bars() as bars, unfinished_folder(out, settings, force=force) as folder:
        engine.wait()
        with surgery.follow(training, Whole(shares, bars), history=folder / "history.csv") as progress:
            yield folder, progress
