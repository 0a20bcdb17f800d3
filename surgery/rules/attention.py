"""Rows of the rule table for multi-head attention in one op: a layer of torch, or a function of torchvision.

What can be chosen in an attention are whole heads, at a fixed size of a head. A head is its rows of the projections to
queries, keys and values, its columns of the output projection, and its entry in whatever is kept for each head.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torchvision.models import swin_transformer
from torchvision.models.video import mvit
from torchvision.models.video import swin_transformer as swin_transformer_3d

from surgery.axes.labels import Field, Fields, Labelled, Shape, move_field, slice_fields
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule
from surgery.layers import attention as heads
from surgery.rules.contraction import contract


def _whole_heads(op: Op, packed: Field | None, count: int, head_dim: int) -> Field | None:
    """The heads in an axis of ``(parts, count, head_dim)`` positions, as one field: chosen as a whole, and alike in
    every part."""
    if packed is None:
        return None
    ids = packed.ids.reshape(-1, count, head_dim)
    op.units(ids)
    return Field((0,), ids[0, :, 0], packed.key)


def _project(op: Op, x: Labelled, weight: Labelled, bias: Field | None) -> Field | None:
    """A linear layer's roles; the rows that it writes."""
    rows, columns = weight.at(0), weight.at(1)
    op.consumes(columns)
    op.tie(op.axis(x, -1)[0], columns)
    op.produces(rows)
    if bias is not None:
        op.produces(bias)
        op.tie(rows, bias)
    return rows


def _finish(op: Op, weight: Labelled, bias: Field | None, inner: Field | None, count: int, head_dim: int) -> Fields:
    """The output projection, which reads the heads."""
    rows, columns = weight.at(0), weight.at(1)
    op.consumes(columns)
    op.tie(inner, _whole_heads(op, columns, count, head_dim))
    op.produces(rows)
    if bias is not None:
        op.produces(bias)
        op.tie(rows, bias)
    return () if rows is None else (Field((-1,), rows.ids, rows.key),)


def _bias(vector: Labelled | None) -> Field | None:
    return None if vector is None else vector.at(0)


# ---------------------------------------------------------------------------------------------------------------------
# torch


def _resize_attention(edit: NodeEdit) -> None:
    heads.fit_heads(edit.module, edit.module.head_dim)


def _multihead_macs(out: Any, *, layer: Any, query: Shape, key: Shape, value: Shape, **given: Any) -> int:
    """The projections, each weight once for each token; and for each query the products with all keys and values."""
    written = given["out_proj.weight"]
    packed = given.get("in_proj_weight")
    if packed is not None:
        width = packed[0] // 3
        rows = [(width, packed[1])] * 3
    else:
        rows = [given[f"{name}_proj_weight"] for name in ("q", "k", "v")]
    projected = sum(math.prod(x[:-1]) * math.prod(row) for x, row in zip((query, key, value), rows, strict=True))
    queries, keys = math.prod(query[:-1]), key[0 if len(key) == 2 else 1 if layer.batch_first else 0]
    keys += ("bias_k" in given) + layer.add_zero_attn
    macs: int = projected + queries * (keys * (rows[0][0] + rows[2][0]) + math.prod(written))
    return macs


