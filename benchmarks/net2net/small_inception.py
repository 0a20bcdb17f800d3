"""A small network of the kind that Net2Net was tried on: Inception modules with batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLACES = {f"{module}.{layer}": 1 for module in ("first", "second") for layer in ("square.1", "pair.1", "pair.2")}
"""Where the deeper net has one more layer: behind each 3 x 3 convolution and each of a pair of 1 x 5 and 5 x 1 ones."""


class SmallInception(nn.Module):
    """Two Inception modules for images (N, 3, H, W) of 16 pixels and more; logits (N, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 3, stride=2)
        self.first = _Inception(32, 16, 24, 16, 8)
        self.shrink = nn.MaxPool2d(2)
        self.second = _Inception(64, 32, 48, 32, 16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.shrink(self.first(self.stem(x))))
        result: Tensor = self.classifier(self.pool(x).flatten(1))
        return result


class _Inception(nn.Module):
    """Four branches side by side: 1 x 1; 3 x 3; 1 x 5 and 5 x 1; pooling."""

    def __init__(self, channels: int, point: int, square: int, pair: int, pool: int) -> None:
        super().__init__()
        self.point = _conv(channels, point, 1)
        self.square = nn.Sequential(_conv(channels, square // 2, 1), _conv(square // 2, square, 3))
        self.pair = nn.Sequential(
            _conv(channels, pair // 2, 1), _conv(pair // 2, pair, (1, 5)), _conv(pair, pair, (5, 1))
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.square(x), self.pair(x), self.pool(x)], 1)


def _conv(channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1) -> nn.Sequential:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (size[0] // 2, size[1] // 2)
    conv = nn.Conv2d(channels, out, size, stride, padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())
