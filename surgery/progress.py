"""The one protocol by which work tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told how far a task is. The library never draws; whoever calls it may."""

    def __call__(self, task: str, done: int, total: int) -> None: ...
