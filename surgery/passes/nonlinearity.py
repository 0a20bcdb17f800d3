"""The activation that a value is the output of."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import fx, nn

from surgery.graph.maxout import Maxout
from surgery.passes.blocks import Flow
from surgery.passes.sites import activation_of


def nonlinearity(flow: Flow, node: fx.Node) -> nn.Module | None:
    """A copy of the activation behind a value, also through ops that move data or pool it, and dropout.

    None where the value is linear."""
    name = activation_of(flow.owner, node)
    if name:
        return _instance(name, flow.leaf(node), node)
    rule = flow.rule(node)
    if rule is None or not (rule.movement or rule.within or rule.linear == "first"):
        return None
    before = [nonlinearity(flow, n) for n in flow.tensors(node)]
    alike = before and all(b is not None and repr(b) == repr(before[0]) for b in before)
    return before[0] if alike else None


def _instance(name: str, layer: nn.Module | None, node: fx.Node) -> nn.Module:
    """A layer of its own that does what an activation node does."""
    if isinstance(layer, Maxout):
        return Maxout(layer.pieces, layer.dim)
    if layer is not None:
        made: Any = copy.deepcopy(layer)
    else:
        cls = getattr(nn, name)
        known = inspect.signature(cls).parameters
        args = () if isinstance(node.target, str) else node.args[1:]
        made = cls(*args, **{k: v for k, v in node.kwargs.items() if k in known})
    if getattr(made, "inplace", False):
        made.inplace = False
    assert isinstance(made, nn.Module)
    return made
