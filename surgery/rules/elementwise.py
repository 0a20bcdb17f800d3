"""The rule table: one row for each op.

Each row says how the axes of the op's tensors relate and, with ``rewrite``, how its constants or its layer's attributes
follow an edit. `surgery.axes.ops` explains the words. Add a row for an op of your own with the same decorator::

    @surgery.oprule(my_package.scale_shift)
    def _scale_shift(op, x, scale, shift):
        return op.elementwise(x, scale, shift)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from surgery.axes.labels import Field, Fields, Labelled, moved
from surgery.axes.ops import Op
from surgery.graph.table import oprule
from surgery.rules import rewrites
from surgery.rules.weights import _per_channel

# ---------------------------------------------------------------------------------------------------------------------
# Layers with weights


@oprule(nn.PReLU, rewrite=rewrites.prelu)
def _prelu_module(op: Op, input: Labelled) -> Fields:
    weight = op.param("weight")
    if weight is not None and weight.shape[0] > 1:
        _per_channel(op, input, 1, weight)
    return op.elementwise(input)


@oprule(F.prelu, torch.prelu)
def _prelu_function(op: Op, input: Labelled, weight: Labelled) -> Fields:
    _per_channel(op, input, 1, weight)
    return op.elementwise(input)


# ---------------------------------------------------------------------------------------------------------------------
# Position by position


def _named(namespace: Any, names: str) -> list[Any]:
    return [getattr(namespace, name) for name in names.split()]


_ELEMENTWISE_FUNCTIONS: list[Any] = [
    *_named(operator, "floordiv pow neg mod"),
    *_named(operator, "lt le gt ge eq ne and_ or_ invert"),
    *_named(torch, "pow neg abs exp log sqrt rsqrt square reciprocal sign sin cos erf"),
    *_named(torch, "relu sigmoid tanh clamp where maximum minimum lerp addcmul addcdiv"),
    *_named(torch, "logical_and logical_or logical_not isnan isfinite"),
    *_named(F, "relu relu6 elu celu selu leaky_relu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh"),
    *_named(F, "softplus softsign logsigmoid tanhshrink threshold"),
    *_named(F, "alpha_dropout feature_alpha_dropout"),
]
_ELEMENTWISE_METHODS = (
    *("pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "reciprocal", "sign"),
    *("relu", "sigmoid", "tanh", "clamp", "erf", "where", "maximum", "minimum", "masked_fill"),
    *("relu_", "sigmoid_", "tanh_", "clamp_", "masked_fill_"),
    *("lt", "le", "gt", "ge", "eq", "ne", "long", "int", "bool"),
)
_ELEMENTWISE_MODULES: list[type[nn.Module]] = [
    *_named(nn, "ReLU ReLU6 ELU CELU SELU LeakyReLU RReLU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh"),
    *_named(nn, "Softplus Softsign LogSigmoid Tanhshrink Threshold"),
    *_named(nn, "AlphaDropout FeatureAlphaDropout"),
]
_SUMS = (*_named(operator, "add sub iadd isub"), torch.add, torch.sub, "add", "sub", "add_", "sub_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")
_DROPOUTS: list[Any] = [
    *(getattr(nn, f"Dropout{n}") for n in ("", "1d", "2d", "3d")),
    *(getattr(F, f"dropout{n}") for n in ("", "1d", "2d", "3d")),
    *(torchvision.ops.StochasticDepth, torchvision.ops.stochastic_depth),
]
_CASTS = ("float", "double", "half", "bfloat16", "to", "type", "type_as", "cpu", "cuda", "requires_grad_")


@oprule(*_ELEMENTWISE_FUNCTIONS, *_ELEMENTWISE_METHODS, *_ELEMENTWISE_MODULES)
@oprule(*_SUMS, linear="sum")
@oprule(*_PRODUCTS, linear="product")
@oprule(*_QUOTIENTS, linear="quotient")
@oprule(*_DROPOUTS, *_CASTS, linear="first")
def _elementwise(op: Op, *operands: Any, **named: Any) -> Fields:
    return op.elementwise(*operands, *named.values())


# ---------------------------------------------------------------------------------------------------------------------
# Along spatial axes, reductions


@oprule(
    *(getattr(nn, f"{kind}Pool{n}d") for kind in ("Max", "AdaptiveMax") for n in (1, 2, 3)),
    *(getattr(F, f"{kind}_pool{n}d") for kind in ("max", "adaptive_max") for n in (1, 2, 3)),
    *(getattr(torch, f"max_pool{n}d") for n in (1, 2, 3)),
    within=True,
)
@oprule(
    *(getattr(nn, f"{kind}Pool{n}d") for kind in ("Avg", "AdaptiveAvg") for n in (1, 2, 3)),
    *(getattr(F, f"{kind}_pool{n}d") for kind in ("avg", "adaptive_avg") for n in (1, 2, 3)),
    *(torch.avg_pool1d, torch.adaptive_avg_pool1d),
    linear="first",
    within=True,
)
@oprule(
    *(getattr(nn, f"LPPool{n}d") for n in (1, 2)),
    *(getattr(nn, f"{kind}Pad{n}d") for kind in ("Zero", "Constant", "Reflection", "Replication") for n in (1, 2, 3)),
    *(getattr(F, f"lp_pool{n}d") for n in (1, 2)),
)
def _spatial(op: Op, input: Labelled, *rest: Any, **named: Any) -> Any:
    cls = next((c for c in type(op.module).__mro__ if c.__name__[-1:] == "d" and c.__name__[-2:-1].isdigit()), None)
    rank = int((cls.__name__ if cls else op.node.target.__name__)[-2])  # type: ignore[union-attr]
    return op.alike(op.keep(input, range(input.ndim - rank, input.ndim)))


@oprule(F.interpolate, F.grid_sample, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
def _resampled(op: Op, input: Labelled, *rest: Any, **named: Any) -> Fields:
    positions = [other for other in (*rest, *named.values()) if isinstance(other, Labelled)]
    for other in positions:
        op.lose(list(other.fields), f"{op.name} reads positions from it")
    return op.keep(input, [*([0] if positions else []), *range(2, input.ndim)])


@oprule(F.pad)
def _pad(op: Op, input: Labelled, pad: Any, *rest: Any, **named: Any) -> Fields:
    dims = [input.ndim - 1 - k // 2 for k in range(len(pad)) if pad[k] != 0]
    return op.keep(input, dims)


@oprule(torch.mean, "mean", torch.sum, "sum", linear="first")
@oprule(
    torch.amax, torch.amin, torch.var, torch.std, torch.any, torch.all, torch.prod,
    torch.max, torch.min, torch.logsumexp,
    "amax", "amin", "var", "std", "any", "all", "prod", "max", "min", "logsumexp",
)  # fmt: skip
def _reduce(op: Op, input: Labelled, *args: Any, **named: Any) -> Any:
    dim = named.get("dim", named.get("axis", args[0] if args else None))
    if isinstance(dim, Labelled):  # the larger of two
        return op.elementwise(input, dim)
    if dim is None or isinstance(dim, bool):
        dim = range(input.ndim)
    return op.alike(_reduced(op, input, [dim] if isinstance(dim, int) else list(dim)))


@oprule(torch.norm, "norm")
def _norm(op: Op, input: Labelled, p: Any = None, dim: Any = None, *rest: Any, **named: Any) -> Fields:
    return _reduced(op, input, range(input.ndim) if dim is None else [dim] if isinstance(dim, int) else list(dim))


def _reduced(op: Op, input: Labelled, dims: Any) -> Fields:
    gone = {d % max(input.ndim, 1) for d in dims}
    fields = op.keep(input, gone, f"{op.name} reduces it")
    if len(op.shape) == input.ndim:
        return fields
    place = {d: k for k, d in enumerate(d for d in range(input.ndim) if d not in gone)}
    return tuple(moved(f, tuple(place[d] for d in f.dims)) for f in fields)


@oprule(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.cumsum,
        "softmax", "log_softmax", "cumsum")  # fmt: skip
def _along(op: Op, input: Labelled, *args: Any, **named: Any) -> Fields:
    dim = named.get("dim", args[0] if args else None)
    return op.keep(input, range(input.ndim) if dim is None else [dim])


@oprule(nn.Softmax, nn.LogSoftmax)
def _along_module(op: Op, input: Labelled) -> Fields:
    return op.keep(input, range(input.ndim) if op.module.dim is None else [op.module.dim])


@oprule(F.glu, nn.GLU)
def _glu(op: Op, input: Labelled, dim: int | None = None) -> Fields:
    """The first half gated by the second: channels are chosen alike in both."""
    dim = op.module.dim if op.module is not None else -1 if dim is None else dim
    f, rest = op.axis(input, dim)
    if f is None:
        return rest
    halves = f.ids.reshape(2, -1)
    op.together(halves)
    return (*rest, Field(f.dims, halves[0], f.key))


@oprule(nn.LocalResponseNorm, F.local_response_norm)
def _local_response_norm(op: Op, input: Labelled, *rest: Any, **named: Any) -> Fields:
    op.freeze(input.at(1), f"{op.name} mixes neighbouring channels")
    return input.fields


# ---------------------------------------------------------------------------------------------------------------------
# Tensors made of nothing but a shape


@oprule(torch.zeros_like, torch.ones_like, torch.full_like)
def _constant_like(op: Op, input: Labelled, *args: Any, **named: Any) -> Fields:
    """The same number everywhere, whatever the channels."""
    return op.elementwise(input)


@oprule(torch.empty_like, torch.rand_like, torch.randn_like)
def _drawn_like(op: Op, input: Labelled, *args: Any, **named: Any) -> Fields:
    """A number of its own for each channel, which no edit of the others can follow."""
    op.lose(list(input.fields), f"{op.name} is as large")
    return ()


@oprule("new_zeros", "new_ones", "new_empty", "new_full")
def _fresh_tensor(op: Op, *args: Any, **named: Any) -> Fields:
    return ()
