"""The stages of a network, found from its graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.graph.batches import batch_of, tensors
from surgery.graph.traced import example_inputs, info
from surgery.taps.network import TappedNetwork
from surgery.taps.regressors import grid


@dataclass(frozen=True)
class Stage:
    """A part of a network whose layers give maps, or tokens, of one size."""

    name: str
    """The layer or container whose output the end of the stage is, to pass to `attach_hint`, `deepen` or `slim`; the
    graph node's name where there is none."""
    end: str
    """Name of the node in ``module.graph`` that computes it."""
    shape: tuple[int, ...]
    """Of the value at the end, on the example inputs: (N, C, H, W), (N, H, W, C), (N, tokens, C) …"""
    channels: int
    """C of that shape."""
    reduction: int | None
    """How many pixels of the input one position covers in each direction, rounded: 4 where 224 became 56. None where
    the input is not a map (N, C, H, W) or (N, C, T, H, W)."""


def stages(module: nn.Module) -> tuple[Stage, ...]:
    """The stages of a network, in forward order: where `distill` takes its hints by default.

    A stage ends at the last value of its size that everything passes through, before the classifier and before pooling
    leads to the next size. A first stage of one layer, such as the stem of a ResNet, is left out where all others have
    more.

    Args:
        module: a module that is traced whole.

    Returns:
        one `Stage` for each size of map, or one for a network of tokens.

    Raises:
        UsageError: the module is not traced, or traced in parts.
        EditError: there is no stage of maps or tokens that everything passes through.

    Example:
        >>> [(s.name, s.channels, s.reduction) for s in surgery.stages(resnet18)]
        [('layer1', 64, 4), ('layer2', 128, 8), ('layer3', 256, 16), ('layer4', 512, 32)]
    """
    network = TappedNetwork(module, "module", mode="evaluation")
    args, kwargs = example_inputs(module)
    image = _image_size((args, kwargs))
    batch = batch_of(args, kwargs) or 1
    found = []
    for end in network.stages():
        layout = network.layout(end)
        sizes = layout.sizes
        if layout.is_tokens and image:
            tokens = grid(layout.sizes[0], image)
            sizes = tokens[1] if tokens else layout.sizes
        shape = network.shape(end)
        if info(module).batched:  # analysed at a batch of 2
            shape = (shape[0] * batch // 2, *shape[1:])
        found.append(Stage(end.name, end.nodes[0].name, shape, layout.channels, _reduction(image, sizes)))
    return tuple(found)


def _image_size(inputs: Any) -> tuple[int, ...]:
    """The size of the maps among a module's inputs; empty where there are none."""
    given: list[Tensor] = tensors(inputs)
    return next((tuple(t.shape[2:]) for t in given if t.ndim in (4, 5)), ())


def _reduction(image: Sequence[int], sizes: Sequence[int]) -> int | None:
    """Input positions for each of a value's, along the last two axes; None where these are not a map."""
    if not image or len(sizes) < 2:
        return None
    return round(math.sqrt(math.prod(image[-2:]) / math.prod(sizes[-2:])))


def align_stages(ours: Sequence[int], theirs: Sequence[int]) -> tuple[slice, slice]:
    """Which stages of two networks to pair: as many as the one with fewer has, next to each other in both, where the
    numbers of positions agree best; of two ways as good the later one."""
    count = min(len(ours), len(theirs))
    ways: list[tuple[slice, slice]] = [
        (slice(i, i + count), slice(j, j + count))
        for i in range(len(ours) - count + 1)
        for j in range(len(theirs) - count + 1)
    ]

    def distance(way: tuple[slice, slice]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(ours[way[0]], theirs[way[1]], strict=True))

    best: tuple[slice, slice] = min(reversed(ways), key=distance)
    return best
