"""Augmentation by name: random changes of training images, new each time an image is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torchvision.transforms import v2

from surgery.errors import UsageError, unknown_name

Transform = Callable[[Tensor], Tensor]
"""From an image (C, H, W) to one of the same shape. Draws from torch's global state, seeded in workers."""


@dataclass(frozen=True)
class Pixels:
    """What an augmentation must know of images: height and width, and the mean and the standard deviation of each
    channel by which they are normalised."""

    height: int
    width: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def black(self) -> list[float]:
        """The normalised value of each channel of a black pixel."""
        return [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]


def augmentation(names: str, pixels: Pixels) -> Transform | None:
    """Make the augmentation of that name (`AUGMENTATIONS`), or of several joined by ``+``; None for ``"none"``.

    Raises:
        UsageError: an unknown name.
    """
    steps = [step for name in names.split("+") for step in _row(name)(pixels)]
    return cast(Transform, v2.Compose(steps)) if steps else None


def _row(name: str) -> Callable[[Pixels], list[Any]]:
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]


def _none(pixels: Pixels) -> list[Any]:
    return []


def _flip(pixels: Pixels) -> list[Any]:
    return [v2.RandomHorizontalFlip()]


def _flip_crop(pixels: Pixels) -> list[Any]:
    height, width = pixels.height, pixels.width
    padding = [max(1, width // 8), max(1, height // 8)]
    return [v2.RandomCrop((height, width), padding=padding, fill=pixels.black), v2.RandomHorizontalFlip()]


def _policy(make: Callable[[], Any]) -> Callable[[Pixels], list[Any]]:
    """A policy of torchvision, which is defined for images of 8 bits a channel."""

    def steps(pixels: Pixels) -> list[Any]:
        return [
            _Pixels(pixels.mean, pixels.std),
            v2.ToPILImage(),
            make(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(pixels.mean), list(pixels.std)),
            v2.ToPureTensor(),
        ]

    return steps


class _Pixels(torch.nn.Module):
    """From a normalised image to its pixels, 8 bits each."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))

    def forward(self, image: Tensor) -> Tensor:
        values = image.as_subclass(Tensor).float() * self.std + self.mean
        low, high = (float(bound) for bound in values.aminmax())
        if low < -_BEYOND or high > 1 + _BEYOND:
            raise UsageError(
                f"an image has pixels from {low:.2g} to {high:.2g} where its data say how it is normalised, and they "
                "must be from 0 to 1: give the data their own, dataclasses.replace(surgery.as_data(...), "
                "normalisation=surgery.Normalisation(mean, std))"
            )
        return (255 * values).round().clamp(0, 255).to(torch.uint8)


_BEYOND = 0.1
"""How far a pixel may be below black or above white: interpolation overshoots by less."""

AUGMENTATIONS: Mapping[str, Callable[[Pixels], list[Any]]] = {
    "none": _none,
    "flip": _flip,
    "flip-crop": _flip_crop,
    "randaugment": _policy(v2.RandAugment),
    "trivialaugment": _policy(v2.TrivialAugmentWide),
    "autoaugment": _policy(v2.AutoAugment),
    "augmix": _policy(v2.AugMix),
}
"""``flip`` mirrors left and right half of the time. ``flip-crop`` pads an image with black by an eighth of its side,
crops it back to its size at a random place, and flips: the usual augmentation on CIFAR (He et al., CVPR 2016, section
4.2: 4 pixels of 32). The others are torchvision's, with its defaults: RandAugment (Cubuk et al., 2020), TrivialAugment
(Müller and Hutter, ICCV 2021), AutoAugment's policy for ImageNet (Cubuk et al., CVPR 2019), AugMix (Hendrycks et al.,
ICLR 2020)."""
