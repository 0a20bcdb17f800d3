"""Sizes that the network computes with: after an edit they are what they were before it.

An axis of channels alone has the size that it was traced with. One that holds the batch as well (batch x heads) has
another at each batch size, so the old size is computed from the new one.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from surgery.axes.labels import Ids, Labelled
from surgery.axes.ledger import labelled_leaves
from surgery.edit.edited_graph import EditedGraph


def pin_size(edit: EditedGraph, node: fx.Node, out: Any) -> None:
    """Let a size that is read from a changed axis be what it was before the edit.

    Where it shapes a tensor, the op that it shapes is given the new size by its rule.

    Args:
        edit: the graph.
        node: an old node whose value ``out`` holds no tensor.
    """
    read = ((a, v) for a in node.all_input_nodes for v in labelled_leaves(edit.record(a)))
    source, value = next(((a, v) for a, v in read if edit.layouts.shape(v) != v.shape), (None, None))
    if source is None or value is None or isinstance(out, (torch.dtype, torch.device)):
        return
    new, shape = edit.new[node.name], edit.layouts.shape(value)
    changed = {d for d, n in enumerate(shape) if n != value.shape[d]}
    if isinstance(out, tuple):
        for user in list(new.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                if (d := user.args[1] % len(out)) in changed:
                    _restore(edit, user, source, value, d)
            else:
                with edit.copy.inserting_before(user):
                    sizes = tuple(edit.copy.call_function(operator.getitem, (new, d)) for d in range(len(out)))
                    user.replace_input_with(new, edit.copy.call_function(torch.Size, (sizes,)))
                for d in changed:
                    _restore(edit, sizes[d], source, value, d)
    elif isinstance(out, int) and node.target == "size":
        d = int(node.args[1] if len(node.args) > 1 else node.kwargs["dim"]) % value.ndim  # type: ignore[arg-type]
        if d in changed:
            _restore(edit, new, source, value, d)
    elif isinstance(out, int) and node.target in ("numel", "nelement", torch.numel):
        _scale(new, math.prod(value.shape), math.prod(shape))


def _restore(edit: EditedGraph, size: fx.Node, source: fx.Node, value: Labelled, dim: int) -> None:
    """Let ``size``, of ``dim`` of ``source``, be the old size."""
    if not _holds_channels_alone(edit, source, dim):
        _scale(size, value.shape[dim], edit.layouts.shape(value)[dim])
        return
    for user in list(size.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: value.shape[dim] if n is size else n)
    size.graph.erase_node(size)


def _scale(size: fx.Node, was: int, now: int) -> None:
    """Let what reads ``size`` read ``size * was / now``."""
    users, divisor, graph = list(size.users), math.gcd(was, now), size.graph
    with graph.inserting_after(size):
        scaled = graph.call_function(operator.mul, (size, was // divisor))
    with graph.inserting_after(scaled):
        result = graph.call_function(operator.floordiv, (scaled, now // divisor))
    for new in (scaled, result):
        new.meta["path"] = size.meta.get("path", "")
    for user in users:
        user.replace_input_with(size, result)


def _holds_channels_alone(edit: EditedGraph, node: fx.Node, dim: int) -> bool:
    """Whether the axis is known to be as long at any batch size: a layer's weights give it its size."""
    if not node.op.startswith("call"):
        return node.op == "get_attr"
    value = edit.record(node)
    if edit.rule(node).kind == "concatenation":
        return all(_holds_channels_alone(edit, n, dim) for n in node.all_input_nodes)
    if edit.rule(node).movement or not isinstance(value, Labelled):
        return False
    held = value.at(dim)
    if held is not None and _is_written(edit, node, edit.analysis.unit_of[held.ids]):
        return True
    return any(
        isinstance(read, Labelled) and read.shape == value.shape and _holds_channels_alone(edit, n, dim)
        for n in node.all_input_nodes
        for read in (edit.record(n),)
    )


def _is_written(edit: EditedGraph, node: fx.Node, units: Ids) -> bool:
    """Whether a weight that the node reads has an axis of these units."""
    leaf = edit.leaf(node)
    if leaf is not None:
        names = [f"{node.target}.{name}" for name, _ in leaf.named_parameters(recurse=False)]
    else:
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    axes = [edit.analysis.axis_units.get((f"{edit.path}.{n}".lstrip("."), 0)) for n in names]
    return any(axis is not None and np.array_equal(axis, units) for axis in axes)
