"""Epochs of a training in TensorBoard, Weights & Biases or MLflow, through the trackers of `accelerate`."""

from __future__ import annotations

import functools
import inspect
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from surgery.errors import UsageError
from surgery.progress import Progress, tell_epoch
from surgery.settings import TRACKERS, TrainSettings
from surgery.training.history_file import append_epoch

P = ParamSpec("P")
R = TypeVar("R")

_FOLLOWED: ContextVar[bool] = ContextVar("_FOLLOWED", default=False)
"""Whether a procedure is followed already: the trainings that it consists of are parts of its run."""


def followed(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function with ``settings`` and ``progress`` log its epochs to the tracker of its settings."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        with follow(bound.arguments["settings"], bound.arguments.get("progress")) as progress:
            bound.arguments["progress"] = progress
            return function(*bound.args, **bound.kwargs)

    return call


@contextmanager
def follow(
    settings: TrainSettings, progress: Progress | None = None, *, history: str | os.PathLike[str] | None = None
) -> Iterator[Progress | None]:
    """Make one run of the tracker of several trainings in the block. A single procedure does so by itself.

    Args:
        settings: its ``tracker`` is used, and all of them are stored with the run.
        progress: told of all, too.
        history: a table to which a row for each epoch is appended when it ends, as `surgery.write_history` has them.

    Returns:
        a context manager that gives the progress to pass to the trainings.

    Raises:
        UsageError: a tracker whose package is not installed.

    Example:
        >>> settings = surgery.TrainSettings(epochs=3, tracker="tensorboard:logs")
        >>> with surgery.follow(settings) as progress:
        ...     teacher = surgery.train(large, data, settings, progress=progress, task="teacher").module
        ...     student = surgery.train(small, data, settings, progress=progress, task="student").module
    """
    if history is not None:
        progress = _Table(Path(history), progress)
    if settings.tracker is None or _FOLLOWED.get():
        yield progress
        return
    following = _Following(make_tracker(settings.tracker), progress, settings.to_dict())
    token = _FOLLOWED.set(True)
    try:
        yield following
    finally:
        _FOLLOWED.reset(token)
        following.finish()


class _Table:
    """Passes progress on, and appends each epoch to a table."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        self._path, self._progress = path, progress

    def __call__(self, task: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(task, done, total)

    def epoch(self, task: str, number: int, figures: Mapping[str, float]) -> None:
        append_epoch(self._path, task, number, figures)
        tell_epoch(self._progress, task, number, figures)


class _Following:
    """Passes progress on, and logs epochs to a tracker, which it starts with the first report.

    Only the main process of several is told of progress, so only that one logs.
    """

    def __init__(self, tracker: Any, progress: Progress | None, settings: Mapping[str, Any]) -> None:
        """
        Args:
            tracker: an `accelerate.tracking.GeneralTracker`.
            progress: what else is told.
            settings: plain JSON data, which the tracker stores with the run.
        """
        self._tracker, self._progress = tracker, progress
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._started = False

    def __call__(self, task: str, done: int, total: int) -> None:
        self._start()
        if self._progress is not None:
            self._progress(task, done, total)

    def epoch(self, task: str, number: int, figures: Mapping[str, float]) -> None:
        """Log the figures of an epoch under its task, and pass them on."""
        self._start()
        name = re.sub(r"[^\w\-. /]", "_", re.sub(r"[:,] ", "/", task))  # what MLflow takes
        values = {f"{name}/{key}": float(value) for key, value in figures.items()}
        if self._tracker.name == "wandb":  # one counter for all of a run, which may not go back
            self._tracker.log({**values, f"{name}/epoch": number})
        else:
            self._tracker.log(values, step=number)
        tell_epoch(self._progress, task, number, figures)

    def finish(self) -> None:
        """End the run of the tracker."""
        if self._started:
            self._tracker.finish()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._tracker.start()
            self._tracker.store_init_configuration(self._settings)


def make_tracker(text: str) -> Any:
    """Make the tracker that ``TrainSettings.tracker`` names, without starting it.

    Raises:
        UsageError: its package is not installed.
    """
    from accelerate import tracking, utils

    name, _, where = text.partition(":")
    available = {
        "tensorboard": utils.is_tensorboard_available,
        "wandb": utils.is_wandb_available,
        "mlflow": utils.is_mlflow_available,
    }
    if not available[name]():
        raise UsageError(f"the tracker {name} needs a package that is not installed: pip install {TRACKERS[name]}")
    if name == "tensorboard":
        return tracking.TensorBoardTracker(time.strftime("%Y-%m-%d-%H%M%S"), where or "tensorboard")
    kinds = {"wandb": tracking.WandBTracker, "mlflow": tracking.MLflowTracker}
    return kinds[name](where or "surgery")
