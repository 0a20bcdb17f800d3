"""Where the stages of a network end, and what its classifier reads.

A stage is a run of values that everything passes through and that have about the same number of positions: it ends
where that falls to a half or less, or doubles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import fx

from surgery.errors import EditError
from surgery.graph.labels import Labelled
from surgery.passes.blocks import Flow
from surgery.passes.middle import depths, is_weighted, waist


def classifier(flow: Flow, end: fx.Node) -> fx.Node:
    """The last layer with a weight matrix on the way to ``end``.

    Raises:
        EditError: there is none, or not all that reaches ``end`` passes through it.
    """
    last = _last_weighted(flow, end)
    if last is None or last not in waist(flow, end):
        raise EditError("no layer that everything passes through stands last, so there is no classifier: name layers")
    return last


def classifier_input(flow: Flow, layer: fx.Node) -> fx.Node:
    """What a layer reads, before any dropout or change of dtype."""
    value = flow.tensors(layer)[0]
    while _passes_on(flow, value):
        value = flow.tensors(value)[0]
    return value


def _passes_on(flow: Flow, node: fx.Node) -> bool:
    """Whether a node gives every number of one tensor, alike for all channels and at its place."""
    rule, before = flow.rule(node), flow.tensors(node)
    if rule is None or rule.linear != "first" or len(before) != 1:
        return False
    shapes = [value.shape for n in (node, before[0]) if isinstance(value := flow.value(n), Labelled)]
    return len(shapes) == 2 and shapes[0] == shapes[1]


def stage_ends(flow: Flow, end: fx.Node, sizes: Callable[[fx.Node], tuple[int, ...]]) -> list[fx.Node]:
    """The last value of each stage before the classifier, from the input on.

    It is the last one that has as many positions as the stage's last layer with weights gives; a stage has at least
    one such layer and more than one position. A first stage of one layer, such as the stem of a ResNet, is left out
    where all others have more.

    Args:
        end: the network's output.
        sizes: those of a value along the axes of its positions.

    Raises:
        EditError: there is none.
    """
    depth = depths(flow)
    stages: list[list[tuple[fx.Node, int]]] = []
    for node in _features(flow, end):
        positions = math.prod(sizes(node)) if depth[node] else 1
        if positions > 1:
            if not stages or not 0.5 < positions / stages[-1][-1][1] < 2:
                stages.append([])
            stages[-1].append((node, positions))
    before, ends, layers = 0, [], []
    for stage in stages:
        deepest = depth[stage[-1][0]]
        if deepest > before:
            tail = [(node, positions) for node, positions in stage if depth[node] == deepest]
            ends.append(next(node for node, positions in reversed(tail) if positions == tail[0][1]))
            layers.append(deepest - before)
            before = deepest
    if not ends:
        raise EditError("no stage of maps or tokens that everything passes through: name layers")
    return ends[1:] if len(ends) > 1 and layers[0] == 1 < min(layers[1:]) else ends


def _features(flow: Flow, end: fx.Node) -> list[fx.Node]:
    """The values that everything passes through before the last layer with a weight matrix."""
    last, narrow = _last_weighted(flow, end), waist(flow, end)
    if last is None:
        return []
    if last in narrow:
        return waist(flow, classifier_input(flow, last))
    return [n for n in narrow if flow.order[n] < flow.order[last]]


def _last_weighted(flow: Flow, end: fx.Node) -> fx.Node | None:
    before = flow.before(end)
    return next((n for n in reversed(flow.graph.nodes) if n in before and is_weighted(flow, n)), None)


def aligned(ours: Sequence[int], theirs: Sequence[int]) -> tuple[slice, slice]:
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
