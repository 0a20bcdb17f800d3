"""Batches of images, in an order that depends on the seed and the epoch alone, so that a training can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from surgery.training.data.data import Images, count
from surgery.training.modes import mixed_seed

_IMAGES = 1
"""Keeps the seeds of images apart from others."""


class EpochOrder(Sampler[Any]):
    """A random order of the images, a different one in each epoch; with ``seeds``, pairs of an image's position and a
    seed for its augmentation.

    Attributes:
        epoch: counted from 0.
        start: images to skip at the beginning of this epoch, which have been seen.
    """

    def __init__(self, images: Images, seed: int, *, seeds: bool = False) -> None:
        self._count, self._seed, self._seeds = count(images), seed, seeds
        self.epoch = self.start = 0

    def begin(self, epoch: int, start: int, loader: DataLoader[Any]) -> None:
        """Set the epoch that ``loader`` gives next, and seed its workers for it."""
        self.epoch, self.start = epoch, start
        assert loader.generator is not None
        loader.generator.manual_seed(mixed_seed(self._seed, epoch))

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, self.epoch))
        for index in torch.randperm(self._count, generator=generator)[self.start :].tolist():
            yield (index, mixed_seed(self._seed, self.epoch, index, _IMAGES)) if self._seeds else index

    def __len__(self) -> int:
        return self._count - self.start


def loader(
    images: Images,
    batch_size: int,
    workers: int = 0,
    *,
    order: EpochOrder | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[tuple[Any, ...]]:
    """Batches of ``images``, in their own order or in ``order``.

    With an order the last, smaller batch is dropped: its batch statistics would be noisier. A generator is always
    passed: without one, even a loader that does not shuffle draws from the global state. ``collate`` makes a batch of
    items; by default tensors are stacked.
    """
    return DataLoader(
        images,
        batch_size=batch_size if order is None else min(batch_size, count(images)),
        sampler=order,
        drop_last=order is not None,
        generator=torch.Generator().manual_seed(0),
        num_workers=workers,
        collate_fn=collate,
    )
