"""Regressors: from the guided layer's output to the shape of the hint (FitNets, section 2.2 and equation 3)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torchvision.ops import Permute

from surgery.errors import EditError, unknown_name
from surgery.graph.seeding import seed_generators
from surgery.layers.maxout import Maxout
from surgery.layers.spatial import layer_class

REGRESSORS = ("auto", "conv", "fc", "none")
"""See `surgery.attach_hint`."""

LARGEST = 8
"""The largest kernel that ``"auto"`` takes: beyond it, maps are resized first."""

_MODES = ("linear", "bilinear", "trilinear")


@dataclass(frozen=True)
class ActivationLayout:
    """How a value lies in memory: its channels, its sizes along the other axes, and whether the channels are last.

    A vector has no sizes; a sequence of tokens has one, with the channels last.
    """

    channels: int
    sizes: tuple[int, ...]
    last: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (*self.sizes, self.channels) if self.last else (self.channels, *self.sizes)

    @property
    def is_tokens(self) -> bool:
        """Whether it is a sequence of tokens."""
        return self.last and len(self.sizes) == 1

    def __str__(self) -> str:
        return " x ".join(map(str, self.shape))


@dataclass(frozen=True)
class Match:
    """How two values are compared."""

    guided: ActivationLayout
    hint: ActivationLayout
    """Both without what is left out of them."""
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    """Of both as maps with the channels first."""
    skipped: tuple[int, int]
    """How many first tokens are left out of each: class tokens."""


def match(guided: ActivationLayout, hint: ActivationLayout, kind: str) -> Match:
    """What of the two values is compared, and as maps of what sizes.

    Tokens that are compared with a map, or with a sequence of another length, are a grid if there are as many as in a
    grid of the map's aspect ratio (of a square for other tokens), or one more: the first is a class token then, and
    left out. Where there is no such grid, or a map has other dimensions, both are sequences, maps row by row.
    """
    whole = Match(guided, hint, (guided.sizes, hint.sizes), (0, 0))
    if kind in ("fc", "none") or guided.sizes == hint.sizes:
        return whole
    if not guided.sizes or not hint.sizes:
        rank = max(len(guided.sizes), len(hint.sizes))
        return replace(whole, sizes=(guided.sizes or (1,) * rank, hint.sizes or (1,) * rank))
    grids: list[tuple[int, tuple[int, ...]] | None] = []
    for layout, other in ((guided, hint), (hint, guided)):
        aspect = (1, 1) if other.is_tokens else other.sizes
        grids.append(grid(layout.sizes[0], aspect) if layout.is_tokens else (0, layout.sizes))
    one, two = grids
    if one is None or two is None or len(one[1]) != len(two[1]):
        return replace(whole, sizes=((math.prod(guided.sizes),), (math.prod(hint.sizes),)))
    left = [
        replace(layout, sizes=(layout.sizes[0] - first,)) if first else layout
        for layout, (first, _) in ((guided, one), (hint, two))
    ]
    return Match(left[0], left[1], (one[1], two[1]), (one[0], two[0]))


def grid(tokens: int, aspect: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
    """How many class tokens come first, and the grid of the other tokens; None where they are none of this aspect."""
    least = [size // math.gcd(*aspect) for size in aspect]
    for first in (0, 1):
        factor = round(((tokens - first) / math.prod(least)) ** (1 / len(least)))
        found = tuple(factor * size for size in least)
        if factor and math.prod(found) == tokens - first:
            return first, found
    return None


def make_regressor(found: Match, kind: str, activation: nn.Module | None, seed: int) -> nn.Sequential:
    """The layers from the guided value to the hint's shape, ending in the non-linearity of the hint.

    Args:
        activation: the hint's own non-linearity; None where it is linear. For a `Maxout`, the layer before it has as
            many pieces.
        seed: of the initial weights.

    Raises:
        UsageError: an unknown kind.
        EditError: the kind cannot give the hint's shape.
    """
    if kind not in REGRESSORS:
        raise unknown_name("regressor", kind, REGRESSORS)
    guided, hint = found.guided, found.hint
    if kind == "none":
        if guided != hint:
            raise EditError(f"the guided output is {guided} and the hint {hint}: only equal ones need no regressor")
        return nn.Sequential()
    pieces = activation.pieces if isinstance(activation, Maxout) else 1
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        if kind == "fc":
            return _make_fully_connected(guided, hint, pieces, activation)
        alike = guided.sizes == hint.sizes and guided.last and hint.last
        if alike and (kind == "auto" or not guided.sizes):
            return _make_sequential(
                linear=nn.Linear(guided.channels, hint.channels * pieces), act=_turn_maxout(activation, -1)
            )
        resize, conv = _make_convolution(found, kind, pieces)
    parts = {"resize": resize, "conv": conv, "act": _turn_maxout(activation, 1)}
    return _make_sequential(**_to_maps(guided, found.sizes[0]), **parts, **_from_maps(hint, found.sizes[1]))


def _make_fully_connected(
    guided: ActivationLayout, hint: ActivationLayout, pieces: int, activation: nn.Module | None
) -> nn.Sequential:
    linear = nn.Linear(math.prod(guided.shape), math.prod(hint.shape) * pieces)
    flatten = nn.Flatten(1) if guided.sizes else None
    unflatten = nn.Unflatten(1, hint.shape) if hint.sizes else None
    return _make_sequential(flatten=flatten, linear=linear, act=_turn_maxout(activation, 1), unflatten=unflatten)


def _make_convolution(found: Match, kind: str, pieces: int) -> tuple[nn.Module | None, nn.Module]:
    """What brings a map to a size that a convolution can read, and the convolution to the hint's sizes."""
    ins, outs = found.guided.channels, found.hint.channels * pieces
    before, after = found.sizes
    rank = len(before)
    if kind == "conv":
        if any(b < a for b, a in zip(before, after, strict=True)):
            raise EditError(
                f"the hint ({found.hint}) is larger than the guided output ({found.guided}): no valid convolution "
                "reaches it; use regressor='auto'"
            )
        return None, layer_class("Conv", rank)(ins, outs, tuple(b - a + 1 for b, a in zip(before, after, strict=True)))
    down = [_find_kernel(b, a) for b, a in zip(before, after, strict=True)]
    up = [_find_kernel(a, b) if a % b == 0 else None for b, a in zip(before, after, strict=True)]
    if all(down):
        kernel, stride = zip(*(d for d in down if d), strict=True)
        return None, layer_class("Conv", rank)(ins, outs, kernel, stride)
    if all(up):
        factors = tuple(u[1] for u in up if u)
        return None, layer_class("ConvTranspose", rank)(ins, outs, factors, factors)
    resize: nn.Module
    if all(b >= a for b, a in zip(before, after, strict=True)):
        resize = layer_class("AdaptiveAvgPool", rank)(after if rank > 1 else after[0])
    else:
        resize = nn.Upsample(after, mode=_MODES[rank - 1], align_corners=False)
    return resize, layer_class("Conv", rank)(ins, outs, 1)


