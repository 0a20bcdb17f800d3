"""What verbs that train have in common: options, and runs that are cut off and go on, in one process or several."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.output import Bars, Whole
from surgery.folders import unfinished, unfinished_folder
from surgery.progress import Progress
from surgery.training.descent import OPTIMIZERS, SCHEDULES
from surgery.training.engine import Engine

Optimizer = Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")]
Schedule = Annotated[str, typer.Option(help=f"{', '.join(SCHEDULES)}.")]
BatchSize = Annotated[int, typer.Option(help="Images of one training step, of all processes together.")]
LabelSmoothing = Annotated[float, typer.Option(help="Of the labels, from 0 to 1.")]
Augment = Annotated[str, typer.Option(help="Training images: none, flip or flip-crop.")]
Precision = Annotated[str | None, typer.Option(help="no, bf16 or fp16. [default: no, or what accelerate launch says]")]
Workers = Annotated[int, typer.Option(help="Processes that read images.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(metavar="STEPS", help="Be able to go on after so many steps, and after each epoch.")
]

_WITHOUT_EFFECT = {"out", "force", "as_json", "device", "workers", "checkpoint_every"}
"""Options that may be others when a run is continued."""


def chosen(context: typer.Context) -> dict[str, Any]:
    """What the command was called with, as plain JSON data, without the options that change nothing of its result."""
    settings = {name: value for name, value in context.params.items() if name not in _WITHOUT_EFFECT}
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


@contextmanager
def one_after_the_other(engine: Engine) -> Iterator[None]:
    """The main process first, then the others."""
    if not engine.main:
        engine.wait()
    yield
    if engine.main:
        engine.wait()


@contextmanager
def under_way(
    engine: Engine, out: Path, settings: Mapping[str, Any], shares: Mapping[str, float], *, force: bool
) -> Iterator[tuple[Path, Progress | None]]:
    """The folder of a run's checkpoints, and whom to tell how far it is.

    The main process makes the folder, draws, and removes the folder when the block ends; the others wait for it. Where
    the run is interrupted, it says how to go on.
    """
    if not engine.main:
        engine.wait()
        yield unfinished(out), None
        return
    with interruptible(), Bars() as bars, unfinished_folder(out, settings, force=force) as folder:
        engine.wait()
        yield folder, Whole(shares, bars)


@contextmanager
def interruptible() -> Iterator[None]:
    """Where a run is interrupted, say what is kept of it: an interruption, unlike an error, may not come to `main`."""
    try:
        yield
    except KeyboardInterrupt as error:
        for note in getattr(error, "__notes__", ()):
            print(f"{note}: give the same command again to go on", file=sys.stderr)
        raise
