"""The augmentation of a training, which follows from the seed, the epoch and the image alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.transforms import v2

from surgery.errors import UsageError
from surgery.settings import TrainSettings
from surgery.training.data.augment import Transform, augmentation
from surgery.training.data.data import Data, Derived, Images, pixels_of
from surgery.training.modes import mixed_seed

_MIXING = 2
"""Keeps the seeds of mixing apart from those of dropout in the same step."""


@dataclass(frozen=True)
class Augmentation:
    """What a training does to its images.

    An image is changed by the same draws in whatever process it is read, so that results do not depend on ``workers``,
    and a training resumes exactly.

    Attributes:
        transform: changes one image; None for none.
        mixer: from images (N, C, H, W) and labels (N,) to mixed images and the probabilities (N, classes) that they
            show; None for none.
    """

    transform: Transform | None = None
    mixer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, data: Data, settings: TrainSettings) -> Augmentation:
        """What ``settings`` say for these data.

        Raises:
            UsageError: data that are augmented already, or items that cannot be augmented.
        """
        if not settings.augments:
            return cls()
        if data.augment != "none" and settings.augment != "none":
            raise UsageError(
                f"the data are augmented by {data.augment!r} already, and augment is {settings.augment!r}: leave out "
                "one of them"
            )
        height, width = _check_items(data, mixes=settings.mixes)
        pixels = pixels_of(data, height, width)
        steps: list[Any] = [step for step in [augmentation(settings.augment, pixels)] if step is not None]
        if settings.erase:
            steps.append(v2.RandomErasing(p=settings.erase))
        whole = cast(Transform, v2.Compose(steps)) if steps else None
        if whole is not None:
            _try(whole, data)
        return cls(whole, _mixer(settings, len(data.classes)))

    def over(self, images: Images) -> Images:
        """The images as a training reads them, each by its position and a seed."""
        return images if self.transform is None else _Drawn(images, self.transform)

    def mix(self, batch: tuple[Any, ...], *numbers: int) -> tuple[Any, ...]:
        """Mix the images of a batch, and their labels; the draws follow from the numbers."""
        if self.mixer is None:
            return batch
        images, labels, *others = batch
        if not (isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()) or others:
            raise UsageError(f"mixup and cutmix {_FOR}")
        with torch.random.fork_rng(devices=[]):  # the draws are made on the CPU
            torch.default_generator.manual_seed(mixed_seed(*numbers, _MIXING))
            return self.mixer(images, labels)


class _Drawn(Derived):
    """The images, changed by draws of the seed that is read with each."""

    def __init__(self, images: Images, transform: Transform) -> None:
        super().__init__(images)
        self.transform = transform

    def __getitem__(self, key: Any) -> tuple[Any, ...]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # a worker may not touch the generators of a GPU
            image, *others = self.images[index]
            return (self.transform(image), *others)


_FOR = "are for items (image, label) of one whole number a label: leave them out, or leave out the rest of the items"


def _mixer(settings: TrainSettings, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """MixUp, CutMix, or for each batch one of both."""
    mixers = [
        make(alpha=alpha, num_classes=classes)
        for make, alpha in ((v2.MixUp, settings.mixup), (v2.CutMix, settings.cutmix))
        if alpha
    ]
    return v2.RandomChoice(mixers) if len(mixers) > 1 else next(iter(mixers), None)


def _check_items(data: Data, *, mixes: bool) -> tuple[int, int]:
    """Raise `UsageError` for items that cannot be augmented; return height and width of the images."""
    with torch.random.fork_rng(devices=[]):
        image, label, *others = data.train[0]
    size = label.numel() if isinstance(label, Tensor) else 1
    if not (isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()):
        what = f"of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise UsageError(f"augmentation is for images (C, H, W) of floating-point numbers, and these are {what}")
    if size != 1 or isinstance(label, (dict, list, tuple, str)):
        raise UsageError(
            "augmentation changes images alone, and these items have more than a class each, such as boxes or a mask, "
            "which would no longer fit: change them together in the data set, and leave out augment and erase"
        )
    if mixes and (others or data.collate is not None):
        raise UsageError(f"mixup and cutmix {_FOR}")
    return int(image.shape[-2]), int(image.shape[-1])


def _try(transform: Transform, data: Data) -> None:
    """Raise `UsageError` if the first image cannot be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        image = data.train[0][0]
        try:
            transform(image)
        except UsageError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            channels = image.shape[0]
            raise UsageError(f"images of {channels} channels cannot be augmented so: {error}") from error
