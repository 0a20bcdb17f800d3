"""Rows of the rule table for ops position by position and along spatial axes.

Add a row for an op of your own with the same decorator::

    @surgery.oprule(my_package.scale_shift)
    def _scale_shift(op, x, scale, shift):
        return op.elementwise(x, scale, shift)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from surgery.axes.labels import Field, Fields, Labelled
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule


def _named(namespace: Any, names: str) -> list[Any]:
    return [getattr(namespace, name) for name in names.split()]


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def _activation(op: Op, input: Labelled, *settings: Any, **named: Any) -> Fields:
    return op.elementwise(input)


for _layer, _functions, _in_place, _kind, _bounds in (
    (nn.ReLU, (F.relu, torch.relu, "relu"), (F.relu_, torch.relu_, "relu_"), "idempotent", (0.0, math.inf)),
    (nn.ReLU6, (F.relu6,), (), "idempotent", (0.0, 6.0)),
    (nn.Sigmoid, (F.sigmoid, torch.sigmoid, "sigmoid"), (torch.sigmoid_, "sigmoid_"), "gate", (0.0, 1.0)),
    (nn.Hardsigmoid, (F.hardsigmoid,), (), "gate", (0.0, 1.0)),
    (nn.Tanh, (F.tanh, torch.tanh, "tanh"), (torch.tanh_, "tanh_"), "activation", (-1.0, 1.0)),
    (nn.Softsign, (F.softsign,), (), "activation", (-1.0, 1.0)),
    (nn.Softplus, (F.softplus,), (), "activation", (0.0, math.inf)),
    (nn.LogSigmoid, (F.logsigmoid,), (), "activation", (-math.inf, 0.0)),
    (nn.ELU, (F.elu,), (F.elu_,), "activation", False),
    (nn.CELU, (F.celu, torch.celu), (F.celu_, torch.celu_), "activation", False),
    (nn.SELU, (F.selu, torch.selu), (F.selu_, torch.selu_), "activation", False),
    (nn.LeakyReLU, (F.leaky_relu,), (F.leaky_relu_,), "activation", False),
    (nn.RReLU, (F.rrelu, torch.rrelu), (F.rrelu_, torch.rrelu_), "activation", False),
    (nn.GELU, (F.gelu,), (), "activation", False),
    (nn.SiLU, (F.silu,), (), "activation", False),
    (nn.Mish, (F.mish,), (), "activation", False),
    (nn.Hardswish, (F.hardswish,), (), "activation", False),
    (nn.Hardtanh, (F.hardtanh,), (F.hardtanh_,), "activation", False),
    (nn.Tanhshrink, (F.tanhshrink,), (), "activation", False),
    (nn.Softshrink, (F.softshrink,), (), "activation", False),
    (nn.Hardshrink, (F.hardshrink, torch.hardshrink, "hardshrink"), (), "activation", False),
    (nn.Threshold, (F.threshold, torch.threshold), (torch.threshold_,), "activation", False),
):
    oprule(_layer, *_functions, in_place=_in_place, kind=_kind, within=_bounds)(_activation)


# ---------------------------------------------------------------------------------------------------------------------
# Position by position


_UNARY = (
    "neg negative positive abs absolute exp exp2 expm1 log1p square sign sgn signbit ceil floor round trunc fix frac "
    "sin cos tan asin acos atan arcsin arccos arctan sinh cosh asinh atanh arcsinh arctanh sinc deg2rad rad2deg "
    "erf erfc erfinv i0 nan_to_num"
)
"""One operand, finite at 0 and with a finite derivative there; methods, and functions of torch."""
_ONE = f"{_UNARY} clamp clip clamp_min clamp_max"
_SEVERAL = "maximum minimum fmax fmin lerp addcmul copysign logaddexp logaddexp2 ldexp heaviside nextafter"
_COMPARED = "lt le gt ge eq ne less less_equal greater greater_equal not_equal"
_NOT_AT_ZERO = "pow float_power log log2 log10 sqrt rsqrt reciprocal digamma lgamma hypot"
"""The first operand must not be 0."""
_BY = "fmod remainder floor_divide atan2 arctan2 xlogy"
"""The second operand must not be 0."""
_SPECIAL = (
    "bessel_j0 bessel_j1 erf erfc erfcx erfinv exp2 expit expm1 i0 i0e i1 i1e log1p log_ndtr ndtr round sinc airy_ai"
)
_SPECIAL_NOT_AT_ZERO = "digamma entr gammaln psi"
_IN_PLACE = (
    f"{_UNARY} clamp clip clamp_min clamp_max masked_fill lerp addcmul copysign ldexp heaviside nextafter {_COMPARED}"
)


def _of_tensors(names: str, behind: str = "") -> list[str]:
    """The names that tensors have methods of, with ``behind`` them."""
    return [name + behind for name in names.split() if hasattr(torch.Tensor, name + behind)]


def _of_torch(names: str, behind: str = "") -> list[Any]:
    return [getattr(torch, name + behind) for name in names.split() if hasattr(torch, name + behind)]


_ELEMENTWISE: list[Any] = [
    *(operator.neg, operator.pos, operator.abs, *_named(operator, "lt le gt ge eq ne")),
    *_of_torch(f"{_ONE} {_SEVERAL} {_COMPARED} where"),
    *_named(torch.special, _SPECIAL),
    *(nn.AlphaDropout, F.alpha_dropout, nn.FeatureAlphaDropout, F.feature_alpha_dropout),
    *_of_tensors(f"{_ONE} {_SEVERAL} {_COMPARED} where masked_fill long int bool short"),
]
_DROPOUTS: list[Any] = [
    *(getattr(nn, f"Dropout{n}") for n in ("", "1d", "2d", "3d")),
    *(getattr(F, f"dropout{n}") for n in ("", "1d", "2d", "3d")),
    *(torchvision.ops.StochasticDepth, torchvision.ops.stochastic_depth),
]
_CASTS = ("float", "double", "half", "bfloat16", "to", "type", "type_as", "cpu", "cuda", "requires_grad_")


@oprule(torch.isfinite, "isfinite", finite=True)
@oprule(torch.isnan, torch.isinf, "isnan", "isinf", finite=False)
@oprule(torch.isposinf, torch.isneginf, finite=False)
@oprule(operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not", finite=operator.not_)
@oprule(operator.and_, torch.logical_and, torch.bitwise_and, "logical_and", "bitwise_and",
        finite=lambda a, b: a and b)  # fmt: skip
@oprule(operator.or_, torch.logical_or, torch.bitwise_or, "logical_or", "bitwise_or",
        finite=lambda a, b: a or b)  # fmt: skip
@oprule(operator.xor, torch.logical_xor, torch.bitwise_xor, "logical_xor", "bitwise_xor",
        finite=lambda a, b: a != b)  # fmt: skip
@oprule(operator.pow, *_of_torch(_NOT_AT_ZERO), *_of_tensors(_NOT_AT_ZERO),
        *_named(torch.special, _SPECIAL_NOT_AT_ZERO),
        in_place=(*_of_torch(_NOT_AT_ZERO, "_"), *_of_tensors(_NOT_AT_ZERO, "_")), pole=0)  # fmt: skip
@oprule(torch.logit, torch.special.logit, torch.special.ndtri, "logit", in_place=(torch.logit_, "logit_"), pole=0,
        regular=0.5)  # fmt: skip
@oprule(*_of_torch("acosh arccosh"), *_of_tensors("acosh arccosh"),
        in_place=(*_of_torch("acosh arccosh", "_"), *_of_tensors("acosh arccosh", "_")),
        pole=0, regular=2.0)  # fmt: skip
@oprule(operator.floordiv, operator.mod, *_of_torch(_BY), *_of_tensors(_BY), torch.special.xlogy,
        in_place=(operator.ifloordiv, operator.imod, *_of_torch(_BY, "_"), *_of_tensors(_BY, "_")), pole=1)  # fmt: skip
@oprule(torch.addcdiv, "addcdiv", in_place=("addcdiv_",), pole=2)
@oprule(*_ELEMENTWISE, in_place=(*_of_torch(_IN_PLACE, "_"), *_of_tensors(_IN_PLACE, "_")))
@oprule(operator.add, operator.sub, torch.add, torch.sub, torch.subtract, "add", "sub", "subtract", linear="sum",
        in_place=(operator.iadd, operator.isub, "add_", "sub_", "subtract_"))  # fmt: skip
@oprule(torch.rsub)
@oprule(operator.mul, torch.mul, torch.multiply, "mul", "multiply", linear="product",
        in_place=(operator.imul, "mul_", "multiply_"))  # fmt: skip
@oprule(operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide", linear="quotient",
        pole=1, in_place=(operator.itruediv, "div_", "divide_", "true_divide_"))  # fmt: skip
@oprule(*_DROPOUTS, linear="first")
def _elementwise(op: Op, *operands: Any, **named: Any) -> Fields:
    return op.elementwise(*operands, *named.values())


@oprule(*_CASTS, linear="first")
def _cast(op: Op, input: Labelled, *settings: Any, **named: Any) -> Fields:
    """Of another tensor only the dtype and the device are read."""
    return op.elementwise(input)


# ---------------------------------------------------------------------------------------------------------------------
# Along spatial axes


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


def _resize_pad(edit: NodeEdit) -> None:
    """As much in front of the channels and behind them as is left of it."""
    pad, read = list(edit.argument("pad")), edit.tensor("input")
    for dim, old in edit.sources.items():
        k = 2 * (len(edit.old[0]) - 1 - dim)
        if read is not None and any(pad[k : k + 2]):
            pad[k], pad[k + 1] = int((old < pad[k]).sum()), int((old >= pad[k] + read[0][dim]).sum())
    edit.set_argument("pad", tuple(pad))


@oprule(F.pad, rewrite=_resize_pad, python="always")
def _pad(
    op: Op, input: Labelled, pad: Any, mode: str = "constant", value: Any = None, *rest: Any, **named: Any
) -> Fields:
    """Positions in front of an axis and behind it; channels that hold one number where the axis is one of channels."""
    fields = list(input.fields)
    for k in range(0, len(pad), 2):
        dim = input.ndim - 1 - k // 2
        f = next((f for f in fields if dim in f.dims), None)
        before, behind = pad[k : k + 2]
        if f is None or not (before or behind):
            continue
        fields.remove(f)
        if len(f.dims) > 1 or mode != "constant" or min(before, behind) < 0 or not op.in_graph:
            fields += op.keep(Labelled(input.value, (f,)), [dim])
            continue
        parts = [op.fresh(dim, before).ids, f.ids, op.fresh(dim, behind).ids]
        for ids in parts:
            op.cut(Field((dim,), ids))
        fields.append(Field((dim,), np.concatenate(parts), f.key))
    return tuple(fields)


@oprule(nn.Softmax, F.softmax, torch.softmax, torch.special.softmax, "softmax")
@oprule(nn.Softmin, F.softmin)
@oprule(nn.LogSoftmax, F.log_softmax, torch.log_softmax, torch.special.log_softmax, "log_softmax")
@oprule(torch.cumsum, "cumsum")
def _along(op: Op, input: Labelled, dim: int | None = None, *rest: Any, **named: Any) -> Fields:
    dim = op.setting("dim", dim)
    return op.keep(input, range(input.ndim) if dim is None else [dim])


@oprule(F.glu, nn.GLU)
def _glu(op: Op, input: Labelled, dim: int = -1) -> Fields:
    """The first half gated by the second: channels are chosen alike in both."""
    f, rest = op.axis(input, op.setting("dim", dim))
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


def bare_axes(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Copy ``x``; its ``dims`` hold no channels in the copy (`surgery.check_rule` tries ops on such axes)."""
    return x.clone()


@oprule(bare_axes)
def _bare_axes(op: Op, x: Labelled, dims: Sequence[int]) -> Fields:
    return op.keep(x, dims, "stands for an axis that holds no channels") if dims else x.fields
