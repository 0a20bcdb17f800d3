"""Rows of the rule table for normalisations over channels.

Their statistics do not change when every channel has the same number of copies, so these rules record what is mixed
(`surgery.axes.ledger.Findings.mixed`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from surgery.axes.labels import Field, Fields, Labelled
from surgery.axes.ops import Op
from surgery.graph.table import oprule, unknown
from surgery.layers.norms import KeptGroupNorm, KeptLayerNorm, group_norm_over, layer_norm_over, scaled_normalize
from surgery.rules import rewrites
from surgery.rules.weights import _WEIGHT_AND_BIAS, _per_channel


@oprule(nn.LayerNorm, rewrite=rewrites.layer_norm, zeros=("weight", "bias"))
def _layer_norm_module(op: Op, input: Labelled) -> Fields:
    rank = len(op.module.normalized_shape)
    return _layer_norm(op, input, rank, op.param("weight", rank), op.param("bias", rank))


@oprule(F.layer_norm, rewrite=rewrites.layer_norm_function, zeros=("weight", "bias"))
def _layer_norm_function(
    op: Op,
    input: Labelled,
    normalized_shape: Any,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    eps: float = 0.0,
) -> Fields:
    return _layer_norm(op, input, len(normalized_shape), weight, bias)


def _layer_norm(op: Op, x: Labelled, rank: int, *vectors: Labelled | None) -> Fields:
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
    return tuple(fields)


@oprule(nn.GroupNorm, rewrite=rewrites.group_norm, zeros=("weight", "bias"))
def _group_norm_module(op: Op, input: Labelled) -> Fields:
    return _group_norm(op, input, op.module.num_groups, op.param("weight"), op.param("bias"))


@oprule(F.group_norm, torch.group_norm, rewrite=rewrites.group_norm_function, zeros=("weight", "bias"))
def _group_norm_function(
    op: Op,
    input: Labelled,
    num_groups: int,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    *rest: Any,
    **named: Any,
) -> Fields:
    return _group_norm(op, input, num_groups, weight, bias)


def _group_norm(op: Op, x: Labelled, groups: int, *vectors: Labelled | None) -> Fields:
    """Statistics over each group of channels. Channels are chosen alike in every group; a group of one channel is a
    channel."""
    f, _ = op.axis(x, 1)
    rest = tuple(g for g in op.keep(x, range(2, x.ndim), f"{op.name} computes statistics over it") if 1 not in g.dims)
    for vector in vectors:
        for g in () if vector is None else vector.fields:
            op.per_channel(g)
            op.tie(f, g)
    if f is None:
        return rest
    channels = np.asarray(f.ids.reshape(groups, -1))
    if channels.shape[1] > 1:
        op.together(channels)
        op.mixes(f, 1, 1)
    return (*rest, f)


@oprule(KeptLayerNorm, KeptGroupNorm, layer_norm_over, group_norm_over)
def _norm_over_part(op: Op, *args: Any, **named: Any) -> Any:
    return unknown(op, *args, why="leaves channels that are switched off out of its statistics", **named)


@oprule(F.normalize, scaled_normalize, rewrite=rewrites.normalize)
def _normalize(
    op: Op, input: Labelled, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None, *, scale: float = 1.0
) -> Fields:
    """Divided by a length, to which copies add, all in equal numbers."""
    f = input.at(dim)
    if f is None or len(f.dims) > 1:
        return input.fields if f is None else op.keep(input, [dim])
    op.run.findings.sums.append(((op.key[1], op.key[2]), f.ids.ravel()))
    op.run.findings.mixed.append((f.ids.ravel(), op.name))
    return input.fields


@oprule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, rewrite=rewrites.batch_norm,
        zeros=_WEIGHT_AND_BIAS)  # fmt: skip
def _batch_norm_module(op: Op, input: Labelled) -> Fields:
    return _normalised(op, input, *map(op.param, ("weight", "bias", "running_mean", "running_var")))


@oprule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, rewrite=rewrites.batch_norm, zeros=_WEIGHT_AND_BIAS)
def _instance_norm_module(op: Op, input: Labelled) -> Fields:
    dim = input.ndim - 1 - int(op.module._get_no_batch_dim() - 1)
    if dim != 1:
        return unknown(op, input, why="has no batch")  # type: ignore[no-any-return]
    return _batch_norm_module(op, input)


@oprule(F.batch_norm, zeros=_WEIGHT_AND_BIAS)
def _batch_norm_function(
    op: Op,
    input: Labelled,
    running_mean: Labelled | None,
    running_var: Labelled | None,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    *rest: Any,
    **named: Any,
) -> Fields:
    return _normalised(op, input, running_mean, running_var, weight, bias)


def _normalised(op: Op, input: Labelled, *vectors: Labelled | None) -> Fields:
    """Statistics for each channel, over every other axis."""
    _per_channel(op, input, 1, *vectors)
    return op.keep(input, [d for d in range(input.ndim) if d != 1], f"{op.name} computes statistics over it")
