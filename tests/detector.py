"""A one-stage detector of today's kind, small: split blocks, pooled context, a two-way pyramid, boxes as distributions.

Each block takes halves of its channels apart, sends one through residual parts and joins all that was made (C2f). The
head says of each side of a box how likely each of `BINS` distances is (DFL, Generalized Focal Loss, 2020): a softmax,
and a convolution with fixed weights 0, 1, 2, … In training it returns the raw maps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BINS = 8
CLASSES = 5
STRIDES = (4, 8, 16)


class Conv(nn.Sequential):
    def __init__(self, ins: int, outs: int, size: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(ins, outs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outs), nn.SiLU(inplace=True)
        )


class Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = Conv(width, width, 3), Conv(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class Halves(nn.Module):
    """C2f: ``how`` says which function of torch takes the halves apart."""

    def __init__(self, ins: int, outs: int, depth: int = 1, shortcut: bool = True, how: str = "chunk") -> None:
        super().__init__()
        self.width, self.how = outs // 2, how
        self.spread, self.join = Conv(ins, outs), Conv((2 + depth) * self.width, outs)
        self.parts = nn.ModuleList(Bottleneck(self.width, shortcut) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(x)
        parts = list(x.chunk(2, 1) if self.how == "chunk" else x.split((self.width, self.width), 1))
        parts.extend(part(parts[-1]) for part in self.parts)
        return self.join(torch.cat(parts, 1))


class PooledContext(nn.Module):
    """SPPF: one small pooling, three times over, in place of three large ones."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.narrow, self.join = Conv(ins, ins // 2), Conv(ins // 2 * 4, outs)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.narrow(x)]
        parts.extend(self.pool(parts[-1]) for _ in range(3))
        return self.join(torch.cat(parts, 1))


class Distances(nn.Module):
    """DFL: the expected distance of each side, ``(batch, 4 * bins, anchors)`` to ``(batch, 4, anchors)``."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins, self.expect = bins, nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.expect.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, anchors = x.shape
        return self.expect(x.view(batch, 4, self.bins, anchors).transpose(2, 1).softmax(1)).view(batch, 4, anchors)


class Detect(nn.Module):
    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        box, kind = max(16, widths[0] // 4), max(widths[0], CLASSES)
        self.boxes = nn.ModuleList(
            nn.Sequential(Conv(w, box, 3), Conv(box, box, 3), nn.Conv2d(box, 4 * BINS, 1)) for w in widths
        )
        self.kinds = nn.ModuleList(
            nn.Sequential(Conv(w, kind, 3), Conv(kind, kind, 3), nn.Conv2d(kind, CLASSES, 1)) for w in widths
        )
        self.distances = Distances(BINS)

    def forward(self, maps: list[Tensor]) -> Tensor | list[Tensor]:
        raw = [torch.cat((b(x), k(x)), 1) for x, b, k in zip(maps, self.boxes, self.kinds, strict=True)]
        if self.training:
            return raw
        flat = torch.cat([x.view(x.shape[0], 4 * BINS + CLASSES, -1) for x in raw], 2)
        box, kind = flat.split((4 * BINS, CLASSES), 1)
        centres, strides = self._anchors(raw)
        low, high = self.distances(box).chunk(2, 1)
        first, last = centres - low, centres + high
        corners = torch.cat(((first + last) / 2, last - first), 1) * strides
        return torch.cat((corners, kind.sigmoid()), 1)

    def _anchors(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        centres, strides = [], []
        for x, stride in zip(maps, STRIDES, strict=True):
            high, wide = x.shape[2:]
            down = torch.arange(high, device=x.device, dtype=x.dtype) + 0.5
            along = torch.arange(wide, device=x.device, dtype=x.dtype) + 0.5
            grid = torch.meshgrid(down, along, indexing="ij")
            centres.append(torch.stack((grid[1], grid[0]), -1).view(-1, 2))
            strides.append(torch.full((high * wide, 1), stride, device=x.device, dtype=x.dtype))
        return torch.cat(centres).transpose(0, 1)[None], torch.cat(strides).transpose(0, 1)


class Detector(nn.Module):
    """``(batch, 3, height, width)``, sides divisible by 16, to boxes and class scores ``(batch, 4 + classes, n)``."""

    def __init__(self, width: int = 8, how: str = "chunk") -> None:
        super().__init__()
        a, b, c = 2 * width, 4 * width, 6 * width
        self.stem, self.down1 = Conv(3, width, 3, 2), Conv(width, a, 3, 2)
        self.stage1, self.down2 = Halves(a, a, 1, how=how), Conv(a, b, 3, 2)
        self.stage2, self.down3 = Halves(b, b, 2, how=how), Conv(b, c, 3, 2)
        self.stage3, self.context = Halves(c, c, 1, how=how), PooledContext(c, c)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.top1, self.top2 = Halves(c + b, b, 1, False, how), Halves(b + a, a, 1, False, how)
        self.back1, self.bottom1 = Conv(a, a, 3, 2), Halves(a + b, b, 1, False, how)
        self.back2, self.bottom2 = Conv(b, b, 3, 2), Halves(b + c, c, 1, False, how)
        self.head = Detect((a, b, c))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        first = self.stage1(self.down1(self.stem(x)))
        second = self.stage2(self.down2(first))
        third = self.context(self.stage3(self.down3(second)))
        middle = self.top1(torch.cat((self.up(third), second), 1))
        fine = self.top2(torch.cat((self.up(middle), first), 1))
        middle = self.bottom1(torch.cat((self.back1(fine), middle), 1))
        coarse = self.bottom2(torch.cat((self.back2(middle), third), 1))
        return self.head([fine, middle, coarse])
