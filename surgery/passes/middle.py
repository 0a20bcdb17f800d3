"""The middle of a network: where a hint is taken by default."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx, nn

from surgery.errors import EditError, UsageError
from surgery.graph.labels import Labelled
from surgery.passes.blocks import Flow
from surgery.passes.sites import output_sites


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
