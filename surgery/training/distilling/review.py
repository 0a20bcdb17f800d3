"""ReviewKD's fusion of each stage of the student with the deeper ones, to the shapes of the teacher's stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import UsageError
from surgery.graph.seeding import seed_generators

Shape = tuple[int, int, int]
"""Channels, height and width."""


class Review(nn.Module):
    """Fuse the student's maps, shallow to deep, to the teacher's shapes (Chen et al., CVPR 2021, section 3).

    The deepest map goes first. Each map is brought to one width and mixed with the result of the deeper ones: two
    attention maps, computed from both, weigh them at each position. The mix goes to the next level, and through a
    convolution to the teacher's channels. The width is that of the deepest map, at most 512, as in the authors' code.

    Args:
        channels: channels of the student's maps.
        shapes: shapes of the teacher's maps. Nearest neighbours bring the student's maps to their sizes.
        seed: seed of the initial weights.

    Raises:
        UsageError: no maps, or unequal numbers of them.
    """

    def __init__(self, channels: Sequence[int], shapes: Sequence[Shape], seed: int = 0) -> None:
        super().__init__()
        if not channels or len(channels) != len(shapes):
            raise UsageError(
                f"{len(channels)} maps of the student and {len(shapes)} of the teacher: pass equal numbers, at least 1"
            )
        width = min(512, channels[-1])
        last = len(channels) - 1
        with torch.random.fork_rng(devices=[]):
            seed_generators(seed)
            self.levels = nn.ModuleList(
                [
                    _Level(ins, width, shape, deepest=k == last)
                    for k, (ins, shape) in enumerate(zip(channels, shapes, strict=True))
                ]
            )

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """From the student's maps (N, C, H, W), shallow to deep, to maps of the teacher's shapes."""
        results: list[Tensor] = []
        deeper: Tensor | None = None
        for level, value in zip(reversed(list(self.levels)), reversed(maps), strict=True):
            result, deeper = level(value, deeper)
            results.append(result)
        return tuple(reversed(results))


class _Level(nn.Module):
    def __init__(self, channels: int, width: int, shape: Shape, *, deepest: bool) -> None:
        super().__init__()
        self.size = shape[1:]
        self.narrow = nn.Sequential(_conv(channels, width, 1), nn.BatchNorm2d(width))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.widen = nn.Sequential(_conv(width, shape[0], 3), nn.BatchNorm2d(shape[0]))

    def forward(self, value: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map in the teacher's shape, and the mix for the next level."""
        mixed = self.narrow(value)
        if self.attention is not None and deeper is not None:
            deeper = functional.interpolate(deeper, mixed.shape[2:])
            own, others = self.attention(torch.cat([mixed, deeper], 1)).split(1, 1)
            mixed = own * mixed + others * deeper
        if mixed.shape[2:] != self.size:
            mixed = functional.interpolate(mixed, self.size)
        return self.widen(mixed), mixed


def _conv(ins: int, outs: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size, for a norm behind it."""
    conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return conv
