"""Rows of the rule table for ops that only move data: their outputs are positions of their inputs.

After an edit such an op is run on the new labels; where it does not give what the edit asks for it is followed by, or
replaced by, a selection (`surgery.edit.rewire`).
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub

from surgery.axes.labels import Field, Fields, Labelled, full_index, move_field, permute_fields, slice_fields
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule
from surgery.layers.maxout import Maxout


@oprule("contiguous", "clone", "detach", torch.clone, torch.detach, nn.Identity, QuantStub, DeQuantStub, movement=True)
def _identity(op: Op, input: Labelled, **named: Any) -> Fields:
    return input.fields


@oprule(nn.Flatten, torch.flatten, "flatten", movement=True)
def _flatten(op: Op, input: Labelled, start_dim: int = 0, end_dim: int = -1) -> Fields:
    if input.ndim == 0:
        return ()
    start_dim, end_dim = op.setting("start_dim", start_dim), op.setting("end_dim", end_dim)
    sizes = tuple(max(size, 2) for size in input.shape)
    start, stop = start_dim % input.ndim, end_dim % input.ndim + 1
    return op.reshapes(input, (sizes, (*sizes[:start], math.prod(sizes[start:stop]), *sizes[stop:])))


@oprule(torch.unsqueeze, "unsqueeze", movement=True)
def _unsqueeze(op: Op, input: Labelled, dim: int) -> Fields:
    return _shifted(input.fields, dim % (input.ndim + 1))


def _resize_unflatten(edit: NodeEdit) -> None:
    """The sizes at the changed dims."""
    if edit.module is not None:
        dim = edit.module.dim % (len(edit.old[0]) + 1 - len(edit.module.unflattened_size))
        edit.module.unflattened_size = edit.resized(tuple(edit.module.unflattened_size), dim)
        return
    node = edit.node
    dim = edit.argument("dim", 0) % len((edit.tensor("input") or ((),))[0])
    sizes = edit.argument("sizes")
    if isinstance(sizes, (tuple, list)):
        edit.set_argument("sizes", edit.resized(sizes, dim))
    else:  # the method takes sizes one by one too
        node.args = (*node.args[:2], *edit.resized(node.args[2:], dim))


@oprule(nn.Unflatten, torch.unflatten, "unflatten", rewrite=_resize_unflatten, movement=True)
def _unflatten(op: Op, input: Labelled, dim: int = 0, sizes: Any = None, *more: Any, **named: Any) -> Fields:
    return op.reshapes(input)


def _keep_squeezed(edit: NodeEdit) -> None:
    """``squeeze`` removes the dims that it removed before, whatever is of size 1 now."""
    before, after = edit.tensor("input") or ((), ())
    if all((a == 1) == (b == 1) for a, b in zip(before, after, strict=True)):
        return
    given, read, node = edit.argument("dim"), edit.argument("input"), edit.node
    dims = range(len(before)) if given is None else [given] if isinstance(given, int) else given
    node.op, node.target = "call_function", torch.squeeze
    node.args, node.kwargs = (read, tuple(d for d in dims if before[d] == 1)), {}


@oprule(torch.squeeze, "squeeze", rewrite=_keep_squeezed, movement=True, python=lambda given: "dim" in given)
def _squeeze(op: Op, input: Labelled, dim: Any = None) -> Fields:
    dims = range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % input.ndim for d in dims if input.shape[d] == 1} if input.ndim else set()
    if len(op.shape) != input.ndim - len(gone):  # an edited channel axis
        return ()
    fields = op.keep(input, gone, f"{op.name} removes it")
    place = {d: k for k, d in enumerate(d for d in range(input.ndim) if d not in gone)}
    return tuple(move_field(f, tuple(place[d] for d in f.dims)) for f in fields)


def _resize_view(edit: NodeEdit) -> None:
    """Constants of ``view`` and ``reshape`` at the changed dims; a size that was computed there is scaled."""
    node = edit.node
    named = next((k for k in ("shape", "size") if k in node.kwargs), None)
    if named is not None:
        node.kwargs = {**node.kwargs, named: edit.resized(edit.unpacked(node.kwargs[named]))}
    elif len(node.args) < 2 or (len(edit.inputs) > 1 and edit.inputs[1] is not None):
        return  # as another tensor
    elif isinstance(edit.unpacked(node.args[1]), (tuple, list)):
        node.args = (node.args[0], edit.resized(edit.unpacked(node.args[1])), *node.args[2:])
    else:
        node.args = (node.args[0], *edit.resized(node.args[1:]))


@oprule(torch.reshape, "reshape", "view", rewrite=_resize_view, movement=True, python="sizes")
def _view(op: Op, input: Labelled, *shape: Any, **named: Any) -> Fields:
    if shape and isinstance(shape[0], torch.dtype):
        return op.unknown(input)
    return op.reshapes(input)


@oprule("view_as", "reshape_as", rewrite=_resize_view, movement=True, python="sizes")
def _view_as(op: Op, input: Labelled, other: Labelled) -> Fields:
    return _sized_like(op, op.reshapes(input), other)


def _sized_like(op: Op, fields: Fields, other: Labelled) -> Fields:
    """``fields`` of a result whose sizes are those of ``other``: where both hold channels, they are chosen alike."""
    if op.trial:
        return fields
    read: set[int] = set()
    result = []
    for f in fields:
        f = op.beside(f, [other], other.ndim)
        same = next((g for g in other.fields if g.dims == f.dims), None)
        if same is None and len(f.dims) == 1:
            same = op.axis(other, f.dims[0])[0]
        if same is None:
            op.freeze(f, f"{op.name} takes its size from an axis of other channels")
        else:
            op.tie(f, same)
            read.update(f.dims)
        result.append(f)
    op.lose([g for g in other.fields if not read & set(g.dims)], f"{op.name} reads its size")
    return tuple(result)


@oprule(torch.movedim, torch.moveaxis, "movedim", "moveaxis", movement=True)
def _movedim(op: Op, input: Labelled, source: Any, destination: Any) -> Fields:
    order = torch.movedim(torch.empty(tuple(range(input.ndim)), device="meta"), source, destination).shape
    return permute_fields(input.fields, tuple(order))


@oprule(torch.permute, "permute", torchvision.ops.Permute, movement=True)
def _permute(op: Op, input: Labelled, *order: Any, dims: Any = None) -> Fields:
    order = op.setting("dims", dims) or (order[0] if len(order) == 1 and not isinstance(order[0], int) else order)
    return permute_fields(input.fields, tuple(d % input.ndim for d in order))


@oprule(torch.transpose, "transpose", torch.swapaxes, "swapaxes", movement=True)
def _transpose(op: Op, input: Labelled, dim0: int, dim1: int) -> Fields:
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute_fields(input.fields, tuple(order))


@oprule(torch.t, "t", "mT", movement=True)  # outside graphs the attribute is met as a method
def _t(op: Op, input: Labelled) -> Fields:
    return _transpose(op, input, -1, -2) if input.ndim > 1 else input.fields


@oprule(getattr, movement=True)
def _attribute(op: Op, input: Any, name: str, *default: Any) -> Any:
    """An attribute of a tensor that is a tensor, or of a named tuple; numbers such as ``shape`` hold no channels."""
    if not isinstance(input, Labelled):
        found = getattr(input, name)
        return found.fields if isinstance(found, Labelled) else op.unknown(input)
    if name in ("mT", "T", "H"):
        return permute_fields(input.fields, tuple(reversed(range(input.ndim)))) if name != "mT" else _t(op, input)
    return input.fields if name == "data" else op.unknown(input, why=f"reads .{name} of it")


@oprule(torch.cat, torch.concat, torch.concatenate, kind="concatenation")
def _cat(op: Op, tensors: Any, dim: int = 0, axis: int | None = None) -> Fields:
    return op.concatenates(tensors, dim if axis is None else axis)


@oprule(torch.stack)
def _stack(op: Op, tensors: Any, dim: int = 0) -> Fields:
    rank = len(op.shape)
    dim %= rank
    fields: list[Field] = []
    for t in tensors:  # which have one shape, so their channels are chosen alike
        for f in t.fields:
            op.meet(fields, f)
    return _shifted(tuple(op.beside(f, list(tensors), rank - 1, spreads=False) for f in fields), dim)


def _shifted(fields: Fields, dim: int) -> Fields:
    """Fields where a new dim is put before ``dim``."""
    return tuple(move_field(f, tuple(d + (d >= dim) for d in f.dims)) for f in fields)


def _split_by_size(edit: NodeEdit) -> None:
    """``chunk``, ``split`` and their kin become a ``split`` with the sizes that each piece now has."""
    node, dim = edit.node, edit.argument("dim", 0)
    assert isinstance(dim, int)
    if dim % len(edit.shapes[0]) in edit.changed:
        source = edit.argument("tensor", node.kwargs.get("input"))
        node.op, node.target = "call_function", torch.split
        node.args, node.kwargs = (source, [shape[dim] for shape in edit.shapes], dim), {}


@oprule(torch.chunk, "chunk", torch.split, "split", torch.tensor_split, "tensor_split", rewrite=_split_by_size,
        movement=True, python="always")  # fmt: skip
def _pieces(op: Op, tensor: Any = None, how: Any = None, dim: int = 0, *, input: Any = None, **named: Any) -> Any:
    tensor = tensor if input is None else input
    dim %= tensor.ndim
    op.takes_apart(tensor, [dim])
    result = []
    start = 0
    for piece in op.out:
        stretch = slice(start, start + piece.shape[dim])
        index = tuple(stretch if d == dim else slice(None) for d in range(tensor.ndim))
        result.append(slice_fields(tensor.fields, index, tensor.ndim)[0])
        start = stretch.stop
        for f in result[-1]:
            op.cut(f)
    return result


@oprule(torch.unbind, "unbind", movement=True)
def _unbind(op: Op, input: Labelled, dim: int = 0) -> Any:
    op.takes_apart(input, [dim % input.ndim])
    result = []
    for k in range(input.shape[dim]):
        index = tuple(k if d == dim % input.ndim else slice(None) for d in range(input.ndim))
        fields, picked = slice_fields(input.fields, index, input.ndim)
        op.lose(picked, f"{op.name} picks positions of it")
        result.append(fields)
    return result


@oprule(operator.getitem, movement=True)
def _getitem(op: Op, input: Labelled, index: Any) -> Fields:
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, Labelled) for i in index):
        return _pick_rows(op, input, index)
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in index):
        return op.unknown(input)
    fields, picked = slice_fields(input.fields, index, input.ndim)
    given = [i for i in full_index(index, input.ndim) if i is not None]
    op.takes_apart(input, [d for d, i in enumerate(given) if i != slice(None)])
    for f in input.fields:  # the number of a position stays, so no channel may move to or from it
        if any(np.isin(g.ids, f.ids).any() for g in picked):
            op.freeze(f, f"{op.name} picks positions of it")
    for f in fields:
        op.cut(f)
    return fields


@oprule(torch.select, "select", movement=True)
def _select(op: Op, input: Labelled, dim: int, index: int) -> Fields:
    return _getitem(op, input, (*[slice(None)] * (dim % input.ndim), index))


def _pick_rows(op: Op, input: Labelled, index: tuple[Any, ...]) -> Fields:
    """Rows of a table, at positions that a tensor holds, or at the pairs of positions that several next to each other
    do."""
    index = full_index(index, input.ndim)
    at = [k for k, i in enumerate(index) if isinstance(i, Labelled)]
    positions: list[Labelled] = [index[k] for k in at]
    if any(not isinstance(i, Labelled) and i != slice(None) for i in index) or at != list(range(at[0], at[-1] + 1)):
        return op.unknown(input, *index)
    op.lose([f for p in positions for f in p.fields], f"{op.name} reads positions from it")
    if any(p.value.dtype == torch.bool for p in positions):
        return op.unknown(input)
    shift = max(p.ndim for p in positions) - len(at)
    rest = op.keep(input, at, f"{op.name} picks positions of it")
    return tuple(move_field(f, tuple(d + (d > at[0]) * shift for d in f.dims)) for f in rest)


def _resize_narrow(edit: NodeEdit) -> None:
    """``narrow`` along a changed dim takes what it has become; where that begins is for the caller to check."""
    dim = edit.argument("dim", 0) % len(edit.shapes[0])
    if dim in edit.changed:
        edit.set_argument("length", edit.shapes[0][dim])


@oprule(torch.narrow, "narrow", rewrite=_resize_narrow, movement=True, python="always")
def _narrow(op: Op, input: Labelled, dim: int, start: int, length: int) -> Fields:
    op.takes_apart(input, [dim % input.ndim])
    index = tuple(slice(start, start + length) if d == dim % input.ndim else slice(None) for d in range(input.ndim))
    fields = slice_fields(input.fields, index, input.ndim)[0]
    for f in fields:
        op.cut(f)
    return fields


@oprule(torch.flip, "flip", movement=True)
def _flip(op: Op, input: Labelled, *order: Any, dims: Any = None) -> Fields:
    dims = dims or (order[0] if not isinstance(order[0], int) else order)
    turned = {d % input.ndim for d in dims}
    return tuple(
        Field(f.dims, np.flip(f.ids, tuple(k for k, d in enumerate(f.dims) if d in turned)), f.key)
        for f in input.fields
    )


@oprule(torch.roll, "roll", movement=True)
def _roll(op: Op, input: Labelled, shifts: Any, dims: Any = None) -> Fields:
    if dims is None:
        return op.unknown(input)
    pairs = [(shifts, dims)] if isinstance(dims, int) else list(zip(shifts, dims, strict=True))
    by = {d % input.ndim: s for s, d in pairs}
    return tuple(
        Field(f.dims, np.roll(f.ids, [by.get(d, 0) for d in f.dims], range(f.ids.ndim)), f.key) for f in input.fields
    )


@oprule("repeat", movement=True)
def _repeat(op: Op, input: Labelled, *sizes: Any, repeats: Any = None) -> Fields:
    times = repeats or (sizes[0] if not isinstance(sizes[0], int) else sizes)
    shift = len(op.shape) - input.ndim
    return tuple(
        Field(tuple(d + shift for d in f.dims), np.tile(f.ids, [times[d + shift] for d in f.dims]), f.key)
        for f in input.fields
    )


@oprule(torch.repeat_interleave, "repeat_interleave", movement=True)
def _repeat_interleave(op: Op, input: Labelled, repeats: Any, dim: int | None = None, **named: Any) -> Fields:
    if dim is None or not isinstance(repeats, int):
        return op.unknown(input)
    return tuple(
        Field(f.dims, np.repeat(f.ids, repeats, f.dims.index(dim % input.ndim)), f.key)
        if dim % input.ndim in f.dims
        else f
        for f in input.fields
    )


@oprule(torch.index_select, "index_select", movement=True)
def _index_select(op: Op, input: Labelled, dim: int, index: Labelled) -> Fields:
    dim %= input.ndim
    f = input.at(dim)
    op.lose(list(index.fields), f"{op.name} reads positions from it")
    if f is None or index.constant is None or len(f.dims) > 1:
        return op.keep(input, [dim], f"{op.name} picks positions of it")
    return tuple(Field(g.dims, g.ids[index.constant.cpu().numpy()], g.key) if g is f else g for g in input.fields)


@oprule(torch.gather, "gather")
def _gather(op: Op, input: Labelled, dim: int, index: Labelled, **named: Any) -> Fields:
    """Along the other axes, position for position, the index chooses of the channel where it stands."""
    if not input.ndim:
        return op.unknown(input, index)
    dim %= input.ndim
    fields: list[Field] = []
    for tensor, why in ((input, "picks positions of it"), (index, "reads positions from it")):
        for f in op.keep(tensor, [dim], f"{op.name} {why}"):
            if any(input.shape[d] != index.shape[d] for d in f.dims):
                op.freeze(f, f"{op.name} takes the first positions of it")
            op.meet(fields, f)
    fields = [f for f in fields if all(f.ids.shape[k] == op.shape[d] for k, d in enumerate(f.dims))]
    return tuple(op.beside(f, [input, index], input.ndim, spreads=False) for f in fields)


@oprule("expand", torch.broadcast_to, "broadcast_to", rewrite=_resize_view, linear="first", python="sizes")
def _expand(op: Op, input: Labelled, *sizes: Any, **named: Any) -> Fields:
    return _stretch(op, input, None)


@oprule("expand_as", rewrite=_resize_view, linear="first", python="sizes")
def _expand_as(op: Op, input: Labelled, other: Labelled) -> Fields:
    return _sized_like(op, _stretch(op, input, other), other)


def _stretch(op: Op, input: Labelled, other: Labelled | None) -> Fields:
    """What is repeated is the same for every channel: it can be as long as what it meets."""
    shift = len(op.shape) - input.ndim
    fields = list(op.elementwise(input))
    for d in range(0 if other is not None else 1, len(op.shape)):
        if op.shape[d] > 1 and (d < shift or input.shape[d - shift] == 1):
            like = None if other is None else op.axis(other, d)[0]
            if other is None:
                fields.append(op.repeated(d))
            elif like is not None:
                fields.append(Field((d,), like.ids, like.key))
    return tuple(fields)


@oprule(nn.ChannelShuffle, F.channel_shuffle, movement=True)
def _channel_shuffle(op: Op, input: Labelled, groups: int | None = None) -> Fields:
    groups = op.setting("groups", groups)
    assert groups is not None
    f, rest = op.axis(input, 1)
    if f is None:
        return rest
    return (*rest, Field(f.dims, np.ascontiguousarray(f.ids.reshape(groups, -1).T).ravel(), f.key))


@oprule(nn.PixelShuffle, F.pixel_shuffle)
def _pixel_shuffle(op: Op, input: Labelled, upscale_factor: int | None = None) -> Fields:
    """Each channel of the output is made of ``r * r`` channels of the input, which go together."""
    f, _ = op.axis(input, input.ndim - 3)
    rest = tuple(g for g in op.keep(input, [-2, -1]) if max(g.dims) < input.ndim - 3)
    if f is None:
        return rest
    channels = f.ids.reshape(op.shape[-3], -1)
    op.units(channels)
    return (*rest, Field(f.dims, channels[:, 0], f.key))


@oprule(nn.PixelUnshuffle, F.pixel_unshuffle)
def _pixel_unshuffle(op: Op, input: Labelled, downscale_factor: int | None = None) -> Fields:
    f, _ = op.axis(input, input.ndim - 3)
    rest = tuple(g for g in op.keep(input, [-2, -1]) if max(g.dims) < input.ndim - 3)
    return rest if f is None else (*rest, Field(f.dims, np.repeat(f.ids, op.shape[-3] // f.ids.size), f.key))


@oprule("unfold")
def _windows(op: Op, input: Labelled, dimension: int, size: int, step: int) -> Fields:
    """Windows along an axis, with their positions in a new last axis."""
    return op.keep(input, [dimension], f"{op.name} takes windows along it") if input.ndim else ()


@oprule(F.unfold, nn.Unfold)
def _unfold(op: Op, input: Labelled, *args: Any, **named: Any) -> Fields:
    """Each channel becomes its patches' positions, one behind the other."""
    if input.ndim != 4:
        return op.unknown(input)
    f, rest = op.axis(input, 1)
    op.keep(input, [2, 3])
    rest = tuple(g for g in rest if max(g.dims) < 1)
    return rest if f is None else (*rest, Field((1,), np.repeat(f.ids, op.shape[1] // f.ids.size), f.key))


@oprule(Maxout, within=True, kind="activation")
def _maxout(op: Op, input: Labelled) -> Fields:
    """The pieces of a unit go together."""
    f, rest = op.axis(input, op.module.dim)
    if f is None:
        return rest
    pieces = f.ids.reshape(-1, op.module.pieces)
    op.units(pieces)
    return (*rest, Field(f.dims, pieces[:, 0], f.key))
