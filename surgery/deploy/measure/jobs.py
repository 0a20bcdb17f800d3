"""What to measure, and what a runtime makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from surgery.deploy.measure.memory import Peak
from surgery.deploy.measure.timing import Call
from surgery.errors import UsageError

Measurable: TypeAlias = nn.Module | str | os.PathLike[str]
"""A module, or the path of an ONNX file."""


@dataclass(frozen=True)
class Job:
    """What to run, and how."""

    candidate: Measurable
    example_inputs: Any
    kwargs: Mapping[str, Any] | None
    batch_size: int
    threads: int
    device: str


@dataclass(frozen=True)
class Runner:
    """A model that can be timed.

    ``start`` sets it up, runs it once, and returns what answers a query. ``peak_memory`` raises `UnmeasuredError` if it
    cannot measure. ``file_bytes``, ``macs`` and ``params`` are None if unknown.
    """

    start: Callable[[], Call]
    peak_memory: Callable[[], Peak]
    input_shapes: tuple[tuple[int, ...], ...]
    file_bytes: int | None
    macs: int | None
    params: int | None


def refuse_without_gpu(job: Job, runtime: str = "") -> None:
    """Raise `UsageError` if the job, or the ``runtime`` of this name, needs a GPU and there is none."""
    if runtime and job.device != "cuda":
        raise UsageError(f"the {runtime} runtime needs a GPU: give it device 'cuda'")
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no GPU: torch finds no CUDA device here, so nothing was measured on one")


def shapes(values: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of tensors or arrays."""
    return tuple(tuple(value.shape) for value in values)
