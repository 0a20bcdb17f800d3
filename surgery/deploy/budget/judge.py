"""Score and loss of a slimmed model on some images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset

from surgery.training.data.data import Images, count
from surgery.training.data.loading import loader
from surgery.training.history import Score
from surgery.training.modes import device_of, in_mode


@dataclass(frozen=True)
class Judged:
    """The score of a model, and its mean cross-entropy."""

    score: Score
    loss: float


def judge(module: nn.Module, images: Images, *, most: int | None = None, batch_size: int = 250) -> Judged:
    """Measure score and loss on the images, or on ``most`` of them from all over the data set."""
    total = count(images)
    if most is not None and total > most:
        images = Subset(images, [total * k // most for k in range(most)])
    correct = seen = 0
    summed = 0.0
    device = device_of(module)
    with in_mode(module, training=False), torch.inference_mode():
        for batch, labels, *_ in loader(images, batch_size):
            logits = module(batch.to(device)).float()
            summed += float(functional.cross_entropy(logits, labels.to(device), reduction="sum"))
            correct += int((logits.argmax(1).cpu() == labels).sum())
            seen += len(labels)
    return Judged(Score(correct, seen), summed / seen if math.isfinite(summed) else math.inf)
