"""Guards on the batch size that need not refuse anything: whichever way Python goes there, the graph is the same.

Models ask whether the batch is as large as something of batch 1 before they expand it, say. Such a condition is met for
every batch but one. The model is traced at another batch size as well; where both graphs are the same, but for ops that
do nothing at that size, both outcomes of the condition are in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import TraceError
from surgery.graph.arguments import Arguments
from surgery.graph.finite import expect_finite
from surgery.graph.guards import ASPECTS, Values, expect
from surgery.graph.items import set_items
from surgery.graph.outputs import Rebuild

_EXPANDING = ("expand", "expand_as", "broadcast_to", torch.broadcast_to)
_FEW = 4096
"""Up to how many entries of a constant are compared."""


def relax_guards(root: nn.Module, graph: fx.Graph, retrace: Callable[[Arguments], fx.Graph], other: Arguments) -> None:
    """Take guards off ``graph`` that refuse ``other`` for nothing.

    Args:
        root: what ``graph`` was traced from.
        retrace: traces ``root`` in the same mode with other arguments.
        other: arguments like those of ``graph``, at another batch size.
    """
    values = Values(root, other.values)
    refusing = [node for node in graph.nodes if node.target is expect and _refuses(node, values)]
    if not refusing or not all(isinstance(node.args[2], bool) for node in refusing):
        return
    try:
        second = retrace(other)
        ours, theirs = (_describe(root, g, Values(root, other.values)) for g in (graph, second))
    except Exception:  # Python goes a way that no graph has
        return
    if ours == theirs:
        for node in refusing:
            graph.erase_node(node)


def _refuses(guard: fx.Node, values: Values) -> bool:
    looked, aspect, expected = guard.args[:3]
    assert isinstance(looked, fx.Node)
    try:
        found = ASPECTS[str(aspect)](values.of(looked))
    except (TraceError, RuntimeError, TypeError):
        return False  # which its own trace says
    return isinstance(found, torch.Tensor) or found != expected


def _describe(root: nn.Module, graph: fx.Graph, values: Values) -> list[Any]:
    """What a graph computes and asks, line by line, without what does nothing and what nobody reads."""
    same: dict[fx.Node, fx.Node] = {}

    def origin(node: fx.Node) -> fx.Node:
        while node in same:
            node = same[node]
        return node

    for node in graph.nodes:
        read = node.args[0] if node.args else None
        if node.op.startswith("call_") and node.target in _EXPANDING and isinstance(read, fx.Node):
            before, after = values.of(read), values.of(node)
            if isinstance(before, torch.Tensor) and before.shape == after.shape:
                same[node] = read
    roots = [n for n in graph.nodes if n.op == "output" or n.target in (expect, expect_finite, set_items)]
    live: set[fx.Node] = set()
    while roots:
        node = origin(roots.pop())
        if node not in live:
            live.add(node)
            roots += node.all_input_nodes
    numbers = {node: k for k, node in enumerate(n for n in graph.nodes if n in live)}
    return [_line(root, node, lambda n: f"%{numbers[origin(n)]}") for node in numbers]


def _line(root: nn.Module, node: fx.Node, name: Callable[[fx.Node], str]) -> Any:
    target: Any = repr(node.target) if isinstance(node.target, Rebuild) else node.target
    if node.op == "get_attr" and str(target).startswith("_tensor_constant"):
        held = getattr(root, str(target))
        target = (held.shape, held.dtype, held.tolist() if held.numel() <= _FEW else id(held))
    args = (*node.args[:2], node.args[3]) if node.target is expect else node.args
    return node.op, target, repr(fx.map_arg(args, name)), repr(fx.map_arg(node.kwargs, name))
