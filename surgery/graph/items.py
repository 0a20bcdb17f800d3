"""What Python reads from and writes to the values of a graph that are more than one tensor."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from surgery.graph.outputs import Rebuild


def set_items(target: Any, index: Any, value: Any) -> Any:
    """A node of the graph: ``target[index] = value``.

    Returns:
        ``target``, which is changed.
    """
    target[index] = value
    return target


fx.node.has_side_effect(set_items)


def may_hold(node: fx.Node) -> bool:
    """Whether the value of a node may be an object or a container of the model's, rather than a tensor: an input, what
    a part of the model gives, and what is read from those."""
    while node.target in (operator.getitem, getattr, "get") and node.op != "placeholder":
        if not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return node.op in ("placeholder", "call_module") or isinstance(node.target, Rebuild)
