"""Rows of the rule table for layers of weights: linear, convolution, embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from surgery.axes.labels import Field, Fields, Labelled
from surgery.axes.ops import Op
from surgery.graph.table import oprule
from surgery.rules import rewrites


def _linear(op: Op, x: Labelled, rows: Field | None, columns: Field | None, bias: Labelled | None = None) -> Fields:
    """``rows`` of the weight are written, its ``columns`` are contracted with the last axis of ``x``."""
    read, rest = op.axis(x, -1)
    op.consumes(columns)
    op.tie(read, columns)
    op.produces(rows)
    if bias is not None:
        op.produces(bias.at(0))
        op.tie(rows, bias.at(0))
    return _with(rest, rows, op.shape, -1)


def _conv(
    op: Op,
    x: Labelled,
    weight: Labelled,
    bias: Labelled | None,
    groups: int,
    transposed: bool,
    spatial: int,
) -> Fields:
    dim = x.ndim - spatial - 1
    outs, ins = (weight.at(1), weight.at(0)) if transposed else (weight.at(0), weight.at(1))
    for k in range(2, weight.ndim):
        op.freeze(weight.at(k), "kernel size")
    rest = tuple(f for f in op.keep(x, range(dim + 1, x.ndim)) if dim not in f.dims)
    whole = x.at(dim)
    if whole is not None and len(whole.dims) > 1 and groups == x.shape[dim] == op.shape[dim] and not transposed:
        op.freeze(ins, "one per group")
        vectors = (outs, None if bias is None else bias.at(0))
        op.per_position(x, dim, *(v for v in vectors if v is not None))
        return (*rest, whole)
    read, _ = op.axis(x, dim)
    if groups == 1:
        op.consumes(ins)
        op.tie(read, ins)
        op.produces(outs)
    elif read is not None and read.ids.size == groups:
        outs = _depthwise_conv(op, read, outs, ins, op.shape[dim] // groups, transposed)
    elif read is None or outs is None:
        for f in (read, outs, ins):
            op.freeze(f, f"{op.name} has groups of an axis that holds no channels")
        outs = None
    else:
        outs = _grouped_conv(op, read, outs, ins, groups, transposed)
    if bias is not None:
        op.produces(bias.at(0))
        op.tie(outs, bias.at(0))
    return _with(rest, outs, op.shape, dim)


def _depthwise_conv(
    op: Op, read: Field, outs: Field | None, ins: Field | None, multiplier: int, transposed: bool
) -> Field | None:
    """With one input channel per group, a group is a channel."""
    repeated = Field(read.dims, np.repeat(read.ids, multiplier), read.key)
    if transposed:
        op.freeze(outs, "one per group")
        op.per_channel(ins)
        op.tie(read, ins)
        return repeated if ins is not None else None
    op.freeze(ins, "one per group")
    op.per_channel(outs)
    op.tie(outs, repeated)
    return outs


def _grouped_conv(op: Op, read: Field, outs: Field, ins: Field | None, groups: int, transposed: bool) -> Field:
    """Channels are chosen alike in every group."""
    channels = read.ids.reshape(groups, -1)
    if transposed:
        written = Field(outs.dims, np.tile(outs.ids, groups), outs.key)
        op.rows(written.ids.reshape(groups, -1))
    else:
        written = outs
        op.together(outs.ids.reshape(groups, -1))
    op.produces(outs)
    op.consumes(ins)
    op.together(channels)
    op.tie(read if transposed else Field((0,), channels[0], read.key), ins)
    return written


def _per_channel(op: Op, x: Labelled, dim: int, *vectors: Labelled | None) -> None:
    """Vectors with one entry per channel of ``x``'s ``dim``."""
    for vector in vectors:
        if vector is not None:
            op.per_position(x, dim, *vector.fields)


def _with(fields: Fields, f: Field | None, shape: tuple[int, ...], dim: int) -> Fields:
    return fields if f is None else (*fields, Field((dim % len(shape),), f.ids, f.key))


_WEIGHT_AND_BIAS = ("weight", "bias")


@oprule(nn.Linear, rewrite=rewrites.linear, linear="writes", zeros=_WEIGHT_AND_BIAS)
def _linear_module(op: Op, input: Labelled) -> Fields:
    weight = op.param("weight")
    assert weight is not None
    return _linear(op, input, weight.at(0), weight.at(1), op.param("bias"))


