"""The number of images that a model classifies correctly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from surgery.progress import Progress
from surgery.training.data.data import Images
from surgery.training.data.loading import loader
from surgery.training.engine import Engine
from surgery.training.history import Score
from surgery.training.modes import device_of, in_mode


def evaluate(
    predict: nn.Module | Callable[[Tensor], Tensor],
    images: Images | DataLoader[Any],
    *,
    batch_size: int = 250,
    workers: int = 0,
    engine: Engine | None = None,
    progress: Progress | None = None,
    task: str = "evaluate",
) -> Score:
    """Count the images whose label has the largest of ``predict``'s outputs (N, classes).

    Args:
        predict: a module, which runs in evaluation mode and gets its own mode back, or any function from images
            (N, C, H, W) to outputs, such as a session of another runtime.
        images: items (image, label), as of `surgery.load_data`; or a loader of batches of such, which is read as it is.
        batch_size: images in one call.
        workers: processes that read images.
        engine: the processes that share the images; by default this one scores them all.
        progress: called after each batch, with ``task``.

    Returns:
        The number of correct images, and of all.

    Example:
        >>> surgery.evaluate(traced, data.test).accuracy
    """
    processes = engine.processes if engine else 1
    batches = (
        images
        if isinstance(images, DataLoader)
        else loader(images, math.ceil(batch_size / processes) * processes, workers)
    )
    batches = engine.share(batches) if engine else batches
    device = device_of(predict)
    correct = total = 0
    with in_mode(predict, training=False), torch.inference_mode():
        for done, (batch, labels, *_) in enumerate(batches, 1):
            right = predict(batch.to(device)).argmax(1)
            right = right == labels.to(right.device)
            right = engine.gather(right) if engine else right
            correct += int(right.sum())
            total += len(right)
            if progress is not None:
                progress(task, done, len(batches))
    return Score(correct, total)
