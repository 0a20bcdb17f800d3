"""Augmentation: training images that are changed at random each time they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torchvision.transforms import v2

from surgery.errors import unknown_name

Transform = Callable[[Tensor], Tensor]
"""From an image (C, H, W) to one of the same shape; random by torch's global state, which a loader seeds in workers."""


def augmentation(name: str, size: int, black: Sequence[float]) -> Transform | None:
    """What `AUGMENTATIONS` has by that name, for images of side ``size``; None for ``"none"``.

    ``black`` is what a channel of a black pixel has become by normalisation: what lies outside of an image.

    Raises `UsageError` for an unknown name.
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
"""``flip`` mirrors left and right half of the time. ``flip-crop`` pads an image with black by an eighth of its side and
crops it back to its size anywhere, and then flips: what is usual on CIFAR (He et al., CVPR 2016, section 4.2: 4 pixels
of 32)."""