@oprule(F.linear, linear="writes", zeros=_WEIGHT_AND_BIAS)
def _linear_function(op: Op, input: Labelled, weight: Labelled, bias: Labelled | None = None) -> Fields:
    return _linear(op, input, weight.at(0), weight.at(1), bias)


@oprule(nn.Conv1d, nn.Conv2d, nn.Conv3d, rewrite=rewrites.conv, linear="writes", zeros=_WEIGHT_AND_BIAS)
def _conv_module(op: Op, input: Labelled) -> Fields:
    depthwise = op.module.groups > 1 and op.module.groups == op.module.in_channels
    weight = op.param("weight", dims=1 if depthwise else 2)
    assert weight is not None
    return _conv(op, input, weight, op.param("bias"), op.module.groups, False, weight.ndim - 2)


@oprule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, rewrite=rewrites.conv_transpose,
        linear="writes", zeros=_WEIGHT_AND_BIAS)  # fmt: skip
def _conv_transpose_module(op: Op, input: Labelled, output_size: Any = None) -> Fields:
    depthwise = op.module.groups > 1 and op.module.groups == op.module.in_channels
    weight = op.param("weight", dims=1 if depthwise else 2)
    assert weight is not None
    return _conv(op, input, weight, op.param("bias"), op.module.groups, True, weight.ndim - 2)


@oprule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, rewrite=rewrites.conv_function,
        linear="writes", zeros=_WEIGHT_AND_BIAS)  # fmt: skip
def _conv_function(
    op: Op,
    input: Labelled,
    weight: Labelled,
    bias: Labelled | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Fields:
    return _conv(op, input, weight, bias, groups, False, weight.ndim - 2)


@oprule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, rewrite=rewrites.conv_transpose_function,
        linear="writes", zeros=_WEIGHT_AND_BIAS)  # fmt: skip
def _conv_transpose_function(
    op: Op,
    input: Labelled,
    weight: Labelled,
    bias: Labelled | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Fields:
    return _conv(op, input, weight, bias, groups, True, weight.ndim - 2)


@oprule(nn.Embedding, rewrite=rewrites.embedding, linear="writes")
def _embedding_module(op: Op, input: Labelled) -> Fields:
    weight = op.param("weight")
    assert weight is not None
    if op.module.max_norm is not None:
        op.freeze(weight.at(1), f"{op.name} limits its length")
    op.freeze(weight.at(0), "vocabulary")
    op.produces(weight.at(1))
    return _with(op.keep(input, range(input.ndim)), weight.at(1), op.shape, -1)


_RESCALES = "rescales the rows that it reads"


def _looked_up(op: Op, weight: Labelled, *read: Labelled | None) -> Fields:
    """Rows of ``weight``, as ``read`` picks, counts or weighs them."""
    op.freeze(weight.at(0), "vocabulary")
    for x in read:
        if x is not None:
            op.lose(list(x.fields), f"{op.name} reads positions from it")
    written = weight.at(1)
    op.produces(written)
    return () if written is None else (Field((len(op.shape) - 1,), written.ids, written.key),)


@oprule(F.embedding, linear="writes")
def _embedding_function(
    op: Op, input: Labelled, weight: Labelled, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **named: Any
) -> Fields:
    if max_norm is not None:
        return op.unknown(input, weight, why=_RESCALES)
    return _looked_up(op, weight, input)


@oprule(torch.embedding, linear="writes")
def _embedding_kernel(op: Op, weight: Labelled, indices: Labelled, *rest: Any, **named: Any) -> Fields:
    return _looked_up(op, weight, indices)


@oprule(nn.EmbeddingBag, rewrite=rewrites.embedding)
def _embedding_bag(
    op: Op, input: Labelled, offsets: Labelled | None = None, per_sample_weights: Labelled | None = None
) -> Fields:
    """Sums, means or maxima of rows, each channel on its own."""
    weight = op.param("weight")
    assert weight is not None
    if op.module.max_norm is not None:
        return op.unknown(input, why=_RESCALES)
    return _looked_up(op, weight, input, offsets, per_sample_weights)


@oprule(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def _recurrent(op: Op, *args: Any, **named: Any) -> Any:
    return op.unknown(*args, why="is a recurrent layer, which is left alone", **named)
