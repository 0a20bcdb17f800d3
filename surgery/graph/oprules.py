"""The rule table: one row for each op.

Each row says how the axes of the op's tensors relate and, with ``rewrite``, how its constants or its layer's attributes
follow an edit. `surgery.graph.ops` explains the words. Add a row for an op of your own with the same decorator::

    @surgery.oprule(my_package.scale_shift)
    def _scale_shift(op, x, scale, shift):
        return op.elementwise(x, scale, shift)
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from surgery.graph import rewrites
from surgery.graph.labels import Field, Fields, Labelled, moved, permuted, reshaped, sliced
from surgery.graph.ops import Op, oprule, unknown

# ---------------------------------------------------------------------------------------------------------------------
# Layers with weights


def _linear(op: Op, x: Labelled, weight: Labelled, bias: Labelled | None = None) -> Fields:
    read, rows, columns = x.at(-1), weight.at(0), weight.at(1)
    if read is not None and len(read.dims) > 1:
        op.freeze(read, f"{op.name} contracts one factor of it")
        read = None
    op.consumes(columns)
    op.tie(read, columns)
    op.produces(rows)
    if bias is not None:
        op.produces(bias.at(0))
        op.tie(rows, bias.at(0))
    return _with(op.keep(x, [-1]) if read is None else _without(x.fields, read), rows, op.shape, -1)


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
    read = x.at(dim)
    for k in range(2, weight.ndim):
        op.freeze(weight.at(k), "kernel size")
    if read is None or outs is None or len(read.dims) > 1:
        for f in (read, outs, ins):
            op.freeze(f, f"{op.name} reads an axis that holds no channels")
        if outs is None:
            return ()
    elif groups == 1:
        op.consumes(ins)
        op.tie(read, ins)
        op.produces(outs)
    else:
        outs = _grouped_conv(op, read, outs, ins, groups, transposed)
    if bias is not None and outs is not None:
        op.produces(bias.at(0))
        op.tie(outs, bias.at(0))
    return _with(op.keep(x, range(dim, x.ndim)) if read is None else _batch_fields(x, dim), outs, op.shape, dim)


def _grouped_conv(op: Op, read: Field, outs: Field, ins: Field | None, groups: int, transposed: bool) -> Field:
    """Channels are chosen alike in every group; with one input channel per group, a group is a channel."""
    channels = read.ids.reshape(groups, -1)
    if channels.shape[1] == 1:
        op.freeze(outs if transposed else ins, "one per group")
        if transposed:
            op.per_channel(ins)
            op.tie(read, ins)
            return Field(outs.dims, np.repeat(read.ids, outs.ids.size), read.key)
        op.per_channel(outs)
        op.run.tie(outs, Field(outs.dims, np.repeat(read.ids, outs.ids.size // groups), read.key), op.name)
        return outs
    assert ins is not None
    op.together(channels)
    op.consumes(ins)
    op.produces(outs)
    if transposed:
        op.tie(read, ins)
        return Field(outs.dims, np.tile(outs.ids, groups), outs.key)
    op.run.tie(Field(ins.dims, channels[0], read.key), ins, op.name)
    op.together(outs.ids.reshape(groups, -1))
    return outs


def _per_channel(op: Op, x: Labelled, dim: int, *vectors: Labelled | None) -> None:
    """Vectors with one entry per channel of ``x``'s ``dim``."""
    for vector in vectors:
        if vector is not None:
            for f in vector.fields:
                op.per_channel(f)
                op.tie(x.at(dim), f)


def _without(fields: Fields, f: Field) -> Fields:
    return tuple(g for g in fields if g is not f)


def _batch_fields(x: Labelled, dim: int) -> Fields:
    return tuple(f for f in x.fields if max(f.dims) < dim)


def _with(fields: Fields, f: Field | None, shape: tuple[int, ...], dim: int) -> Fields:
    return fields if f is None else (*fields, Field((dim % len(shape),), f.ids, f.key))


@oprule(nn.Linear, rewrite=rewrites.linear)
def _linear_module(op: Op, input: Labelled) -> Fields:
    weight = op.param("weight")
    assert weight is not None
    return _linear(op, input, weight, op.param("bias"))


@oprule(F.linear)
def _linear_function(op: Op, input: Labelled, weight: Labelled, bias: Labelled | None = None) -> Fields:
    return _linear(op, input, weight, bias)


@oprule(nn.Conv1d, nn.Conv2d, nn.Conv3d, rewrite=rewrites.conv)
def _conv_module(op: Op, input: Labelled) -> Fields:
    depthwise = op.module.groups > 1 and op.module.groups == op.module.in_channels
    weight = op.param("weight", dims=1 if depthwise else 2)
    assert weight is not None
    return _conv(op, input, weight, op.param("bias"), op.module.groups, False, weight.ndim - 2)