def _find_kernel(before: int, after: int) -> tuple[int, int] | None:
    """Kernel and stride from one size to a smaller one: a factor where it is one, else a valid convolution."""
    if before < after:
        return None
    kernel, stride = (before // after,) * 2 if before % after == 0 else (before - after + 1, 1)
    return (kernel, stride) if kernel <= LARGEST else None


def _to_maps(layout: ActivationLayout, sizes: tuple[int, ...]) -> dict[str, nn.Module | None]:
    """From a layout to maps of ``sizes`` with the channels first."""
    if not layout.sizes:
        return {"unflatten": nn.Unflatten(1, (layout.channels, *sizes))}
    turn = Permute([0, len(layout.sizes) + 1, *range(1, len(layout.sizes) + 1)]) if layout.last else None
    return {"turn": turn, "unflatten": _reshape(layout.sizes, sizes)}


def _from_maps(layout: ActivationLayout, sizes: tuple[int, ...]) -> dict[str, nn.Module | None]:
    """The way back."""
    if not layout.sizes:
        return {"flatten": nn.Flatten(1)}
    turn = Permute([0, *range(2, len(layout.sizes) + 2), 1]) if layout.last else None
    return {"flatten": _reshape(sizes, layout.sizes), "turn_back": turn}


def _reshape(before: tuple[int, ...], after: tuple[int, ...]) -> nn.Module | None:
    if before == after:
        return None
    return nn.Flatten(2) if len(after) == 1 else nn.Unflatten(2, after)


def _turn_maxout(activation: nn.Module | None, dim: int) -> nn.Module | None:
    """The activation, with the channels of a maxout where they are here."""
    return Maxout(activation.pieces, dim) if isinstance(activation, Maxout) else activation


def _make_sequential(**layers: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))
