"""How a node's constants and a layer's attributes follow an edit: the right-hand column of the rule table.

A rewrite sees a `NodeEdit`: the node in the new graph, the new layer with its new tensors, and the shapes that the edit
asks for. It changes numbers only; that the result is what the edit asked for is checked by the caller.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
from torch import fx

from surgery.graph.table import NodeEdit
from surgery.layers import attention as heads
from surgery.layers.norms import scaled_normalize


def linear(site: NodeEdit) -> None:
    site.module.out_features, site.module.in_features = site.module.weight.shape


def conv(site: NodeEdit) -> None:
    layer = site.module
    outs, per_group = layer.weight.shape[:2]
    if layer.groups > 1 and layer.in_channels == layer.groups:
        layer.groups = outs // (layer.out_channels // layer.groups)
    layer.out_channels, layer.in_channels = outs, per_group * layer.groups


def conv_transpose(site: NodeEdit) -> None:
    layer = site.module
    ins, per_group = layer.weight.shape[:2]
    if layer.groups > 1 and layer.in_channels == layer.groups:
        layer.groups = ins
    layer.in_channels, layer.out_channels = ins, per_group * layer.groups


def conv_function(site: NodeEdit) -> None:
    """``groups`` of ``F.conv*`` follows where each group has one input channel."""
    signature = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    weight, read = tensor(site, signature, "weight"), tensor(site, signature, "input")
    groups = argument(site.node, signature, "groups", 1)
    if isinstance(groups, int) and groups > 1 and weight is not None and weight[1][1] == 1 and read is not None:
        set_argument(site.node, signature, "groups", read[1][1 - len(weight[1])])


def conv_transpose_function(site: NodeEdit) -> None:
    """``groups`` of ``F.conv_transpose*`` follows where each group has one input channel."""
    signature = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    weight, read = tensor(site, signature, "weight"), tensor(site, signature, "input")
    groups = argument(site.node, signature, "groups", 1)
    if isinstance(groups, int) and groups > 1 and weight is not None and weight[0][0] == groups and read is not None:
        set_argument(site.node, signature, "groups", read[1][1 - len(weight[1])])


def layer_norm(site: NodeEdit) -> None:
    rank = len(site.module.normalized_shape)
    site.module.normalized_shape = tuple(site.shapes[0][-rank:])


def layer_norm_function(site: NodeEdit) -> None:
    """``normalized_shape`` of ``F.layer_norm``."""
    signature = ("input", "normalized_shape")
    shape = _unpacked(argument(site.node, signature, "normalized_shape", ()), site)
    if site.changed:
        set_argument(site.node, signature, "normalized_shape", _resized(shape, site, len(site.shapes[0]) - len(shape)))


def group_norm(site: NodeEdit) -> None:
    layer = site.module
    if layer.num_groups == layer.num_channels:
        layer.num_groups = site.shapes[0][1]
    layer.num_channels = site.shapes[0][1]


def group_norm_function(site: NodeEdit) -> None:
    """``num_groups`` of ``F.group_norm`` follows where each group has one channel."""
    signature = ("input", "num_groups")
    read = tensor(site, signature, "input")
    if read is not None and argument(site.node, signature, "num_groups", 1) == read[0][1]:
        set_argument(site.node, signature, "num_groups", site.shapes[0][1])


def batch_norm(site: NodeEdit) -> None:
    site.module.num_features = site.shapes[0][1]


def prelu(site: NodeEdit) -> None:
    site.module.num_parameters = site.module.weight.shape[0]


def embedding(site: NodeEdit) -> None:
    site.module.embedding_dim = site.module.weight.shape[1]


def multihead_attention(site: NodeEdit) -> None:
    heads.fit_heads(site.module, site.module.head_dim)


def windowed_attention(site: NodeEdit) -> None:
    """The number of heads follows the weights; the size of a head becomes an argument where the width says another."""
    node = site.node
    given = dict(inspect.signature(heads.windowed_attention).bind_partial(*node.args, **node.kwargs).arguments)
    before, after = site.tensors[given["qkv_weight"]]
    head_dim = given.get("head_dim", before[0] // 3 // given["num_heads"])
    given["num_heads"] = after[0] // 3 // head_dim
    if given["num_heads"] * head_dim != after[1] or node.target is heads.windowed_attention:
        node.target = heads.windowed_attention
        given["head_dim"] = head_dim
    first = ("input", "qkv_weight", "proj_weight", "relative_position_bias", "window_size", "num_heads")
    node.args = tuple(given.pop(name) for name in first)
    node.kwargs = given


def normalize(site: NodeEdit) -> None:
    """``F.normalize`` over channels with copies gives back the old values, times the length that copies add."""
    kwargs = {name: value for name, value in site.node.kwargs.items() if name != "out"}
    given = dict(inspect.signature(scaled_normalize).bind(*site.node.args, **kwargs).arguments)
    p, copies = given.get("p", 2.0), site.copies.get(given.get("dim", 1) % len(site.shapes[0]), 1)
    if copies == 1:
        return
    given["scale"] = given.get("scale", 1.0) * (1.0 if math.isinf(p) else copies ** (1 / p))
    site.node.target, site.node.args, site.node.kwargs = scaled_normalize, (given.pop("input"),), given


def reshape(site: NodeEdit) -> None:
    """Constants of ``view`` and ``reshape`` at the changed dims; a size that was computed there is scaled."""
    node = site.node
    named = next((k for k in ("shape", "size") if k in node.kwargs), None)
    if named is not None:
        node.kwargs = {**node.kwargs, named: _resized(_unpacked(node.kwargs[named], site), site)}
    elif len(node.args) < 2 or (len(site.inputs) > 1 and site.inputs[1] is not None):
        return  # as another tensor
    elif isinstance(_unpacked(node.args[1], site), (tuple, list)):
        node.args = (node.args[0], _resized(_unpacked(node.args[1], site), site), *node.args[2:])
    else:
        node.args = (node.args[0], *_resized(node.args[1:], site))


def unflatten(site: NodeEdit) -> None:
    """The sizes of ``unflatten`` and `nn.Unflatten` at the changed dims."""
    if site.module is not None:
        dim = site.module.dim % (len(site.old[0]) + 1 - len(site.module.unflattened_size))
        site.module.unflattened_size = _resized(tuple(site.module.unflattened_size), site, dim)
        return
    node = site.node
    signature = ("input", "dim", "sizes")
    dim = argument(node, signature, "dim", 0) % len((tensor(site, signature, "input") or ((),))[0])
    sizes = argument(node, signature, "sizes", None)
    if isinstance(sizes, (tuple, list)):
        set_argument(node, signature, "sizes", _resized(sizes, site, dim))
    else:  # the method takes sizes one by one too
        node.args = (*node.args[:2], *_resized(node.args[2:], site, dim))


def squeeze(site: NodeEdit) -> None:
    """``squeeze`` removes the dims that it removed before, whatever is of size 1 now."""
    signature = ("input", "dim")
    before, after = tensor(site, signature, "input") or ((), ())
    if all((a == 1) == (b == 1) for a, b in zip(before, after, strict=True)):
        return
    given = argument(site.node, signature, "dim", None)
    dims = range(len(before)) if given is None else [given] if isinstance(given, int) else given
    node = site.node
    node.op, node.target = "call_function", torch.squeeze
    read = argument(node, signature, "input", None)
    node.args, node.kwargs = (read, tuple(d for d in dims if before[d] == 1)), {}


def narrow(site: NodeEdit) -> None:
    """``narrow`` along a changed dim takes what it has become; where that begins is for the caller to check."""
    signature = ("input", "dim", "start", "length")
    dim = argument(site.node, signature, "dim", 0) % len(site.shapes[0])
    if dim in site.changed:
        set_argument(site.node, signature, "length", site.shapes[0][dim])


def pieces(site: NodeEdit) -> None:
    """``chunk``, ``split`` and their kin become a ``split`` with the sizes that each piece now has."""
    node = site.node
    signature = ("tensor" if "tensor" in node.kwargs else "input", "sections", "dim")
    dim = argument(node, signature, "dim", 0)
    assert isinstance(dim, int)
    if dim % len(site.shapes[0]) not in site.changed:
        return
    sizes = [shape[dim] for shape in site.shapes]
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (argument(node, signature, signature[0], None), sizes, dim), {}


def _unpacked(shape: Any, site: NodeEdit) -> Any:
    """A shape that another node computes, as a tuple of its entries."""
    size = site.computed.get(shape) if isinstance(shape, fx.Node) else None
    if size is None:
        return shape
    graph = site.node.graph
    with graph.inserting_before(site.node):
        return tuple(_computed(site, operator.getitem, (shape, k)) for k in range(len(size)))


def _resized(shape: Any, site: NodeEdit, first: int = 0) -> Any:
    new, old = site.shapes[0], site.old[0]
    return type(shape)(
        size if d not in site.changed or size == -1 else _scaled(size, new[d], old[d], site)
        for d, size in enumerate(shape, start=first)
    )


def _scaled(size: Any, new: int, old: int, site: NodeEdit) -> Any:
    """A constant gives way to the new size. A size that is computed may hold others too (batch times heads)."""
    if not isinstance(size, fx.Node):
        return new
    graph, factor = site.node.graph, math.gcd(new, old)
    with graph.inserting_before(site.node):
        for function, number in ((operator.mul, new // factor), (operator.floordiv, old // factor)):
            size = size if number == 1 else _computed(site, function, (size, number))
    return size


def _computed(site: NodeEdit, function: Any, args: tuple[Any, ...]) -> fx.Node:
    """A new node, of the module that the site is in."""
    node = site.node.graph.call_function(function, args)
    node.meta["path"] = site.node.meta.get("path", "")
    return node


def tensor(site: NodeEdit, signature: tuple[str, ...], name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Old and new shape of an argument, positional or not; None where it is no tensor."""
    value = argument(site.node, signature, name, None)
    return site.tensors.get(value) if isinstance(value, fx.Node) else None


def argument(node: fx.Node, signature: tuple[str, ...], name: str, default: Any) -> Any:
    at = signature.index(name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, default)


def set_argument(node: fx.Node, signature: tuple[str, ...], name: str, value: Any) -> None:
    at = signature.index(name)
    if at < len(node.args):
        node.args = (*node.args[:at], value, *node.args[at + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}