@oprule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, rewrite=rewrites.conv_transpose)
def _conv_transpose_module(op: Op, input: Labelled, output_size: Any = None) -> Fields:
    weight = op.param("weight")
    assert weight is not None
    return _conv(op, input, weight, op.param("bias"), op.module.groups, True, weight.ndim - 2)


@oprule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d, rewrite=rewrites.conv_function)
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


@oprule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, rewrite=rewrites.batch_norm)
def _batch_norm_module(op: Op, input: Labelled) -> Fields:
    _per_channel(op, input, 1, *map(op.param, ("weight", "bias", "running_mean", "running_var")))
    return input.fields


@oprule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, rewrite=rewrites.batch_norm)
def _instance_norm_module(op: Op, input: Labelled) -> Fields:
    return _batch_norm_module(op, input)  # type: ignore[no-any-return]


@oprule(F.batch_norm)
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
    _per_channel(op, input, 1, running_mean, running_var, weight, bias)
    return input.fields


@oprule(nn.PReLU, rewrite=rewrites.prelu)
def _prelu_module(op: Op, input: Labelled) -> Fields:
    weight = op.param("weight")
    if weight is not None and weight.shape[0] > 1:
        _per_channel(op, input, 1, weight)
    return input.fields


@oprule(nn.Embedding, rewrite=rewrites.embedding)
def _embedding_module(op: Op, input: Labelled) -> Fields:
    weight = op.param("weight")
    assert weight is not None
    op.freeze(weight.at(0), "vocabulary")
    op.produces(weight.at(1))
    return _with(op.keep(input, range(input.ndim)), weight.at(1), op.shape, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Position by position


def _named(namespace: Any, names: str) -> list[Any]:
    return [getattr(namespace, name) for name in names.split()]


_ELEMENTWISE_FUNCTIONS: list[Any] = [
    *_named(operator, "add sub mul truediv floordiv pow neg mod iadd isub imul itruediv"),
    *_named(operator, "lt le gt ge eq ne and_ or_ invert"),
    *_named(torch, "add sub mul div true_divide pow neg abs exp log sqrt rsqrt square reciprocal sign sin cos erf"),
    *_named(torch, "relu sigmoid tanh clamp where maximum minimum lerp addcmul addcdiv"),
    *_named(torch, "logical_and logical_or logical_not isnan isfinite"),
    *_named(F, "relu relu6 elu celu selu leaky_relu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh"),
    *_named(F, "softplus softsign logsigmoid tanhshrink threshold"),
    *_named(F, "dropout alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout"),
    torchvision.ops.stochastic_depth,
]
_ELEMENTWISE_METHODS = (
    *("add", "sub", "mul", "div", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "sign"),
    *("relu", "sigmoid", "tanh", "clamp", "erf", "where", "maximum", "minimum", "masked_fill"),
    *("add_", "sub_", "mul_", "div_", "relu_", "sigmoid_", "tanh_", "clamp_", "masked_fill_"),
    *("lt", "le", "gt", "ge", "eq", "ne", "requires_grad_"),
    *("float", "double", "half", "bfloat16", "long", "int", "bool", "to", "type", "type_as", "cpu", "cuda"),
)
_ELEMENTWISE_MODULES: list[type[nn.Module]] = [
    *_named(nn, "ReLU ReLU6 ELU CELU SELU LeakyReLU RReLU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh"),
    *_named(nn, "Softplus Softsign LogSigmoid Tanhshrink Threshold"),
    *_named(nn, "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"),
    torchvision.ops.StochasticDepth,
]


@oprule(*_ELEMENTWISE_FUNCTIONS, *_ELEMENTWISE_METHODS, *_ELEMENTWISE_MODULES)
def _elementwise(op: Op, *operands: Any, **named: Any) -> Fields:
    return op.elementwise(*operands, *named.values())


# ---------------------------------------------------------------------------------------------------------------------
# Along spatial axes, reductions


@oprule(
    *(getattr(nn, f"{kind}Pool{n}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for n in (1, 2, 3)),
    *(getattr(nn, f"{kind}Pad{n}d") for kind in ("Zero", "Constant", "Reflection", "Replication") for n in (1, 2, 3)),
)
def _spatial_module(op: Op, input: Labelled) -> Fields:
    rank = int(type(op.module).__mro__[0].__name__[-2]) if type(op.module).__name__[-2].isdigit() else input.ndim - 2
    return op.keep(input, range(input.ndim - rank, input.ndim))


@oprule(
    *(getattr(F, f"{kind}_pool{n}d") for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(getattr(torch, f"adaptive_avg_pool{n}d") for n in (1,)),
    F.interpolate,
    F.grid_sample,
    nn.Upsample,
)
def _spatial_function(op: Op, input: Labelled, *rest: Any, **named: Any) -> Fields:
    return op.keep(input, range(2, input.ndim))


@oprule(F.pad)
def _pad(op: Op, input: Labelled, pad: Any, *rest: Any, **named: Any) -> Fields:
    dims = [input.ndim - 1 - k // 2 for k in range(len(pad)) if pad[k] != 0]
    return op.keep(input, dims)


@oprule(
    torch.mean, torch.sum, torch.amax, torch.amin, torch.var, torch.std, torch.norm, torch.any, torch.all, torch.prod,
    "mean", "sum", "amax", "amin", "var", "std", "norm", "any", "all", "prod",
)  # fmt: skip
def _reduce(op: Op, input: Labelled, dim: Any = None, keepdim: bool = False, **named: Any) -> Fields:
    dims = range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    gone = {d % max(input.ndim, 1) for d in dims}
    fields = op.keep(input, gone, f"{op.name} reduces it")
    if keepdim:
        return fields
    place = {d: k for k, d in enumerate(d for d in range(input.ndim) if d not in gone)}
    return tuple(moved(f, tuple(place[d] for d in f.dims)) for f in fields)


@oprule(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.cumsum, F.normalize,
        "softmax", "log_softmax", "cumsum")  # fmt: skip
def _along(op: Op, input: Labelled, *args: Any, **named: Any) -> Fields:
    dim = named.get("dim", args[0] if args and isinstance(args[0], int) else None)
    return op.keep(input, range(input.ndim) if dim is None else [dim])


@oprule(nn.Softmax, nn.LogSoftmax)
def _along_module(op: Op, input: Labelled) -> Fields:
    return op.keep(input, range(input.ndim) if op.module.dim is None else [op.module.dim])


@oprule(nn.LocalResponseNorm, F.local_response_norm)
def _local_response_norm(op: Op, input: Labelled, *rest: Any, **named: Any) -> Fields:
    op.freeze(input.at(1), f"{op.name} mixes neighbouring channels")
    return input.fields


# ---------------------------------------------------------------------------------------------------------------------
# Data movement


def _reshape(op: Op, x: Labelled) -> Fields:
    fields, lost = reshaped(x.fields, x.shape, op.shape)
    op.lose(lost, f"{op.name} merges it with another axis")
    return fields


@oprule("contiguous", "clone", "detach", torch.clone, torch.detach, nn.Identity, movement=True)
def _identity(op: Op, input: Labelled, **named: Any) -> Fields:
    return input.fields


@oprule(torch.flatten, "flatten", nn.Flatten, nn.Unflatten, torch.unflatten, "unflatten", torch.unsqueeze, "unsqueeze",
        torch.squeeze, "squeeze", movement=True)  # fmt: skip
def _flatten(op: Op, input: Labelled, *args: Any, **named: Any) -> Fields:
    return _reshape(op, input)


@oprule(torch.reshape, "reshape", "view", rewrite=rewrites.reshape, movement=True)
def _view(op: Op, input: Labelled, *shape: Any, **named: Any) -> Fields:
    if shape and isinstance(shape[0], torch.dtype):
        return unknown(op, input)  # type: ignore[no-any-return]
    return _reshape(op, input)


@oprule(torch.permute, "permute", movement=True)
def _permute(op: Op, input: Labelled, *dims: Any) -> Fields:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return permuted(input.fields, tuple(d % input.ndim for d in order))


@oprule(torchvision.ops.Permute, movement=True)
def _permute_module(op: Op, x: Labelled) -> Fields:
    return permuted(x.fields, tuple(d % x.ndim for d in op.module.dims))


@oprule(torch.transpose, "transpose", torch.swapaxes, "swapaxes", movement=True)
def _transpose(op: Op, input: Labelled, dim0: int, dim1: int) -> Fields:
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permuted(input.fields, tuple(order))


@oprule("t", "mT", movement=True)
def _t(op: Op, input: Labelled) -> Fields:
    return _transpose(op, input, -1, -2) if input.ndim > 1 else input.fields


@oprule(torch.cat, torch.concat, torch.concatenate, movement=True)
def _cat(op: Op, tensors: Any, dim: int = 0) -> Fields:
    rank = len(op.shape)
    dim %= rank
    fields: list[Field] = []
    along: list[Any] = []
    for t in tensors:
        for f in t.fields:
            if dim not in f.dims:
                op.meet(fields, f)
            elif len(f.dims) > 1:
                op.freeze(f, f"{op.name} joins one factor of it")
        f = t.at(dim)
        if f is None or len(f.dims) > 1:
            ids = op.run.fresh(t.shape[dim])
            op.run.freeze(ids, f"{op.name} takes it from an axis that holds no channels")
            f = Field((dim,), ids)
        along.append(f)
    if any(t.at(dim) is not None for t in tensors):
        for f in along:
            op.run.edge(f.key, op.key, op.name)
        fields.append(Field((dim,), np.concatenate([f.ids for f in along])))
    return tuple(fields)


@oprule(torch.stack, movement=True)
def _stack(op: Op, tensors: Any, dim: int = 0) -> Fields:
    rank = len(op.shape)
    dim %= rank
    shared = tensors[0].fields
    if any([f.dims for f in t.fields] != [f.dims for f in shared] for t in tensors):
        for t in tensors:
            op.lose(list(t.fields), f"{op.name} stacks it on an axis that holds no channels")
        return ()
    result = []
    for k, f in enumerate(shared):
        dims = tuple(d + (d >= dim) for d in f.dims)
        at = sum(d < dim for d in dims)
        ids = np.stack([t.fields[k].ids for t in tensors], axis=at)
        result.append(Field((*dims[:at], dim, *dims[at:]), ids, f.key))
    return tuple(result)


@oprule(torch.chunk, "chunk", torch.split, "split", torch.tensor_split, "tensor_split", rewrite=rewrites.pieces,
        movement=True)  # fmt: skip
def _pieces(op: Op, tensor: Labelled, how: Any = None, dim: int = 0, **named: Any) -> Any:
    dim %= tensor.ndim
    result = []
    start = 0
    for piece in op.out:
        stretch = slice(start, start + piece.shape[dim])
        index = tuple(stretch if d == dim else slice(None) for d in range(tensor.ndim))
        result.append(sliced(tensor.fields, index, tensor.ndim)[0])
        start = stretch.stop
        for f in result[-1]:
            op.cut(f)
    return result


@oprule(torch.unbind, "unbind", movement=True)
def _unbind(op: Op, input: Labelled, dim: int = 0) -> Any:
    result = []
    for k in range(input.shape[dim]):
        index = tuple(k if d == dim % input.ndim else slice(None) for d in range(input.ndim))
        fields, picked = sliced(input.fields, index, input.ndim)
        op.lose(picked, f"{op.name} picks positions of it")
        result.append(fields)
    return result


@oprule(operator.getitem, movement=True)
def _getitem(op: Op, input: Labelled, index: Any) -> Fields:
    index = index if isinstance(index, tuple) else (index,)
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in index):
        return unknown(op, input)  # type: ignore[no-any-return]
    fields, picked = sliced(input.fields, index, input.ndim)
    op.lose(picked, f"{op.name} picks positions of it")
    for f in fields:
        op.cut(f)
    return fields


@oprule(torch.index_select, "index_select", movement=True)
def _index_select(op: Op, input: Labelled, dim: int, index: Labelled) -> Fields:
    dim %= input.ndim
    f = input.at(dim)
    if f is None or index.constant is None or len(f.dims) > 1:
        return op.keep(input, [dim])
    for g in index.fields:
        op.freeze(g, "positions")
    return tuple(Field(g.dims, g.ids[index.constant.cpu().numpy()], g.key) if g is f else g for g in input.fields)


@oprule("expand", "expand_as", torch.broadcast_to, rewrite=rewrites.expand)
def _expand(op: Op, input: Labelled, *sizes: Any, **named: Any) -> Fields:
    return op.elementwise(input)


@oprule(nn.ChannelShuffle, F.channel_shuffle, movement=True)
def _channel_shuffle(op: Op, input: Labelled, groups: int | None = None) -> Fields:
    groups = groups or op.module.groups
    f = input.at(1)
    if f is None or len(f.dims) > 1:
        return op.keep(input, [1])
    shuffled = Field(f.dims, np.ascontiguousarray(f.ids.reshape(groups, -1).T).ravel(), f.key)
    return tuple(shuffled if g is f else g for g in input.fields)


# ---------------------------------------------------------------------------------------------------------------------
# Ops that return no channels


@oprule(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like,
        "new_zeros", "new_ones", "new_empty", "new_full")  # fmt: skip
def _fresh_tensor(op: Op, *args: Any, **named: Any) -> Fields:
    return ()
