"""Rows of the rule table for normalisations.

The statistics of those over channels do not change when every channel has the same number of copies, so these rules
record what is mixed (`surgery.Op.mixes`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from surgery.axes.labels import Field, Fields, Labelled
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule
from surgery.layers.norms import (
    RestrictedNorm,
    batch_norm_over,
    group_norm_over,
    layer_norm_over,
    rms_norm_over,
    scaled_normalize,
)
from surgery.rules.conv_and_linear import WEIGHT_AND_BIAS, per_channel

# ---------------------------------------------------------------------------------------------------------------------
# Over the last axes


def _resize_layer_norm(edit: NodeEdit) -> None:
    """``normalized_shape`` of a layer or function."""
    shape = edit.unpacked(edit.argument("normalized_shape", ()))
    first = len(edit.shapes[0]) - len(shape)
    if edit.module is not None:
        edit.module.normalized_shape = tuple(edit.shapes[0][first:])
    elif edit.changed:
        edit.set_argument("normalized_shape", edit.resized(shape, first))


@oprule(nn.LayerNorm, F.layer_norm, torch.layer_norm, rewrite=_resize_layer_norm, zeros=WEIGHT_AND_BIAS,
        kind="layer norm", over=layer_norm_over)  # fmt: skip
def _layer_norm(
    op: Op,
    input: Labelled,
    normalized_shape: Any = (),
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Fields:
    rank = len(op.setting("normalized_shape", normalized_shape))
    return _last_axes(op, input, rank, op.param("weight", weight, dims=rank), op.param("bias", bias, dims=rank))


@oprule(nn.RMSNorm, F.rms_norm, torch.rms_norm, rewrite=_resize_layer_norm, zeros=("weight",), kind="rms norm",
        over=rms_norm_over)  # fmt: skip
def _rms_norm(
    op: Op, input: Labelled, normalized_shape: Any = (), weight: Labelled | None = None, eps: float | None = None
) -> Fields:
    """A LayerNorm without a mean."""
    rank = len(op.setting("normalized_shape", normalized_shape))
    return _last_axes(op, input, rank, op.param("weight", weight, dims=rank))


def _last_axes(op: Op, x: Labelled, rank: int, *vectors: Labelled | None) -> Fields:
    """Statistics over the last ``rank`` axes, whose channels are mixed."""
    first = x.ndim - rank
    fields = []
    for f in x.fields:
        inside = [d for d in f.dims if d >= first]
        if inside and len(f.dims) > 1:
            f = op.across(f, [d for d in f.dims if d != inside[-1]] if len(inside) == len(f.dims) else inside)
        if f.dims[0] >= first:
            op.mixes(f, first, x.ndim - 1)
        fields.append(f)
    own: dict[int, Field] = {}
    for vector in vectors:
        for g in () if vector is None else vector.fields:
            dim = g.dims[0] + first
            same = next((f for f in fields if f.dims == (dim,)), own.get(dim))
            op.per_channel(g)
            if same is not None:
                op.tie(same, g)
            else:
                shared = any(dim in f.dims for f in x.fields)
                how = "shares it among heads, or other parts of an axis" if shared else "has positions in it"
                op.freeze(g, f"{op.name} {how}")
                own[dim] = g
        bare = set() if vector is None else {d for d in range(vector.ndim) if vector.at(d) is None}
        for dim in bare:
            for f in fields:
                if first + dim in f.dims:
                    op.freeze(f, f"{op.name} relates it to an axis that holds no channels")
    return tuple(fields)


# ---------------------------------------------------------------------------------------------------------------------
# Over groups of channels, and over channels as a vector


def _resize_group_norm(edit: NodeEdit) -> None:
    """The number of groups follows where each has one channel."""
    read = edit.tensor("input")
    channels = edit.argument("num_channels", read[0][1] if read is not None else None)
    if edit.argument("num_groups") == channels:
        edit.set_argument("num_groups", edit.shapes[0][1])
    if edit.module is not None:
        edit.module.num_channels = edit.shapes[0][1]


@oprule(nn.GroupNorm, F.group_norm, torch.group_norm, rewrite=_resize_group_norm, zeros=WEIGHT_AND_BIAS,
        kind="group norm", over=group_norm_over)  # fmt: skip
def _group_norm(
    op: Op,
    input: Labelled,
    num_groups: int = 1,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Fields:
    """Channels are chosen alike in every group; a group of one channel is a channel."""
    f, _ = op.axis(input, 1)
    along = op.keep(input, range(2, input.ndim), f"{op.name} computes statistics over it")
    others = tuple(g for g in along if 1 not in g.dims)
    for vector in (op.param("weight", weight), op.param("bias", bias)):
        for g in () if vector is None else vector.fields or (None,):
            op.per_channel(g)
            op.tie(f, g)
    if f is None:
        return others
    channels = np.asarray(f.ids.reshape(op.setting("num_groups", num_groups), -1))
    if channels.shape[1] > 1:
        op.together(channels)
        op.mixes(f, 1, 1)
    return (*others, f)


@oprule(RestrictedNorm, layer_norm_over, group_norm_over, rms_norm_over, batch_norm_over, kind="restricted norm")
def _restricted_norm(op: Op, *args: Any, **named: Any) -> Any:
    return op.unknown(*args, *named.values(), why="leaves channels that are switched off out of its statistics")


def _scale_normalize(edit: NodeEdit) -> None:
    """``F.normalize`` over channels with copies gives the old values, times the length that copies add."""
    p, dim = edit.argument("p", 2.0), edit.argument("dim", 1)
    copies = edit.copies.get(dim % len(edit.shapes[0]), 1)
    if copies == 1:
        return
    scale = edit.argument("scale", 1.0) * (1.0 if math.isinf(p) else copies ** (1 / p))
    given = {"p": p, "dim": dim, "eps": edit.argument("eps", 1e-12), "scale": scale}
    edit.node.args, edit.node.kwargs = (edit.argument("input"),), given
    edit.node.target = scaled_normalize


@oprule(F.normalize, scaled_normalize, rewrite=_scale_normalize)
def _normalize(
    op: Op, input: Labelled, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None, *, scale: float = 1.0
) -> Fields:
    """Divided by a length, to which copies add, all in equal numbers."""
    f = input.at(dim)
    if f is None or len(f.dims) > 1:
        return input.fields if f is None else op.keep(input, [dim])
    op.measures(f)
    return input.fields


# ---------------------------------------------------------------------------------------------------------------------
# Each channel on its own


_STATISTICS = ("running_mean", "running_var")


def _resize_batch_norm(edit: NodeEdit) -> None:
    if edit.module is not None:
        edit.module.num_features = edit.shapes[0][1]


@oprule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, F.batch_norm, rewrite=_resize_batch_norm,
        zeros=WEIGHT_AND_BIAS, kind="batch norm", tensors=_STATISTICS, python="always",
        over=batch_norm_over)  # fmt: skip
def _batch_norm(
    op: Op,
    input: Labelled,
    running_mean: Labelled | None = None,
    running_var: Labelled | None = None,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Fields:
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    per_channel(op, input, 1, *(op.param(name, given) for name, given in vectors.items()))
    others = [d for d in range(input.ndim) if d != 1]
    if op.module is None and running_mean is None and running_var is None and op.in_graph:
        averaged = tuple(f for f in input.fields if 1 not in f.dims)
        for f in averaged:
            op.averages(input, f, others)
        return (*op.keep(Labelled(input.value, tuple(f for f in input.fields if 1 in f.dims)), others), *averaged)
    return op.keep(input, [d for d in range(input.ndim) if d != 1], f"{op.name} computes statistics over it")


@oprule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, rewrite=_resize_batch_norm, zeros=WEIGHT_AND_BIAS,
        kind="instance norm", tensors=_STATISTICS)  # fmt: skip
def _instance_norm(op: Op, input: Labelled) -> Fields:
    dim = input.ndim - 1 - int(op.module._get_no_batch_dim() - 1)
    return _batch_norm(op, input) if dim == 1 else op.unknown(input, why="has no batch")


@oprule(FrozenBatchNorm2d, linear="affine", zeros=("bias", "running_mean"), kind="fixed norm", tensors=_STATISTICS)
def _frozen_batch_norm(op: Op, x: Labelled) -> Fields:
    """A factor and a term for each channel, made of statistics that no mode changes."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = op.param(name)
        assert vector is not None
        op.per_channel(vector.at(0))
        op.tie(op.axis(x, 1)[0], vector.at(0))
    return x.fields
