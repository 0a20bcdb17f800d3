"""The protocol by which a task reports its progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a task. The library itself never draws.

    An object that has a method ``epoch(task, number, figures)`` too is told of each epoch of a training when it ends:
    its number, from 1, and ``images``, ``loss``, ``lr``, ``seconds`` and, where it was scored, ``accuracy``.

    Example:
        >>> class Losses:
        ...     def __call__(self, task, done, total): ...
        ...     def epoch(self, task, number, figures):
        ...         print(task, number, figures["loss"])
        >>> surgery.train(model, data, epochs=3, progress=Losses())
    """

    def __call__(self, task: str, done: int, total: int) -> None: ...


def tell_epoch(progress: Progress | None, task: str, number: int, figures: Mapping[str, float]) -> None:
    """Tell ``progress`` of an epoch, if it has the method for that."""
    listen = getattr(progress, "epoch", None)
    if listen is not None:
        listen(task, number, figures)
