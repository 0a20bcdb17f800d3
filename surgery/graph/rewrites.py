"""How a node's constants and a layer's attributes follow an edit: the right-hand column of the rule table.

A rewrite sees a `Site`: the node in the new graph, the new layer with its new tensors, and the shapes that the edit
asks for. It changes numbers only; that the result is what the edit asked for is checked by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Site:
    """Where a rewrite works."""

    node: fx.Node
    module: Any
    """The new layer, its parameters already gathered; None for a function or method."""
    shapes: tuple[tuple[int, ...], ...]
    """New shapes of the outputs."""
    changed: frozenset[int]
    """Dims of the first output whose channels changed."""
    inputs: tuple[tuple[int, ...] | None, ...]
    """New shapes of the positional arguments that are tensors."""


def linear(site: Site) -> None:
    site.module.out_features, site.module.in_features = site.module.weight.shape


def conv(site: Site) -> None:
    layer = site.module
    outs, per_group = layer.weight.shape[:2]
    if layer.groups > 1 and layer.in_channels == layer.groups:
        layer.groups = outs // (layer.out_channels // layer.groups)
    layer.out_channels, layer.in_channels = outs, per_group * layer.groups


def conv_transpose(site: Site) -> None:
    layer = site.module
    ins, per_group = layer.weight.shape[:2]
    if layer.groups > 1 and layer.in_channels == layer.groups:
        layer.groups = ins
    layer.in_channels, layer.out_channels = ins, per_group * layer.groups


def conv_function(site: Site) -> None:
    """``groups`` of ``F.conv*`` follows where each group has one input channel."""
    weight = site.inputs[1]
    signature = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    groups = _argument(site.node, signature, "groups", 1)
    if isinstance(groups, int) and groups > 1 and weight is not None and weight[1] == 1 and site.inputs[0] is not None:
        _set_argument(site.node, signature, "groups", site.inputs[0][1])


def batch_norm(site: Site) -> None:
    if site.inputs[0] is not None:
        site.module.num_features = site.inputs[0][1]


def prelu(site: Site) -> None:
    site.module.num_parameters = site.module.weight.shape[0]


def embedding(site: Site) -> None:
    site.module.embedding_dim = site.module.weight.shape[1]


def reshape(site: Site) -> None:
    """Constants of ``view`` and ``reshape`` at the changed dims; a size that was computed there becomes a constant."""
    node = site.node
    if "shape" in node.kwargs:
        node.kwargs = {**node.kwargs, "shape": _resized(node.kwargs["shape"], site)}
    elif isinstance(node.args[1], (tuple, list)):
        node.args = (node.args[0], _resized(node.args[1], site), *node.args[2:])
    else:
        node.args = (node.args[0], *_resized(node.args[1:], site))


expand = reshape


def pieces(site: Site) -> None:
    """``chunk``, ``split`` and their kin become a ``split`` with the sizes that each piece now has."""
    node = site.node
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    assert isinstance(dim, int)
    sizes = [shape[dim] for shape in site.shapes]
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _resized(shape: Any, site: Site) -> Any:
    new = site.shapes[0]
    return type(shape)(new[d] if d in site.changed and size != -1 else size for d, size in enumerate(shape))


def _argument(node: fx.Node, signature: tuple[str, ...], name: str, default: Any) -> Any:
    at = signature.index(name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, default)


def _set_argument(node: fx.Node, signature: tuple[str, ...], name: str, value: Any) -> None:
    at = signature.index(name)
    if at < len(node.args):
        node.args = (*node.args[:at], value, *node.args[at + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}