@oprule(
    nn.MultiheadAttention,
    heads.HeadAttention,
    rewrite=_resize_attention,
    linear="writes",
    macs=_multihead_macs,
    zeros=("out_proj.weight", "out_proj.bias"),
    tensors=(
        *("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        *("bias_k", "bias_v"),
    ),
)
def _multihead_attention(
    op: Op,
    query: Labelled,
    key: Labelled,
    value: Labelled,
    key_padding_mask: Labelled | None = None,
    need_weights: bool = True,
    attn_mask: Labelled | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    layer = op.module
    if attn_mask is not None and attn_mask.ndim == 3:
        return op.unknown(query, key, value, attn_mask, why="has no rule for these arguments")
    for mask in (key_padding_mask, attn_mask):
        op.lose([] if mask is None else list(mask.fields), f"{op.name} is masked by it")
    count, size = layer.num_heads, layer.head_dim
    bias = _bias(op.param("in_proj_bias"))
    packed = op.param("in_proj_weight")
    if packed is not None:
        for x in (query, key, value):
            rows = _project(op, x, packed, bias)
        inner = _whole_heads(op, rows, count, size)
    else:
        parts = None if bias is None else bias.ids.reshape(3, -1)
        op.produces(bias)
        if parts is not None:
            op.rows(parts)
        inner = None
        for k, (name, x) in enumerate(zip(("q", "k", "v"), (query, key, value), strict=True)):
            weight = op.param(f"{name}_proj_weight")
            assert weight is not None
            part = _whole_heads(op, _project(op, x, weight, None), count, size)
            if parts is not None:
                op.tie(part, _whole_heads(op, Field((0,), parts[k]), count, size))
            if inner is not None:
                op.tie(inner, part)
            inner = part
    for further in (op.param("bias_k", dims=3), op.param("bias_v", dims=3)):
        if further is not None:
            op.lose([f for f in further.fields if f.dims != (2,)], f"{op.name} holds positions in it")
            op.produces(further.at(2))
            op.tie(inner, _whole_heads(op, further.at(2), count, size))
    weight, out_bias = op.param("out_proj.weight"), op.param("out_proj.bias")
    assert weight is not None
    written = _finish(op, weight, _bias(out_bias), inner, count, size)
    if attn_mask is not None or key_padding_mask is not None:
        query, key, value = (Labelled(x.value, op.keep(x, range(x.ndim - 1))) for x in (query, key, value))
    scores, rest = _attended(op, layer.batch_first, query, key, value)
    mixed = tuple(Field((query.ndim - 1,), f.ids, f.key) for f in written)
    if op.out[1] is None:
        return [(*rest, *mixed), None]
    if average_attn_weights and _is_read(op.node, 1):
        op.freeze(inner, f"{op.name} averages over it")
    if average_attn_weights or inner is None:
        return [(*rest, *mixed), scores]
    head = op.out[1].ndim - 3
    shown = tuple(move_field(f, tuple(d + (d >= head) for d in f.dims)) for f in scores)
    return [(*rest, *mixed), (*shown, Field((head,), inner.ids, inner.key))]


def _attended(op: Op, batch_first: bool, *inputs: Labelled) -> tuple[Fields, Fields]:
    """What lies along the batch and the positions of the weights (batch, queries, keys), and of the output."""
    batch = inputs[0].ndim == 3
    order = "bt" if batch_first else "tb"
    q, k, v = (Labelled(x.value[..., 0], tuple(f for f in x.fields if x.ndim - 1 not in f.dims)) for x in inputs)
    queries, keys = (order.replace("t", t) if batch else t for t in "qk")
    out = "bqk" if batch else "qk"
    scores = contract(op, (q, k), (queries, keys), out)
    sizes = {**dict(zip(queries, q.shape, strict=True)), **dict(zip(keys, k.shape, strict=True))}
    weights = Labelled(torch.empty([sizes[c] for c in out], device="meta"), scores)
    scores = op.keep(weights, [-1], f"{op.name} normalises over it")
    return scores, contract(op, (Labelled(weights.value, scores), v), (out, keys), queries)


def _is_read(node: fx.Node, part: int) -> bool:
    """Whether a part of a node's output has a reader."""
    return any(
        not (user.target is operator.getitem and (user.args[1] != part or not user.users)) for user in node.users
    )


# ---------------------------------------------------------------------------------------------------------------------
# torchvision: Swin


def _resize_windowed_attention(edit: NodeEdit) -> None:
    """The number of heads follows the weights; the size of a head becomes an argument where the width says another, or
    where another width is written than is read."""
    node = edit.node
    given = dict(inspect.signature(heads.windowed_attention).bind_partial(*node.args, **node.kwargs).arguments)
    before, after = edit.tensors[given["qkv_weight"]]
    head_dim = given.get("head_dim", before[0] // 3 // given["num_heads"])
    given["num_heads"] = after[0] // 3 // head_dim
    inner, written = edit.tensors[given["proj_weight"]][1][::-1]
    if not inner == written == after[1] or node.target is heads.windowed_attention:
        node.target = heads.windowed_attention
        given["head_dim"] = head_dim
    first = ("input", "qkv_weight", "proj_weight", "relative_position_bias", "window_size", "num_heads")
    node.args = tuple(given.pop(name) for name in first)
    node.kwargs = given


def _windowed_macs(
    out: Shape, *, input: Shape, qkv_weight: Shape, proj_weight: Shape, window_size: Any, **given: Any
) -> int:
    """Each position, those that fill up the last windows too, with all of its window."""
    sizes = [math.ceil(n / w) * w for n, w in zip(input[1:-1], window_size, strict=True)]
    attended = math.prod(window_size) * (qkv_weight[0] // 3) * 2
    macs: int = input[0] * math.prod(sizes) * (math.prod(qkv_weight) + attended + math.prod(proj_weight))
    return macs


@oprule(
    swin_transformer.shifted_window_attention,
    swin_transformer_3d.shifted_window_attention_3d,
    heads.windowed_attention,
    rewrite=_resize_windowed_attention,
    linear="writes",
    macs=_windowed_macs,
    zeros=("proj_weight", "proj_bias"),
)
def _shifted_window_attention(
    op: Op,
    input: Labelled,
    qkv_weight: Labelled,
    proj_weight: Labelled,
    relative_position_bias: Labelled,
    window_size: list[int],
    num_heads: int,
    *rest: Any,
    head_dim: int | None = None,
    qkv_bias: Labelled | None = None,
    proj_bias: Labelled | None = None,
    logit_scale: Labelled | None = None,
    **named: Any,
) -> Fields:
    size = qkv_weight.shape[0] // 3 // num_heads if head_dim is None else head_dim
    if any(isinstance(value, Labelled) for value in rest):
        return op.unknown(input, why="has no rule for these arguments")
    others = op.keep(input, range(input.ndim - 1))
    inner = _whole_heads(op, _project(op, input, qkv_weight, _bias(qkv_bias)), num_heads, size)
    for table, dim in ((relative_position_bias, 1), (logit_scale, 0)):
        if table is not None:
            op.lose([f for f in table.fields if f.dims != (dim,)], f"{op.name} holds positions in it")
            along = next((f for f in table.fields if f.dims == (dim,)), None)
            if along is not None or table.shape[dim] > 1:
                op.tie(inner, along)
    written = _finish(op, proj_weight, _bias(proj_bias), inner, num_heads, size)
    others = tuple(f for f in others if input.ndim - 1 not in f.dims)
    return (*others, *(Field((input.ndim - 1,), f.ids, f.key) for f in written))


@oprule(swin_transformer._get_relative_position_bias, swin_transformer_3d._get_relative_position_bias)
def _relative_position_bias(op: Op, table: Labelled, index: Labelled, window_size: list[int]) -> Fields:
    """Rows of a table (positions, heads) as (1, heads, tokens, tokens)."""
    op.lose(list(index.fields), f"{op.name} holds positions in it")
    return tuple(Field((1,), f.ids, f.key) for f in op.keep(table, [0], f"{op.name} holds positions in it"))


@oprule(swin_transformer._patch_merging_pad)
def _patch_merging(op: Op, x: Labelled) -> Fields:
    """Four neighbours behind one another in one axis."""
    f, rest = op.axis(x, -1)
    rest = tuple(g for g in op.keep(x, [x.ndim - 3, x.ndim - 2]) if x.ndim - 1 not in g.dims)
    if f is None:
        return rest
    copies = f.ids[None].repeat(4, axis=0)
    op.rows(copies)
    return (*rest, Field(f.dims, copies.ravel(), f.key))


# ---------------------------------------------------------------------------------------------------------------------
# torchvision: MViT


@oprule(mvit._unsqueeze, movement=True)
def _unsqueeze(op: Op, x: Labelled, target_dim: int, expand_dim: int) -> Any:
    added = len(op.shape) - x.ndim
    fields = tuple(Field(tuple(d + (d >= expand_dim) * added for d in f.dims), f.ids, f.key) for f in x.fields)
    return [fields, None]


@oprule(mvit._squeeze, movement=True)
def _squeeze(op: Op, x: Labelled, target_dim: int, expand_dim: int, tensor_dim: int) -> Fields:
    if len(op.shape) == x.ndim:
        return x.fields
    return slice_fields(x.fields, tuple(0 if d == expand_dim else slice(None) for d in range(x.ndim)), x.ndim)[0]


@oprule(mvit._add_rel_pos)
def _add_relative_positions(
    op: Op, attn: Labelled, q: Labelled, q_thw: Any, k_thw: Any, *tables: Labelled
) -> Fields:  # fmt: skip
    """Queries times tables (positions, head_dim), added to the scores (batch, heads, queries, keys)."""
    scores = Labelled(attn.value, op.keep(attn, [2, 3], f"{op.name} takes positions from it"))
    queries = Labelled(q.value, op.keep(q, [2], f"{op.name} takes positions from it"))
    added = []
    for table in tables:
        op.lose([f for f in (table.at(0),) if f is not None], f"{op.name} holds positions in it")
        rows = Labelled(table.value, tuple(f for f in table.fields if f.dims == (1,)))
        added.append(Labelled(attn.value, contract(op, (queries, rows), ("abcd", "ed"), "abce")))
    return op.elementwise(scores, *added)


@oprule(mvit._add_shortcut)
def _add_shortcut(op: Op, x: Labelled, shortcut: Labelled, residual_with_cls_embed: bool) -> Fields:
    if not residual_with_cls_embed:
        x, shortcut = (Labelled(t.value, op.keep(t, [2], f"{op.name} picks positions of it")) for t in (x, shortcut))
    return op.elementwise(x, shortcut)
