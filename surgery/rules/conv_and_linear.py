"""Rows of the rule table for layers of weights: linear, convolution, embedding, PReLU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from surgery.axes.labels import Field, Fields, Labelled, Shape
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule

WEIGHT_AND_BIAS = ("weight", "bias")


def _resize_linear(edit: NodeEdit) -> None:
    if edit.module is not None:
        edit.module.out_features, edit.module.in_features = edit.module.weight.shape


def linear_macs(out: Shape, *, weight: Shape, **given: Any) -> int:
    """Each weight once for each position of the output; those of a convolution too."""
    return math.prod(out) * math.prod(weight[1:])


@oprule(nn.Linear, F.linear, rewrite=_resize_linear, linear="writes", contracts="linear", zeros=WEIGHT_AND_BIAS,
        python="always", macs=linear_macs)  # fmt: skip
def _linear(op: Op, input: Labelled, weight: Labelled | None = None, bias: Labelled | None = None) -> Fields:
    """Rows of the weight are written, its columns are contracted with the last axis of the input."""
    weight, bias = op.param("weight", weight), op.param("bias", bias)
    assert weight is not None
    rows, columns = weight.at(0), weight.at(1)
    read, rest = op.axis(input, -1)
    op.consumes(columns)
    op.tie(read, columns)
    op.produces(rows)
    if bias is not None:
        op.produces(bias.at(0))
        op.tie(rows, bias.at(0))
    return add_field(rest, rows, op.shape, -1)


def resize_conv(edit: NodeEdit) -> None:
    """The sizes of a layer; ``groups`` where each group has one input channel."""
    if edit.module is not None:
        layer = edit.module
        outs, per_group = layer.weight.shape[:2]
        if layer.groups > 1 and layer.in_channels == layer.groups:
            layer.groups = outs // (layer.out_channels // layer.groups)
        layer.out_channels, layer.in_channels = outs, per_group * layer.groups
    elif (weight := edit.tensor("weight")) is not None and weight[1][1] == 1:
        _follow_input(edit, weight[1])


def _resize_conv_transpose(edit: NodeEdit) -> None:
    if edit.module is not None:
        layer = edit.module
        ins, per_group = layer.weight.shape[:2]
        if layer.groups > 1 and layer.in_channels == layer.groups:
            layer.groups = ins
        layer.in_channels, layer.out_channels = ins, per_group * layer.groups
    elif (weight := edit.tensor("weight")) is not None and weight[0][0] == edit.argument("groups", 1):
        _follow_input(edit, weight[1])


def _follow_input(edit: NodeEdit, weight: tuple[int, ...]) -> None:
    """As many groups as the input has channels."""
    groups, read = edit.argument("groups", 1), edit.tensor("input")
    if isinstance(groups, int) and groups > 1 and read is not None:
        edit.set_argument("groups", read[1][1 - len(weight)])


def _ungrouped(given: Mapping[str, Any]) -> bool:
    return bool(given.get("groups", 1) == 1)


@oprule(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d, rewrite=resize_conv, linear="writes",
        contracts="convolution", zeros=WEIGHT_AND_BIAS, python=_ungrouped, macs=linear_macs)  # fmt: skip
def _conv(
    op: Op,
    input: Labelled,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Fields:
    stride, padding = op.setting("stride", stride), op.setting("padding", padding)
    return convolve(op, input, weight, bias, groups, False, stride, padding)


@oprule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, rewrite=_resize_conv_transpose, linear="writes",
        contracts="transposed convolution", zeros=WEIGHT_AND_BIAS, python=_ungrouped,
        macs=lambda out, *, input, weight, **given: math.prod(input) * math.prod(weight[1:]))  # fmt: skip
def _conv_transpose(
    op: Op,
    input: Labelled,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    output_size: Any = None,
) -> Fields:
    still = op.setting("padding", padding), op.setting("output_padding", output_padding)
    return convolve(op, input, weight, bias, groups, True, op.setting("stride", stride), *still)


def convolve(
    op: Op,
    x: Labelled,
    weight: Labelled | None,
    bias: Labelled | None,
    groups: int,
    transposed: bool,
    stride: Any,
    *padding: Any,
    mixed: bool = False,
) -> Fields:
    """Output fields of a convolution. With ``mixed`` it reads any position for any other."""
    groups = op.setting("groups", groups)
    if op.module is None:
        assert weight is not None
        spatial = weight.ndim - 2
    else:
        spatial = len(op.module.kernel_size)
    dim = x.ndim - spatial - 1
    depthwise = 1 < groups == x.shape[dim]
    weight, bias = op.param("weight", weight, dims=1 if depthwise else 2), op.param("bias", bias)
    assert weight is not None
    outs, ins = (weight.at(1), weight.at(0)) if transposed else (weight.at(0), weight.at(1))
    for k in range(2, weight.ndim):
        op.freeze(weight.at(k), "kernel size")
    moving = range(spatial) if mixed else _mixed_positions(weight.shape[2:], stride, padding)
    rest = tuple(f for f in op.keep(x, [dim + 1 + k for k in moving]) if dim not in f.dims)
    rest = tuple(f for f in rest if min(f.dims) < dim or not op.stays(f))
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
    return add_field(rest, outs, op.shape, dim)


def _mixed_positions(kernel: tuple[int, ...], stride: Any, padding: tuple[Any, ...]) -> list[int]:
    """The spatial axes along which a convolution does more than to treat each position alike."""

    def along(setting: Any, k: int) -> Any:
        return setting[k] if isinstance(setting, (tuple, list)) and len(setting) > 1 else setting

    plain = (0, (0,), [0], "same", "valid")
    return [
        k
        for k, size in enumerate(kernel)
        if size > 1 or along(stride, k) not in (1, (1,), [1]) or any(along(p, k) not in plain for p in padding)
    ]


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


def per_channel(op: Op, x: Labelled, dim: int, *vectors: Labelled | None) -> None:
    """Vectors with one entry per channel of ``x``'s ``dim``. The entries of some hold no channels, as those of
    ``torch.ones(x.shape[1])``: then ``dim`` stays."""
    for vector in vectors:
        if vector is not None:
            op.per_position(x, dim, *(vector.fields or (None,)))


def add_field(fields: Fields, f: Field | None, shape: tuple[int, ...], dim: int) -> Fields:
    return fields if f is None else (*fields, Field((dim % len(shape),), f.ids, f.key))


def _resize_embedding(edit: NodeEdit) -> None:
    if edit.module is not None:
        edit.module.embedding_dim = edit.module.weight.shape[1]


@oprule(nn.Embedding, F.embedding, rewrite=_resize_embedding, linear="writes", python="always")
def _embedding(
    op: Op,
    input: Labelled,
    weight: Labelled | None = None,
    padding_idx: Any = None,
    max_norm: Any = None,
    *rest: Any,
    **named: Any,
) -> Fields:
    weight = op.param("weight", weight)
    assert weight is not None
    if op.setting("max_norm", max_norm) is not None:
        if op.module is None:
            return op.unknown(input, weight, why=_RESCALES)
        op.freeze(weight.at(1), f"{op.name} limits its length")
    return _looked_up(op, weight, input)


@oprule(torch.embedding, linear="writes")
def _embedding_kernel(op: Op, weight: Labelled, indices: Labelled, *rest: Any, **named: Any) -> Fields:
    return _looked_up(op, weight, indices)


@oprule(nn.EmbeddingBag, rewrite=_resize_embedding)
def _embedding_bag(
    op: Op, input: Labelled, offsets: Labelled | None = None, per_sample_weights: Labelled | None = None
) -> Fields:
    """Sums, means or maxima of rows, each channel on its own."""
    weight = op.param("weight")
    assert weight is not None
    if op.module.max_norm is not None:
        return op.unknown(input, why=_RESCALES)
    return _looked_up(op, weight, input, offsets, per_sample_weights)


_RESCALES = "rescales the rows that it reads"


def _looked_up(op: Op, weight: Labelled, *read: Labelled | None) -> Fields:
    """Rows of ``weight``, as ``read`` picks, counts or weighs them."""
    op.freeze(weight.at(0), "vocabulary")
    for x in read:
        if x is not None:
            op.lose(x.fields, f"{op.name} reads positions from it")
    op.produces(weight.at(1))
    return add_field((), weight.at(1), op.shape, -1)


def _resize_prelu(edit: NodeEdit) -> None:
    if edit.module is not None:
        edit.module.num_parameters = edit.module.weight.shape[0]


@oprule(nn.PReLU, F.prelu, torch.prelu, rewrite=_resize_prelu, python="always", kind="learned activation")
def _prelu(op: Op, input: Labelled, weight: Labelled | None = None) -> Fields:
    weight = weight if op.module is None else op.param("weight")
    if weight is not None and weight.value.numel() > 1:
        per_channel(op, input, 1, weight)
    return op.elementwise(input)
