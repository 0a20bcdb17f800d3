"""Landmarks of a network: its middle, its classifier, the ends of its stages, and the activation behind a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import fx, nn

from surgery.axes.labels import Labelled
from surgery.edit.flow import Flow
from surgery.edit.sites import output_sites
from surgery.errors import EditError, UsageError
from surgery.layers.activation import make_activation


def middle(module: nn.Module, flow: Flow, *, deeper: bool) -> str:
    """The name of the layer or container in the middle of a network.

    Depth is the number of layers with a weight matrix on the longest way from the input. Of the values that everything
    which reaches the output passes through, such as the ends of residual blocks, it is the one nearest to half of the
    depth that is a named layer's or container's output; of two as near the later one if ``deeper``, else the earlier
    one; of those as deep the last, behind pooling.

    Raises:
        UsageError: there is no such value.
    """
    depth = depths(flow)
    end = flow.graph.output_node()
    named = [n for n in waist(flow, end) if end not in n.users and isinstance(flow.value(n), Labelled)]
    half = max(depth.values(), default=0) / 2
    best: dict[int, list[fx.Node]] = {}
    for node in reversed(named):
        best.setdefault(depth[node], []).append(node)

    def distance(d: int) -> tuple[float, int]:
        return abs(d - half), -d if deeper else d

    for d in sorted(best, key=distance):
        for node in best[d] if d > 0 else ():
            name = name_of(module, flow, node)
            if name:
                return name
    raise UsageError("no layer in the middle that everything passes through: name the layers, guided= and hint=")


def depths(flow: Flow) -> dict[fx.Node, int]:
    """For each node the number of layers with a weight matrix on the longest way from the input to it."""
    depth: dict[fx.Node, int] = {}
    for node in flow.graph.nodes:
        before = max((depth[n] for n in node.all_input_nodes), default=0)
        depth[node] = before + is_weighted(flow, node)
    return depth


def is_weighted(flow: Flow, node: fx.Node) -> bool:
    """Whether a node has a weight matrix."""
    leaf = flow.leaf(node)
    tensors: Iterator[torch.Tensor] = (
        iter(leaf.parameters())
        if leaf is not None
        else (
            label.constant
            for n in node.all_input_nodes
            if n.op == "get_attr" and isinstance(label := flow.value(n), Labelled) and label.constant is not None
        )
    )
    return any(t.ndim > 1 for t in tensors)


def waist(flow: Flow, end: fx.Node) -> list[fx.Node]:
    """The values that every way from the input tensors to ``end`` leads through, in order; itself where it is one."""
    reached = {n for n in flow.graph.nodes if n.op == "placeholder" and flow.holds_tensors(n)}
    for node in flow.graph.nodes:
        if flow.holds_tensors(node) and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    live = reached & flow.before(end)
    last = {n: max((flow.order[u] for u in n.users if u in live or u is end), default=flow.order[n]) for n in live}
    result = []
    furthest = -1
    for node in (n for n in flow.graph.nodes if n in live):
        if node.op != "placeholder" and furthest <= flow.order[node]:
            result.append(node)
        furthest = max(furthest, last[node])
    return result


def name_of(module: nn.Module, flow: Flow, node: fx.Node) -> str:
    """The shortest name whose output a node is; empty where there is none."""
    names: set[str] = set()
    for made in (node, *node.all_input_nodes):
        for n in (made, *made.all_input_nodes):
            path = str(n.target) if n.op == "call_module" else str(n.meta.get("path", ""))
            names |= {path.rsplit(".", k)[0] for k in range(path.count(".") + 1)}
    for name in sorted(names - {""}, key=lambda name: (name.count("."), len(name), name)):
        try:
            sites = list(output_sites(module, name))
        except (EditError, UsageError):
            continue
        if any(site.graph is flow.graph and site.node is node for site in sites):
            return name
    return ""


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
    if rule.linear != "first" or len(before) != 1:
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


def nonlinearity(flow: Flow, node: fx.Node) -> nn.Module | None:
    """A copy of the activation behind a value, also through ops that move data or pool it, and dropout.

    None where the value is linear."""
    rule = flow.rule(node)
    if rule.activation and rule.kind != "learned activation":
        return make_activation(rule, node, flow.leaf(node))
    if not (rule.movement or rule.within or rule.linear == "first"):
        return None
    before = [nonlinearity(flow, n) for n in flow.tensors(node)]
    alike = before and all(b is not None and repr(b) == repr(before[0]) for b in before)
    return before[0] if alike else None
