"""Augmentation: random changes of training images, new each time an image is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torchvision.transforms import v2

from surgery.errors import unknown_name

Transform = Callable[[Tensor], Tensor]
"""From an image (C, H, W) to one of the same shape. Draws from torch's global state, seeded in workers."""


def augmentation(name: str, size: int, black: Sequence[float]) -> Transform | None:
    """Make the augmentation of that name (`AUGMENTATIONS`); None for ``"none"``.

    Args:
        size: side of the images, in pixels.
        black: the normalised value of each channel of a black pixel, which fills the padding.

    Raises:
        UsageError: an unknown name.
    """
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    steps = AUGMENTATIONS[name](size, black)
    return cast(Transform, v2.Compose(steps)) if steps else None


def _none(size: int, black: Sequence[float]) -> list[Any]:
    return []


def _flip(size: int, black: Sequence[float]) -> list[Any]:
    return [v2.RandomHorizontalFlip()]


def _flip_crop(size: int, black: Sequence[float]) -> list[Any]:
    return [v2.RandomCrop(size, padding=max(1, size // 8), fill=list(black)), v2.RandomHorizontalFlip()]


AUGMENTATIONS: Mapping[str, Callable[[int, Sequence[float]], list[Any]]] = {
    "none": _none,
    "flip": _flip,
    "flip-crop": _flip_crop,
}
"""``flip`` mirrors left and right half of the time. ``flip-crop`` pads an image with black by an eighth of its side,
crops it back to its size at a random place, and flips: the usual augmentation on CIFAR (He et al., CVPR 2016, section
4.2: 4 pixels of 32)."""
