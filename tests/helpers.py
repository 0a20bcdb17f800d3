"""What many tests do: load the digits, compare tensors, interrupt commands and trainings, run work at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch
from torch import nn

from surgery.cli.output import Bars
from surgery.training.data.data import Data, load_data


@functools.cache
def load_digits(limit: int | None = None) -> Data:
    """The digits of scikit-learn, read once."""
    return load_data("digits", limit=limit)


def same_tensors(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether both have the same names, and equal tensors under them."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def without_epochs(stderr: str) -> list[str]:
    """The lines that a command prints to stderr, but for those of epochs."""
    return [line for line in stderr.splitlines() if ", epoch " not in line]


def interrupt(monkeypatch: pytest.MonkeyPatch, task: str, step: int) -> None:
    """Interrupt the next command when that many steps of a task are done."""

    def told(bars: Bars, at: str, done: int, total: int) -> None:
        if (at, done) == (task, step):
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "__call__", told)


class ImmediateExecutor(Executor):
    """Does what is submitted at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def killed_after(steps: int) -> Callable[[str, int, int], None]:
    """A progress callback that interrupts a training when that many of its steps are done."""

    def progress(task: str, done: int, total: int) -> None:
        if done == steps:
            raise KeyboardInterrupt

    return progress


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Both have the same names in the same order, and equal tensors under them."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
