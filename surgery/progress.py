"""The protocol by which a task reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a task. The library itself never draws."""

    def __call__(self, task: str, done: int, total: int) -> None: ...
