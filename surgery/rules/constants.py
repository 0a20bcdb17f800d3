"""Rows of the rule table for tensors that a model makes of one number, and for writing into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgery.axes.labels import Field, Fields, Labelled, move_field
from surgery.axes.ops import Op
from surgery.axes.untraced_ops import written_dims
from surgery.graph.items import set_items
from surgery.graph.rule_table import NodeEdit, oprule


def _resize_constant(edit: NodeEdit) -> None:
    """The constant sizes at the changed dims."""
    node = edit.node
    if "size" in node.kwargs:
        node.kwargs = {**node.kwargs, "size": edit.resized(node.kwargs["size"])}
    elif isinstance(node.args[0], (tuple, list)):
        node.args = (edit.resized(node.args[0]), *node.args[1:])
    else:
        node.args = edit.resized(node.args)


@oprule(torch.zeros, torch.ones, torch.full, rewrite=_resize_constant)
def _constant(op: Op, *size: Any, **named: Any) -> Fields:
    """The same number for every channel: an axis of constant size is as long as what it meets."""
    if not op.in_graph:
        return ()
    first = op.node.kwargs.get("size", op.node.args[0] if op.node.args else ())
    sizes = first if isinstance(first, (tuple, list)) else op.node.args
    literal = [d for d, length in enumerate(sizes) if isinstance(length, int) and length > 1]
    return tuple(op.repeated(d) for d in literal if d < len(op.shape))


@oprule(set_items)
def _set_items(op: Op, target: Any, index: Any, value: Any) -> Any:
    """``target[index] = value``: along the axes that both have whole, the same channels."""
    if not isinstance(target, Labelled):
        return op.unknown(*(v for v in (target, value) if isinstance(v, Labelled)))
    plain = fx.node.map_aggregate(index, lambda v: v.value if isinstance(v, Labelled) else v)
    old = torch.empty(target.shape, device="meta")
    new = torch.empty(value.shape, device="meta") if isinstance(value, Labelled) else value
    dims = written_dims(old, plain, new)
    written: set[int] = set()
    for f in value.fields if isinstance(value, Labelled) else ():
        held = None if len(f.dims) > 1 or f.dims[0] not in dims else target.at(dims[f.dims[0]])
        if held is not None and len(held.dims) == 1:
            op.tie(held, move_field(f, held.dims))
            written |= set(held.dims)
        else:
            op.freeze(f, f"{op.name} writes it to positions of another axis")
    kept: list[Field] = []
    for f in target.fields:
        whole = set(f.dims) <= written or (not isinstance(value, Labelled) and _is_whole(plain, f, target.ndim))
        if not whole:
            op.freeze(f, f"{op.name} writes to positions of it")
        kept.append(f)
    return tuple(kept)


def _is_whole(index: Any, f: Field, rank: int) -> bool:
    """Whether an index takes every position along the dims of ``f``, with a number for all of them."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(not (isinstance(part, (int, slice)) or part is Ellipsis) for part in parts):
        return False
    gap = next((k for k, part in enumerate(parts) if part is Ellipsis), len(parts))
    behind = len(parts) - gap - 1
    at = {**dict(enumerate(parts[:gap])), **{rank - behind + k: part for k, part in enumerate(parts[gap + 1 :])}}
    return all(at.get(d, slice(None)) == slice(None) for d in f.dims)
