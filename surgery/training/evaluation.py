"""How many images a model classifies correctly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from surgery.progress import Progress
from surgery.training.data.data import Images
from surgery.training.data.loading import loader
from surgery.training.engine import Engine
from surgery.training.history import Score


def evaluate(
    predict: nn.Module | Callable[[Tensor], Tensor],
    images: Images,
    *,
    batch_size: int = 250,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "evaluate",
) -> Score:
    """How many of ``images`` have their label as the largest of ``predict``'s outputs (N, classes).

    ``predict`` is a module, which is run in evaluation mode and left in the mode it was in, or any function, such as a
    session of another runtime.
    """
    return evaluated(predict, images, None, batch_size=batch_size, workers=workers, progress=progress, task=task)


def evaluated(
    predict: nn.Module | Callable[[Tensor], Tensor],
    images: Images,
    engine: Engine | None,
    *,
    batch_size: int = 250,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "evaluate",
) -> Score:
    """With an engine each of its processes takes a share of the images."""
    processes = engine.processes if engine else 1
    batches = loader(images, math.ceil(batch_size / processes) * processes, workers)
    batches = engine.shared(batches) if engine else batches
    device = device_of(predict)
    correct = total = 0
    with in_mode(predict, training=False), torch.inference_mode():
        for done, (batch, labels, *_) in enumerate(batches, 1):
            right = predict(batch.to(device)).argmax(1)
            right = right == labels.to(right.device)
            right = engine.gathered(right) if engine else right
            correct += int(right.sum())
            total += len(right)
            if progress is not None:
                progress(task, done, len(batches))
    return Score(correct, total)


def device_of(model: object) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def in_mode(model: object, *, training: bool) -> Iterator[None]:
    """The model in one mode, and each of its submodules back in its own mode afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
