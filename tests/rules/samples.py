"""For each row of the rule tables ops with arguments to try it on (`test_op_rules.py`).

``free`` says which axes the rule must leave free, as ``"0:1,2 weight:0"``: axes 1 and 2 of the first argument, axis 0
of ``weight``. Lengths of axes differ unless the op relates them. Where many ops share a rule, one or two of them have
samples of every kind, and the others the smallest.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torchvision.models import swin_transformer
from torchvision.models.video import mvit
from torchvision.models.video import swin_transformer as swin_transformer_3d
from torchvision.ops.misc import FrozenBatchNorm2d

from surgery.graph.items import set_items
from surgery.layers import attention as heads
from surgery.layers import norms as lengths
from surgery.layers.maxout import Maxout
from surgery.layers.norms import RestrictedNorm, batch_norm_over, group_norm_over, layer_norm_over, rms_norm_over
from surgery.layers.reductions import (
    amax_over,
    amin_over,
    max_over,
    mean_over,
    min_over,
    std_mean_over,
    std_over,
    var_mean_over,
    var_over,
)
from surgery.rules.elementwise import bare_axes

P = nn.Parameter


@dataclass(frozen=True)
class Sample:
    """An op of the table, and what `surgery.check_rule` is called with."""

    target: Any
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: frozenset[tuple[str, int]]
    wrong: str
    """What is known to be wrong with the rule."""

    @property
    def name(self) -> str:
        if isinstance(self.target, str):
            return f"Tensor.{self.target}"
        return f"{self.target.__module__}.{self.target.__name__}".replace("torch.nn.functional", "F")


SAMPLES: list[Sample] = []
NO_SAMPLE = {
    RestrictedNorm: "is the base of classes that are made of norms",
    "cuda": "needs a device that tests do not have",
    "mT": "is an attribute, sampled as one",
    torch.zeros: "takes no tensor: NoBias in tests/idioms.py has it",
    torch.ones: "takes no tensor: NoBias has it",
    torch.full: "takes no tensor",
}


def sample(op: Any, *args: Any, free: str = "", wrong: str = "", **kwargs: Any) -> None:
    target = type(op) if isinstance(op, nn.Module) else op
    axes = {(name, int(d)) for name, dims in (part.split(":") for part in free.split()) for d in dims.split(",")}
    SAMPLES.append(Sample(target, op, args, kwargs, frozenset(axes), wrong))


_generator = torch.Generator().manual_seed(0)


def t(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator, dtype=torch.float64)


def w(*shape: int) -> nn.Parameter:
    return P(t(*shape))


def pos(*shape: int) -> torch.Tensor:
    return t(*shape).abs() + 0.5


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=_generator)


def mask(*shape: int) -> torch.Tensor:
    return t(*shape) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Position by position

UNARY = (
    "negative positive absolute exp2 expm1 log1p sgn signbit ceil floor round trunc fix frac tan asin acos atan "
    "arcsin arccos arctan sinh cosh asinh atanh arcsinh arctanh sinc deg2rad rad2deg erfc erfinv i0 nan_to_num "
    "neg abs exp square sign sin cos erf"
)
SPECIAL = (
    "bessel_j0 bessel_j1 erf erfc erfcx erfinv exp2 expit expm1 i0 i0e i1 i1e log1p log_ndtr ndtr round sinc "
    "airy_ai digamma entr gammaln logit ndtri psi"
)
BINARY = (
    "divide multiply subtract true_divide rsub fmax fmin copysign logaddexp logaddexp2 ldexp heaviside nextafter "
    "lt le gt ge eq ne less less_equal greater greater_equal not_equal fmod remainder floor_divide atan2 arctan2 "
    "xlogy hypot"
)

for op in (operator.neg, torch.neg, torch.abs, torch.exp, torch.square, torch.sign, torch.sin, torch.cos, torch.erf,
           operator.pos, operator.abs, torch.relu, torch.sigmoid, torch.tanh, torch.isnan, torch.isinf, torch.isfinite,
           torch.logical_not, "isnan", "isinf", "isfinite", "logical_not",
           F.relu, F.relu6, F.elu, F.celu, F.selu, F.leaky_relu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
           F.relu_, torch.sigmoid_, torch.tanh_, F.elu_, torch.celu, torch.celu_, torch.selu, torch.selu_,
           F.leaky_relu_, F.rrelu, torch.rrelu, torch.rrelu_, F.hardtanh_, F.hardtanh, F.sigmoid, F.tanh,
           F.softplus, F.softsign, F.logsigmoid, F.tanhshrink, F.softshrink, F.hardshrink,
           torch.hardshrink, "hardshrink",
           "neg", "abs", "exp", "square", "sign", "relu", "sigmoid", "tanh", "erf", "relu_", "sigmoid_", "tanh_",
           "requires_grad_", "float", "double", "half", "bfloat16", "long", "int", "bool"):  # fmt: skip
    sample(op, t(4), free="0:0")
for name in UNARY.split():
    for spelling in (name, f"{name}_"):
        for op in (spelling if hasattr(torch.Tensor, spelling) else None, getattr(torch, spelling, None)):
            if op is not None and not (spelling == name and any(s.target is op for s in SAMPLES)):
                sample(op, 0.8 * t(4).tanh(), free="0:0")
for name in SPECIAL.split():
    sample(getattr(torch.special, name), torch.rand(4, generator=_generator, dtype=torch.float64) / 2 + 0.2, free="0:0")
for name in ("acosh", "arccosh"):
    for op in (name, f"{name}_", getattr(torch, name), getattr(torch, f"{name}_")):
        sample(op, pos(4) + 1, free="0:0")
for op in ("logit", "logit_", torch.logit, torch.logit_):
    sample(op, t(4).sigmoid(), 0.01, free="0:0")
for name in ("log2", "log10", "digamma", "lgamma", "log", "sqrt", "rsqrt", "reciprocal"):
    for spelling in (name, f"{name}_"):
        for op in (spelling if hasattr(torch.Tensor, spelling) else None, getattr(torch, spelling, None)):
            if op is not None and not any(s.target is op for s in SAMPLES):
                sample(op, pos(4), free="0:0")
for op in ("float_power", "float_power_", torch.float_power, "pow_"):
    sample(op, pos(4), 2.5, free="0:0")
for op in ("isposinf", "isneginf"):
    sample(getattr(torch, op), t(4), free="0:0")
for op in ("clamp_min", "clamp_max", "clamp_min_", "clamp_max_", torch.clamp_min, torch.clamp_max, torch.clamp_min_,
           torch.clamp_max_):  # fmt: skip
    sample(op, t(4), 0.3, free="0:0")
for op in ("clip", "clip_", torch.clip, torch.clip_, torch.clamp_):
    sample(op, t(4), -0.3, 0.4, free="0:0")
for name in BINARY.split():
    for spelling in (name, f"{name}_"):
        for op in (spelling if hasattr(torch.Tensor, spelling) else None, getattr(torch, spelling, None)):
            if op is not None:
                sample(op, t(4), pos(4), free="0:0 1:0")
for op in (torch.special.xlogy, operator.ifloordiv, operator.imod):
    sample(op, t(4), pos(4), free="0:0 1:0")
for op in (operator.xor, torch.logical_xor, torch.bitwise_xor, "logical_xor", "bitwise_xor"):
    sample(op, mask(4), mask(4), free="0:0 1:0")
for op in ("lerp", "lerp_"):
    sample(op, t(4), t(4), 0.3, free="0:0 1:0")
for op in ("addcmul", "addcmul_", "addcdiv", "addcdiv_"):
    sample(op, t(4), t(4), pos(4), free="0:0 1:0 2:0")
for op in (nn.Softshrink(), nn.Hardshrink(), "short"):
    sample(op, t(4), free="0:0")
for op in (nn.Softmin(1), F.softmin, torch.special.softmax, torch.special.log_softmax):
    sample(op, t(3, 4), *(() if isinstance(op, nn.Module) else (1,)), free="0:0")
sample("cpu", t(4), free="0:0")
sample("to", t(3, 4), "cpu", free="0:0,1")
sample("to", t(3, 4), torch.device("cpu"), torch.float32, free="0:0,1")
sample("to", t(3, 4), device="cpu", dtype=torch.float32, copy=True, free="0:0,1")
for op in (torch.log, torch.sqrt, torch.rsqrt, torch.reciprocal, "log", "sqrt", "rsqrt", "reciprocal"):
    sample(op, pos(4), free="0:0")
for op in (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
           operator.iadd, operator.isub, operator.imul, operator.itruediv,
           operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
           torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.maximum, torch.minimum,
           "add", "sub", "mul", "div", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne", "add_", "sub_", "mul_",
           "div_"):  # fmt: skip
    sample(op, t(4), pos(4), free="0:0 1:0")
for op in (torch.relu, nn.GELU()):
    sample(op, t(2, 3, 4), free="0:0,1,2")
for op in (operator.mul, "add_"):
    sample(op, t(3, 4), pos(3, 4), free="0:0,1 1:0,1")
    sample(op, t(2, 3, 4), w(3, 1), free="0:0,1,2 1:0")
for op in (operator.add, "mul"):
    sample(op, t(2, 3, 4), 2.5, free="0:0,1,2")
    sample(op, t(4), t(2, 3, 4), free="0:0 1:0,1,2")  # two tensors, the smaller one first
    sample(op, t(2, 3, 1), t(1, 1, 4), free="0:0,1 1:2")
    sample(op, t(2, 3, 4), t(2, 3, 1))  # one value for all: no matter which axis is broadcast
    sample(op, t(2, 3, 4), w(3, 4), free="0:0,1,2 1:0,1")
for op in (operator.pow, torch.pow, "pow"):
    sample(op, pos(4), pos(4), free="0:0 1:0")
    sample(op, pos(4), 2, free="0:0")
for op in (operator.and_, operator.or_, torch.logical_and, torch.logical_or, torch.bitwise_and, torch.bitwise_or,
           "logical_and", "logical_or", "bitwise_and", "bitwise_or"):  # fmt: skip
    sample(op, mask(4), mask(4), free="0:0 1:0")
for op in (operator.invert, torch.bitwise_not, "bitwise_not"):
    sample(op, mask(3, 4), free="0:0,1")
for op in (torch.clamp, "clamp", "clamp_"):
    sample(op, t(3, 4), -0.5, 0.5, free="0:0,1")
    sample(op, t(3, 4), min=t(4), free="0:0,1 min:0")
sample(torch.where, mask(3, 4), t(3, 4), t(4), free="0:0,1 1:0,1 2:0")
sample(torch.where, mask(3, 1), t(2, 3, 4), 0.0, free="0:0 1:0,1,2")
sample("where", t(3, 4), mask(3, 4), t(3, 4), free="0:0,1 1:0,1 2:0,1")
for op in ("masked_fill", "masked_fill_"):
    sample(op, t(3, 4), mask(3, 4), 0.5, free="0:0,1 1:0,1")
    sample(op, t(2, 3, 4), mask(3, 1), 0.5, free="0:0,1,2 1:0")
sample(torch.lerp, t(3, 4), t(3, 4), 0.3, free="0:0,1 1:0,1")
sample(torch.lerp, t(3, 4), t(3, 4), t(4), free="0:0,1 1:0,1 2:0")
for op in (torch.addcmul, torch.addcdiv):
    sample(op, t(3, 4), t(3, 4), pos(4), value=0.5, free="0:0,1 1:0,1 2:0")
for op in (F.threshold, torch.threshold, torch.threshold_):
    sample(op, t(3, 4), 0.1, 0.2, free="0:0,1")
for op in (F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    sample(op, t(2, 3, 1, 1, 1) if op is F.dropout3d else t(2, 3, 1), 0.5, training=False, free="0:0,1")
sample(torchvision.ops.stochastic_depth, t(2, 3, 4), 0.5, "row", training=False, free="0:0,1,2")
sample("to", t(3, 4), torch.float32, free="0:0,1")
sample("to", t(3, 4), dtype=torch.int64, copy=True, free="0:0,1")
sample("type", t(3, 4), torch.float32, free="0:0,1")
sample("type_as", t(3, 4), t(5), free="0:0,1")
for module in (nn.ReLU(), nn.ReLU6(), nn.ELU(), nn.CELU(), nn.SELU(), nn.LeakyReLU(0.1), nn.RReLU(), nn.SiLU(),
               nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(),
               nn.Softsign(), nn.LogSigmoid(), nn.Tanhshrink(), nn.Threshold(0.1, 0.2), nn.Dropout(),
               nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.ReLU(inplace=True),
               torchvision.ops.StochasticDepth(0.5, "row")):  # fmt: skip
    sample(module, t(4), free="0:0")
sample(nn.Dropout1d(), t(3, 4), free="0:0,1")
sample(nn.Dropout2d(), t(2, 3, 4, 5), free="0:0,1,2,3")
sample(bare_axes, t(2, 3), [1], free="0:0")
for op in (torch.zeros_like, torch.ones_like):
    sample(op, t(3, 4), free="0:0,1")
sample(torch.full_like, t(3, 4), 0.5, free="0:0,1")
for op in (torch.rand_like, torch.randn_like, torch.empty_like):
    sample(op, t(3, 4))
for name in ("new_zeros", "new_ones", "new_empty"):
    sample(name, t(3, 4), (2, 5))
sample("new_zeros", t(3, 4), 2, 5)
sample("new_full", t(3, 4), (2, 5), 0.5)

# ---------------------------------------------------------------------------------------------------------------------
# Layers with weights

sample(nn.Linear(4, 5), t(2, 4), free="0:0,1 weight:0,1 bias:0")
sample(nn.Linear(4, 5, bias=False), t(2, 3, 4), free="0:0,1,2 weight:0,1")
sample(nn.Linear(4, 5), t(4), free="0:0 weight:0,1 bias:0")
sample(F.linear, t(2, 3, 4), w(5, 4), free="0:0,1,2 1:0,1")
sample(F.linear, t(2, 4), weight=w(5, 4), bias=w(5), free="0:0,1 weight:0,1 bias:0")
for op in (torch.matmul, operator.matmul, "matmul", "__matmul__"):
    sample(op, t(2, 3, 4), w(4, 5), free="0:0,1,2 1:0,1")
for op in (torch.mm, "mm"):
    sample(op, t(3, 4), w(4, 5), free="0:0,1 1:0,1")
    sample(op, w(3, 4), t(4, 5), free="0:0,1 1:0,1")
sample(torch.matmul, t(2, 3, 4), t(2, 4, 5), free="0:0,1,2 1:0,1,2")
sample("matmul", t(1, 3, 4, 5), t(1, 3, 5, 6), free="0:1,2,3 1:1,2,3")
sample(operator.matmul, t(2, 3, 4), t(4), free="0:0,1,2 1:0")
sample(operator.matmul, t(4), t(2, 4, 5), free="0:0 1:0,1,2")
for op in (torch.bmm, "bmm"):
    sample(op, t(2, 3, 4), t(2, 4, 5), free="0:0,1,2 1:0,1,2")
for op in (torch.mv, "mv"):
    sample(op, t(3, 4), t(4), free="0:0,1 1:0")
    sample(op, w(3, 4), t(4), free="0:0,1 1:0")
for op in (torch.baddbmm, "baddbmm"):
    sample(op, t(2, 3, 5), t(2, 3, 4), t(2, 4, 5), free="0:0,1,2 1:0,1,2 2:0,1,2")
for op in (torch.addmm, "addmm"):
    sample(op, w(5), t(3, 4), w(4, 5), free="0:0 1:0,1 2:0,1")
sample(torch.addmm, t(3, 5), t(3, 4), t(4, 5), beta=0.5, alpha=2.0, free="0:0,1 1:0,1 2:0,1")
sample(torch.einsum, "nlc,dc->nld", t(2, 3, 4), w(5, 4), free="1:0,1,2 2:0,1")
sample(torch.einsum, "bhqd, bhkd -> bhqk", t(1, 3, 4, 5), t(1, 3, 6, 5), free="1:1,2,3 2:1,2,3")
sample(torch.einsum, "nc,nd", t(2, 3), t(2, 4), free="1:1 2:1")
sample(torch.einsum, "nchw->nhwc", t(2, 3, 4, 5), free="1:0,1,2,3")
sample(torch.einsum, "nc,c,c->n", t(2, 3), w(3), w(3), free="1:1 2:0 3:0")
sample(torch.einsum, "ij,jk->ik", [t(2, 3), t(3, 4)], free="1.0:0,1 1.1:0,1")
sample(torch.einsum, "...c,c->...", t(2, 3), t(3))
sample(torch.einsum, "ii->i", t(3, 3))
# scores by (batch, heads, queries, keys): values have a size of head of their own
sample(F.scaled_dot_product_attention, t(1, 3, 4, 5), t(1, 3, 6, 5), t(1, 3, 6, 7), free="0:1,2 1:1 2:1,3")
sample(F.scaled_dot_product_attention, t(2, 4, 5), t(2, 6, 5), t(2, 6, 7), scale=0.3, free="0:0,1,2 1:0,2 2:0,2")
sample(F.scaled_dot_product_attention, t(1, 3, 4, 5), t(1, 3, 6, 5), t(1, 3, 6, 7), attn_mask=t(3, 1, 6),
       free="0:1 1:1 2:1,3 attn_mask:0")  # fmt: skip
sample(F.scaled_dot_product_attention, t(1, 3, 4, 5), t(1, 3, 6, 5), t(1, 3, 6, 7), mask(4, 6) | True, free="0:1 2:1,3")
sample(F.scaled_dot_product_attention, t(1, 3, 4, 5), t(1, 3, 4, 5), t(1, 3, 4, 5), is_causal=True, free="0:1 2:1,3")
projections = "in_proj_weight:1 out_proj.weight:0 out_proj.bias:0"  # no heads, whose mean is a result
sample(nn.MultiheadAttention(8, 2, batch_first=True), t(1, 5, 8), t(1, 3, 8), t(1, 3, 8),
       free=f"0:1,2 1:2 2:2 {projections}")  # fmt: skip
sample(nn.MultiheadAttention(8, 2, batch_first=True), t(1, 5, 8), t(1, 3, 8), t(1, 3, 8), need_weights=False,
       free="0:1,2 1:2 2:2 in_proj_weight:0,1 out_proj.weight:0,1 out_proj.bias:0 in_proj_bias:0")  # fmt: skip
sample(nn.MultiheadAttention(6, 3, bias=False), t(5, 1, 6), t(5, 1, 6), t(5, 1, 6), need_weights=False,
       free="0:2 in_proj_weight:0,1 out_proj.weight:0,1")  # fmt: skip
sample(nn.MultiheadAttention(8, 2, kdim=6, vdim=4), t(5, 8), t(3, 6), t(3, 4), average_attn_weights=False,
       free="0:1 1:1 2:1 q_proj_weight:0,1 k_proj_weight:0,1 v_proj_weight:0,1 out_proj.weight:0,1")  # fmt: skip
sample(nn.MultiheadAttention(8, 2, batch_first=True), t(2, 5, 8), t(2, 5, 8), t(2, 5, 8), attn_mask=t(5, 5),
       key_padding_mask=torch.zeros(2, 5), free=projections)  # fmt: skip
sample(heads.HeadAttention(8, 2, batch_first=True), t(1, 5, 8), t(1, 3, 8), t(1, 3, 8),
       free=f"0:2 {projections}")  # fmt: skip
for op in (swin_transformer.shifted_window_attention, heads.windowed_attention):
    more = {"head_dim": 4} if op is heads.windowed_attention else {}
    sample(op, t(1, 4, 4, 8), w(24, 8), w(8, 8), t(1, 2, 4, 4), [2, 2], 2, [0, 0], qkv_bias=w(24), proj_bias=w(8),
           **more, free="0:3 1:0,1 2:0,1 3:1 qkv_bias:0 proj_bias:0")  # fmt: skip
    sample(op, t(1, 3, 5, 8), w(24, 8), w(8, 8), t(1, 2, 4, 4), [2, 2], 2, [1, 1], qkv_bias=w(24), proj_bias=w(8),
           logit_scale=w(2, 1, 1), **more, free="0:3 1:0,1 2:0,1 3:1 logit_scale:0")  # fmt: skip
sample(swin_transformer_3d.shifted_window_attention_3d, t(1, 2, 4, 4, 8), w(24, 8), w(8, 8), t(1, 2, 8, 8), [2, 2, 2],
       2, [0, 1, 1], qkv_bias=w(24), free="0:4 1:0,1 2:0,1 3:1 qkv_bias:0")  # fmt: skip
sample(swin_transformer._get_relative_position_bias, w(9, 3), P(ints(9, 16), requires_grad=False), [2, 2], free="0:1")
sample(swin_transformer_3d._get_relative_position_bias, w(9, 3), P(ints(9, 4, 4), requires_grad=False), [1, 2, 2],
       free="0:1")  # fmt: skip
sample(swin_transformer._patch_merging_pad, t(2, 4, 6, 3), free="0:0,3")
sample(mvit._unsqueeze, t(2, 3, 4), 4, 1, free="0:0,1,2")
sample(mvit._unsqueeze, t(2, 3, 4, 5), 4, 1, free="0:0,1,2,3")
sample(mvit._squeeze, t(2, 1, 3, 4), 4, 1, 3, free="0:0,2,3")
sample(mvit._squeeze, t(2, 3, 4, 5), 4, 1, 4, free="0:0,1,2,3")
sample(mvit._add_rel_pos, t(2, 3, 5, 5), t(2, 3, 5, 4), (1, 2, 2), (1, 2, 2), w(3, 4), w(3, 4), w(1, 4),
       free="0:1 1:1")  # fmt: skip
sample(mvit._add_shortcut, t(2, 3, 4, 5), t(2, 3, 4, 5), False, free="0:1,3 1:1,3")  # fmt: skip
sample(mvit._add_shortcut, t(2, 3, 4, 5), t(2, 3, 4, 5), True, free="0:1,3 1:1,3")
for n, (conv, transposed) in enumerate(((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d),
                                        (nn.Conv3d, nn.ConvTranspose3d)), start=1):  # fmt: skip
    space = (5, 1, 1)[:n]
    sample(conv(4, 6, 1), t(2, 4, *space), free="0:0,1 weight:0,1 bias:0")
    sample(conv(4, 6, 1, bias=False), t(4, *space), free="0:0 weight:0,1")
    sample(conv(4, 6, 1, groups=2), t(3, 4, *space), free="0:0,1 weight:0,1 bias:0")
    sample(conv(4, 4, 1, groups=4), t(2, 4, *space), free="0:0,1 weight:0 bias:0")
    sample(conv(3, 6, 1, groups=3), t(2, 3, *space), free="0:0,1 weight:0 bias:0")
    sample(transposed(4, 6, 1), t(2, 4, *space), free="0:0,1 weight:0,1 bias:0")
    sample(transposed(4, 6, 1), t(4, *space), free="0:0 weight:0,1 bias:0")
    sample(transposed(4, 6, 1, groups=2), t(2, 4, *space), free="0:0,1 weight:0,1 bias:0")
    sample(transposed(4, 4, 1, groups=4), t(2, 4, *space), free="0:0,1 weight:0 bias:0")
    sample(transposed(3, 6, 1, groups=3, bias=False), t(2, 3, *space), free="0:0,1 weight:0")
    conv, transposed = getattr(F, f"conv{n}d"), getattr(F, f"conv_transpose{n}d")
    one = (1,) * n
    sample(conv, t(2, 4, *space), w(6, 4, *one), w(6), free="0:0,1 1:0,1 2:0")
    sample(conv, t(4, *space), weight=w(6, 4, *one), free="0:0 weight:0,1")
    sample(conv, t(3, 4, *space), w(6, 2, *one), None, 1, 0, 1, 2, free="0:0,1 1:0,1")
    sample(conv, t(2, 4, *space), w(4, 1, *one), bias=w(4), groups=4, free="0:0,1 1:0 bias:0")
    sample(conv, t(4, *space), w(4, 1, *one), groups=4, free="0:0 1:0")
    sample(conv, input=t(2, 4, *space), weight=w(8, 1, *one), groups=4, free="input:0,1 weight:0")
    sample(transposed, t(2, 4, *space), w(4, 6, *one), w(6), free="0:0,1 1:0,1 2:0")
    sample(transposed, t(2, 4, *space), w(4, 3, *one), groups=2, free="0:0,1 1:0,1")
    sample(transposed, t(2, 4, *space), w(4, 1, *one), w(4), groups=4, free="0:0,1 1:0 2:0")
    sample(transposed, input=t(4, *space), weight=w(4, 1, *one), groups=4, free="input:0 weight:0")
sample(nn.Conv2d(4, 6, 3, padding=1, stride=2, padding_mode="circular"), t(2, 4, 5, 3), free="0:0,1 weight:0,1 bias:0")
sample(nn.Conv2d(4, 6, (1, 3), dilation=(1, 2), padding="same"), t(2, 4, 3, 5), free="0:0,1 weight:0,1 bias:0")
sample(nn.ConvTranspose2d(4, 6, 2, stride=2), t(2, 4, 3, 5), free="0:0,1 weight:0,1 bias:0")
sample(F.conv2d, t(2, 4, 5, 3), w(6, 4, 2, 2), stride=(2, 1), padding=1, free="0:0,1 1:0,1")
vectors = "weight:0 bias:0 running_mean:0 running_var:0"
for n, (batch, instance) in enumerate(((nn.BatchNorm1d, nn.InstanceNorm1d), (nn.BatchNorm2d, nn.InstanceNorm2d),
                                       (nn.BatchNorm3d, nn.InstanceNorm3d)), start=1):  # fmt: skip
    space = (5, 1, 1)[:n]
    sample(batch(4), t(3, 4, *space), free=f"0:1 {vectors}")
    sample(batch(4, affine=False), t(3, 4, *space), free="0:1 running_mean:0 running_var:0")
    sample(batch(4, track_running_stats=False), t(3, 4, *space), free="0:1 weight:0 bias:0")
    sample(instance(4, affine=True), t(3, 4, *space), free="0:1 weight:0 bias:0")
    sample(instance(4, affine=True, track_running_stats=True), t(3, 4, *space), free=f"0:1 {vectors}")
    sample(instance(4), t(3, 4, *space), free="0:1")
    sample(instance(4), t(4, *space))
sample(nn.BatchNorm1d(4), input=t(3, 4), free=f"input:1 {vectors}")
sample(nn.BatchNorm1d(4), t(3, 4), free=f"0:1 {vectors}")
sample(nn.SyncBatchNorm(4), t(3, 4, 5), free=f"0:1 {vectors}")
sample(F.batch_norm, t(3, 4, 5), w(4), P(pos(4)), w(4), w(4), False, 0.1, 1e-3, free="0:1 1:0 2:0 3:0 4:0")
sample(F.batch_norm, t(3, 4), None, None, weight=w(4), training=True, free="0:1 weight:0")
sample(nn.LayerNorm(4), t(2, 3, 4), free="0:0,1,2 weight:0 bias:0")
sample(nn.LayerNorm(4, elementwise_affine=False), t(2, 4), free="0:0,1")
sample(nn.LayerNorm((3, 4)), t(2, 3, 4), free="0:0,1,2 weight:0,1 bias:0,1")
sample(F.layer_norm, t(2, 3, 4), (4,), w(4), w(4), 1e-3, free="0:0,1,2 2:0 3:0")
sample(F.layer_norm, t(2, 4), normalized_shape=[4], free="0:0,1")
sample(torch.layer_norm, t(2, 3, 4), [4], w(4), w(4), 1e-3, free="0:0,1,2 2:0 3:0")
sample(nn.RMSNorm(4), t(2, 3, 4), free="0:0,1,2 weight:0")
sample(nn.RMSNorm(4, elementwise_affine=False), t(2, 4), free="0:0,1")
sample(nn.RMSNorm((3, 4), eps=1e-3), t(2, 3, 4), free="0:0,1,2 weight:0,1")
sample(F.rms_norm, t(2, 3, 4), (4,), w(4), 1e-3, free="0:0,1,2 2:0")
sample(torch.rms_norm, t(2, 4), [4], weight=w(4), free="0:0,1 weight:0")
for norm, shape in ((nn.GroupNorm(2, 6), (2, 6, 5)), (nn.GroupNorm(1, 4), (2, 4, 3, 5)),
                    (nn.GroupNorm(4, 4), (2, 4, 3)), (nn.GroupNorm(2, 6), (3, 6))):  # fmt: skip
    sample(norm, t(*shape), free="0:0,1 weight:0 bias:0")
sample(nn.GroupNorm(2, 6, affine=False), t(3, 6, 5), free="0:0,1")
for op in (F.group_norm, torch.group_norm):
    sample(op, t(3, 6, 5), 2, w(6), w(6), free="0:0,1 2:0 3:0")
    sample(op, t(2, 4, 5), 4, free="0:0,1")
sample(F.group_norm, input=t(3, 6, 5), num_groups=6, free="input:0,1")
sample(F.group_norm, input=t(3, 6, 5), num_groups=2, weight=w(6), free="input:0,1 weight:0")
sample(nn.PReLU(), t(2, 3, 4), free="0:0,1,2")
sample(nn.PReLU(3), t(2, 3, 4), free="0:0,1,2 weight:0")
for op in (F.prelu, torch.prelu):
    sample(op, t(2, 3, 4), w(3), free="0:0,1,2 1:0")
    sample(op, t(2, 3, 4), w(1), free="0:0,1,2")
sample(nn.Embedding(7, 4), ints(7, 2, 3), free="weight:1")
sample(nn.Embedding(7, 4, padding_idx=0), ints(7, 5), free="weight:1")
sample(F.embedding, ints(7, 2, 3), w(7, 4), free="1:1")
sample(F.embedding, ints(7, 5), weight=w(7, 4), padding_idx=0, max_norm=None, free="weight:1")
sample(F.embedding, ints(7, 5), w(7, 4), max_norm=1.0)
sample(torch.embedding, w(7, 4), ints(7, 2, 3), free="0:1")
sample(nn.EmbeddingBag(7, 4), ints(7, 2, 3), free="weight:1")
sample(nn.EmbeddingBag(7, 4, mode="sum"), ints(7, 2, 3), per_sample_weights=t(2, 3), free="weight:1")
sample(nn.EmbeddingBag(7, 4, mode="max"), ints(7, 5), torch.tensor([0, 2]), free="weight:1")
for layer in (nn.RNN, nn.LSTM, nn.GRU):
    sample(layer(4, 3), t(5, 2, 4), free="0:1,2 weight_ih_l0:0")
for layer in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
    sample(layer(4, 3), t(2, 4), free="0:0,1 weight_ih:0")
kept = torch.tensor([True, False, True, True])
sample(layer_norm_over, t(2, 4), kept)
sample(rms_norm_over, t(2, 4), kept)
sample(group_norm_over, t(2, 4, 3), kept, 2)
sample(nn.LocalResponseNorm(3), t(2, 4, 5), free="0:0,2")
sample(F.local_response_norm, t(2, 4, 5, 3), size=3, free="0:0,2,3")

# ---------------------------------------------------------------------------------------------------------------------
# Along spatial axes, reductions

for n in (1, 2, 3):
    space = (4, 4, 4)[:n]
    for kind in ("Max", "Avg"):
        sample(getattr(nn, f"{kind}Pool{n}d")(2), t(2, 3, *space), free="0:0,1")
    for kind in ("AdaptiveAvg", "AdaptiveMax"):
        sample(getattr(nn, f"{kind}Pool{n}d")(2), t(2, 3, *space), free="0:0,1")
        sample(getattr(nn, f"{kind}Pool{n}d")(1), t(3, *space), free="0:0")
        name = {"AdaptiveAvg": "adaptive_avg", "AdaptiveMax": "adaptive_max"}[kind]
        sample(getattr(F, f"{name}_pool{n}d"), t(2, 3, *space), 2, free="0:0,1")
    for padding, values in (("Zero", ()), ("Constant", (0.5,)), ("Reflection", ()), ("Replication", ())):
        sample(getattr(nn, f"{padding}Pad{n}d")(1, *values), t(2, 3, *space), free="0:0,1")
    sample(getattr(F, f"max_pool{n}d"), t(2, 3, *space), kernel_size=2, free="0:0,1")
    sample(getattr(F, f"avg_pool{n}d"), t(2, 3, *space), 2, free="0:0,1")
    sample(getattr(torch, f"max_pool{n}d"), t(2, 3, *space), 2, free="0:0,1")
    if n < 3:
        sample(getattr(nn, f"LPPool{n}d")(2, 2), t(2, 3, *space), free="0:0,1")
        sample(getattr(F, f"lp_pool{n}d"), t(2, 3, *space), 2, 2, free="0:0,1")
sample(nn.MaxPool2d(2, return_indices=True), t(2, 3, 4, 6), free="0:0,1")
sample(nn.MaxPool2d(2), t(3, 4, 6), free="0:0")
sample(torch.avg_pool1d, t(2, 3, 6), 2, free="0:0,1")
sample(torch.adaptive_avg_pool1d, t(2, 3, 6), 2, free="0:0,1")
sample(F.interpolate, t(2, 3, 4, 5), scale_factor=2, free="0:0,1")
sample(F.interpolate, t(2, 3, 4), (6,), mode="linear", free="0:0,1")
sample(F.grid_sample, t(2, 3, 4, 5), t(2, 3, 4, 2).tanh(), align_corners=False, free="0:1")
sample(nn.Upsample(scale_factor=2), t(2, 3, 4), free="0:0,1")
sample(nn.UpsamplingNearest2d(scale_factor=2), t(2, 3, 4, 5), free="0:0,1")
sample(nn.UpsamplingBilinear2d(size=(3, 7)), t(2, 3, 4, 5), free="0:0,1")
boxes = torch.tensor([[0.0, 0.5, 3.0, 2.5], [1.0, 0.0, 2.5, 3.0], [0.5, 0.5, 3.5, 3.5]], dtype=torch.float64)
rows = torch.cat([torch.tensor([[0.0], [1.0], [1.0]]), boxes], 1)
for op in (torchvision.ops.roi_align, torchvision.ops.roi_pool):
    sample(op, t(2, 3, 4, 5), [boxes[:1], boxes[1:]], 2, free="0:1")
sample(torchvision.ops.roi_align, t(2, 3, 4, 5), boxes=rows, output_size=(2, 1), spatial_scale=0.5, free="0:1")
for op in (torchvision.ops.RoIAlign(2, 1.0, 1), torchvision.ops.RoIPool(2, 1.0)):
    sample(op, t(2, 3, 4, 5), rows, free="0:1")
sample(torch.ops.torchvision.roi_align, t(2, 3, 4, 5), rows, 1.0, 2, 2, -1, False, free="0:1")
sample(torch.ops.torchvision.roi_pool, t(2, 3, 4, 5), rows, 1.0, 2, 2, free="0:1")
sample(FrozenBatchNorm2d(3), t(2, 3, 4, 5), free="0:0,1,2,3 weight:0 bias:0 running_mean:0 running_var:0")
sample(F.pad, t(2, 3, 4), (1, 2), free="0:0,1")
sample(F.pad, t(2, 3, 4, 5), pad=(1, 1, 0, 0), mode="replicate", free="0:0,1")
sample(F.pad, t(2, 3, 4), (0, 0, 1, 1), value=0.5, free="0:0,2")
sample(F.pad, t(3, 4), (0, 0), free="0:0,1")
sample(F.pad, t(2, 3, 4), (0, 0, 2, 1), free="0:0,1,2")
sample(F.pad, t(2, 3), pad=(1, 0), mode="constant", value=0.5, free="0:0,1")

for op in (torch.mean, "sum"):
    sample(op, t(2, 3, 4), 2, free="0:0,1")
    sample(op, t(2, 3, 4), dim=-2, keepdim=True, free="0:0,2")
    sample(op, t(2, 3, 4), (0, -1), free="0:1")
for op in (torch.sum, torch.amax, torch.amin, torch.var, torch.std, torch.any, torch.all, torch.logsumexp,
           "mean", "amax", "amin", "var", "std", "any", "all", "logsumexp"):  # fmt: skip
    sample(op, mask(3, 4) if op in (torch.any, torch.all, "any", "all") else t(3, 4), dim=-1, free="0:0")
for op in (torch.mean, torch.sum, torch.max, torch.min, torch.prod, torch.var, torch.any, "mean", "sum", "max", "prod"):
    sample(op, mask(3) if op is torch.any else t(3))
for op in (torch.mean, "sum"):
    sample(op, t(2, 3, 4, 5), axis=(2, 3), free="0:0,1")
    sample(op, t(2, 3, 4, 5), [2, 3], True, free="0:0,1")
for op in (torch.max, torch.min, torch.prod, "max", "min", "prod"):
    sample(op, t(3, 4), dim=-1, keepdim=True, free="0:0")
sample(torch.max, t(2, 3, 4), 1, free="0:0,2")
for op in (torch.max, torch.min, "max", "min"):
    sample(op, t(3, 4), t(3, 1), free="0:0,1 1:0")
sample(torch.var, t(2, 3, 4), 1, unbiased=False, free="0:0,2")
sample("std", t(2, 3, 4), False)
sample("var", t(2, 3, 4), (1, 2), correction=0, free="0:0")
for op in (torch.norm, "norm"):
    sample(op, t(2, 3, 4), 2, 1, free="0:0,2")
    sample(op, t(2, 3, 4), p=1, dim=(-1, 0), keepdim=True, free="0:1")
    sample(op, t(2, 3))
for op in (torch.mean, "amax", "max", torch.min):
    sample(op, t(2, 3, 4), 1, free="0:0,1,2")
    sample(op, t(2, 3, 4), dim=-1, keepdim=True, free="0:0,1,2")
sample("sum", t(2, 3, 4), (1, 2), free="0:0,1,2")
sample("std", t(2, 3, 4), 1, free="0:0,1,2")
sample(torch.var, t(2, 3, 4), dim=-1, keepdim=True, free="0:0,1,2")
for op in (torch.var_mean, torch.std_mean):
    sample(op, t(2, 3, 4), 1, False, True, free="0:0,1,2")
    sample(op, t(2, 3, 4), dim=(0, 2), correction=2, free="0:0,1,2")
sample(torch.norm, t(2, 3, 4), p=3, dim=1, free="0:0,1,2")
for op in (torch.linalg.vector_norm, torch.linalg.norm):
    sample(op, t(2, 3, 4), dim=1, free="0:0,1,2")
    sample(op, t(2, 3, 4), 1, -1, True, free="0:0,1,2")
sample(torch.linalg.vector_norm, t(2, 3), float("inf"), 1, free="0:0,1")
sample(torch.linalg.norm, t(2, 3, 4), "nuc", (1, 2), free="0:0")
for reduction in (mean_over, var_over, std_over, var_mean_over, std_mean_over,
                  amax_over, amin_over, max_over, min_over):  # fmt: skip
    sample(reduction, t(2, 4), torch.tensor([[True, False, True, True]]), 1)
sample(batch_norm_over, t(1, 3, 4), torch.tensor([True, False, True, True]))
for op in (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.cumsum,
           "softmax", "log_softmax", "cumsum"):  # fmt: skip
    sample(op, t(3, 4), 0, free="0:1")
    sample(op, t(3, 4), dim=-1, free="0:0")
sample(F.softmax, t(2, 3, 4), dim=1, free="0:0,2")
sample(nn.Softmax(dim=1), t(2, 3, 4), free="0:0,2")
sample(nn.Softmax(dim=-1), t(2, 3, 4), free="0:0,1")
sample(nn.LogSoftmax(dim=0), t(2, 3), free="0:1")
sample(F.normalize, t(2, 3, 4), free="0:0,2")
sample(F.normalize, t(2, 3, 4), p=1.0, dim=-1, free="0:0,1")
sample(lengths.scaled_normalize, t(2, 3, 4), scale=2**0.5, free="0:0,2")
sample(F.glu, t(2, 6, 3), 1, free="0:0,1,2")
sample(F.glu, t(3, 8), free="0:0,1")
sample(nn.GLU(1), t(2, 6, 3), free="0:0,1,2")
sample(nn.GLU(), t(3, 8), free="0:0,1")
sample(Maxout(2), t(2, 6, 3), free="0:0,1,2")
sample(Maxout(3, dim=-1), t(2, 3, 6), free="0:0,1,2")

# ---------------------------------------------------------------------------------------------------------------------
# Ops that only move data

for op in ("contiguous", "clone", "detach", torch.clone, torch.detach, nn.Identity(), QuantStub(), DeQuantStub()):
    sample(op, t(2, 3, 4), free="0:0,1,2")
for op in (torch.flatten, "flatten"):
    sample(op, t(2, 3, 4), 1, free="0:0,1")
    sample(op, t(2, 3, 2, 2), start_dim=1, end_dim=-2, free="0:0,1,3")
    sample(op, t(3, 4))
sample(nn.Flatten(), t(2, 3, 4), free="0:0,1")
sample(nn.Flatten(2), t(2, 3, 4, 5), free="0:0,1,2")
sample(nn.Flatten(0, -2), t(2, 3, 4), free="0:2")
for op in (torch.unsqueeze, "unsqueeze"):
    sample(op, t(2, 3), 1, free="0:0,1")
    sample(op, t(2, 3), dim=-1, free="0:0,1")
for op in (torch.unflatten, "unflatten"):
    sample(op, t(2, 6, 5), 1, (2, 3), free="0:0,1,2")
    sample(op, t(2, 6), dim=-1, sizes=(3, -1), free="0:0,1")
sample(torch.unflatten, input=t(2, 6, 5), dim=1, sizes=(2, 3), free="input:0,1,2")
sample(nn.Unflatten(1, (2, 3)), t(2, 6, 5), free="0:0,1,2")
sample(nn.Unflatten(-2, (2, 3)), input=t(2, 6, 5), free="input:0,1,2")
for op in (torch.squeeze, "squeeze"):
    sample(op, t(2, 3, 1), free="0:0,1")
    sample(op, t(2, 3, 1, 4), 2, free="0:0,1,3")
    sample(op, t(2, 1, 3, 1), dim=(1, -1), free="0:0,2")
    sample(op, t(2, 3, 1), 1, free="0:0,1")
sample(torch.squeeze, input=t(2, 3, 1), free="input:0,1")
for op in ("view_as", "reshape_as"):
    sample(op, t(2, 12), t(2, 3, 4), free="0:0 1:0")
    sample(op, t(2, 3, 4), t(2, 3, 2, 2), free="0:0,1 1:0,1")
    sample(op, t(2, 3, 4), other=t(2, 12), free="0:0 other:0")
for op in (torch.movedim, torch.moveaxis, "movedim", "moveaxis"):
    sample(op, t(2, 3, 4), 1, -1, free="0:0,1,2")
    sample(op, t(2, 3, 4), (0, 1), (-1, 0), free="0:0,1,2")
for op in (torch.reshape, "reshape", "view"):
    sample(op, t(2, 3, 4), (2, 12), free="0:0,1")
    sample(op, t(2, 12), (2, 3, -1), free="0:0,1")
    sample(op, t(2, 6, 5), (-1, 3, 2, 5), free="0:0,1,2")
for op in ("reshape", "view"):
    sample(op, t(2, 3, 4), 2, -1, free="0:0,1")
    sample(op, t(2, 3, 1, 1), 2, 3, free="0:0,1")
sample(torch.reshape, t(2, 6), shape=(2, 2, 3), free="0:0,1")
for op in (torch.permute, "permute"):
    sample(op, t(2, 3, 4), (0, 2, 1), free="0:0,1,2")
    sample(op, t(2, 3, 4), dims=(-1, 0, 1), free="0:0,1,2")
sample("permute", t(2, 3, 4, 5), 0, 2, 3, 1, free="0:0,1,2,3")
sample(torchvision.ops.Permute([0, 3, 1, 2]), t(2, 3, 4, 5), free="0:0,1,2,3")
for op in (torch.transpose, "transpose", torch.swapaxes, "swapaxes"):
    sample(op, t(2, 3, 4), 1, 2, free="0:0,1,2")
    sample(op, t(2, 3, 4), -1, 0, free="0:0,1,2")
sample(torch.transpose, t(2, 3, 4), dim0=0, dim1=-1, free="0:0,1,2")
for op in (torch.t, "t"):
    sample(op, t(3, 4), free="0:0,1")
for name in ("T", "mT", "H", "data"):
    sample(getattr, t(3, 4), name, free="0:0,1")
sample(getattr, t(2, 3, 4), "mT", free="0:0,1,2")
for op in (torch.select, "select"):
    sample(op, t(2, 6, 5), 1, 3, free="0:0,2")
    sample(op, t(2, 6, 5), dim=-1, index=-2, free="0:0,1")
for op in (torch.cat, torch.concat, torch.concatenate):
    sample(op, [t(2, 3), t(2, 4)], 1, free="0.0:0,1 0.1:0,1")
    sample(op, (t(2, 3, 5), t(2, 1, 5), t(2, 4, 5)), dim=-2, free="0.0:0,1,2 0.1:0,2 0.2:0,1,2")  # fmt: skip
sample(torch.cat, tensors=[t(2, 3), t(4, 3)], axis=0, free="tensors.0:0,1 tensors.1:0,1")
sample(torch.stack, [t(2, 3), t(2, 3), t(2, 3)], free="0.0:0,1 0.2:0,1")
sample(torch.stack, (t(2, 3), t(2, 3)), dim=-1, free="0.0:0,1 0.1:0,1")
sample(torch.stack, (t(2, 3, 4), t(2, 3, 4)), 1, free="0.0:0,1,2 0.1:0,1,2")
for op in (torch.chunk, "chunk"):
    sample(op, t(2, 6), 2, 1, free="0:0,1")
    sample(op, t(2, 7, 3), 3, dim=-2, free="0:0,1,2")
    sample(op, t(4, 3), 2, free="0:0,1")
for op in (torch.split, "split"):
    sample(op, t(2, 6), 3, 1, free="0:0,1")
    sample(op, t(2, 7, 3), [4, 1, 2], dim=1, free="0:0,1,2")
    sample(op, t(2, 7), 3, dim=-1, free="0:0,1")
sample(torch.split, tensor=t(2, 7), split_size_or_sections=3, dim=1, free="tensor:0,1")
sample(torch.chunk, input=t(2, 6), chunks=2, dim=1, free="input:0,1")
for op in (torch.tensor_split, "tensor_split"):
    sample(op, t(2, 7), 3, 1, free="0:0,1")
    sample(op, t(2, 7), (2, 5), dim=-1, free="0:0,1")
for op in (torch.unbind, "unbind"):
    sample(op, t(2, 3, 4), free="0:1,2")
    sample(op, t(2, 3, 4), dim=-2, free="0:0,2")
sample(operator.getitem, t(4, 6), slice(1, 3), free="0:0,1")
sample(operator.getitem, t(2, 6, 5), (slice(None), slice(2, None)), free="0:0,1,2")
sample(operator.getitem, t(2, 6, 5), (Ellipsis, slice(None, None, 2)), free="0:0,1,2")
sample(operator.getitem, t(2, 6, 5), (slice(None), 3), free="0:0,2")
sample(operator.getitem, t(2, 6), (slice(None), slice(None), None, None), free="0:0,1")
sample(operator.getitem, t(2, 6, 5), (0, slice(-4, -1)), free="0:1,2")
sample(operator.getitem, t(2, 6, 5), (slice(None), slice(1, 5), 0), free="0:0,1")
sample(operator.getitem, t(2, 6, 5), (slice(None), slice(1, 5), None, slice(2, None)), free="0:0,1,2")
sample(operator.getitem, t(2, 3, 6), (Ellipsis, 1, slice(None, None, 2)), free="0:0,2")
sample(operator.getitem, t(4, 6), ints(4, 3, 2), free="0:1")
sample(operator.getitem, t(2, 5, 6), (ints(2, 3), ints(5, 3)), free="0:2")
sample(operator.getitem, t(7, 2, 5, 6), (slice(None), ints(2, 4, 1), ints(5, 3)), free="0:0,3")
sample(operator.getitem, t(7, 2, 5), (Ellipsis, ints(5, 4)), free="0:0,1")
for op in (torch.gather, "gather"):
    sample(op, t(2, 5), 1, ints(5, 2, 3))
    sample(op, t(4, 3), 0, ints(4, 2, 3))
for op in (torch.narrow, "narrow"):
    sample(op, t(2, 6, 3), 1, 2, 3, free="0:0,1,2")
    sample(op, t(2, 6), dim=-1, start=0, length=4, free="0:0,1")
for op in (torch.flip, "flip"):
    sample(op, t(2, 3, 4), (1,), free="0:0,1,2")
    sample(op, t(2, 3, 4), dims=[-1, 0], free="0:0,1,2")
sample("flip", t(2, 3, 4), 1, 2, free="0:0,1,2")
for op in (torch.roll, "roll"):
    sample(op, t(2, 3, 4), 1, 1, free="0:0,1,2")
    sample(op, t(2, 3, 4), shifts=(1, -2), dims=(-1, 0), free="0:0,1,2")
    sample(op, t(2, 3), 1)
sample("repeat", t(2, 3), 1, 2, free="0:0,1")
sample("repeat", t(2, 3), (2, 1, 2), free="0:0,1")
for op in (torch.repeat_interleave, "repeat_interleave"):
    sample(op, t(2, 3), 2, 1, free="0:0,1")
    sample(op, t(2, 3, 4), repeats=2, dim=-2, free="0:0,1,2")
    sample(op, t(2, 3), 2)
for op in (torch.index_select, "index_select"):
    sample(op, t(2, 6, 3), 1, P(torch.tensor([5, 0, 1]), requires_grad=False), free="0:0,1,2")
    sample(op, t(2, 6), dim=-1, index=P(torch.tensor([5, 0, 1, 3, 2, 4]), requires_grad=False), free="0:0,1")
    sample(op, t(2, 6), 1, torch.tensor([5, 0, 1]), free="0:0")
for op in ("expand", torch.broadcast_to, "broadcast_to"):
    sample(op, t(2, 3, 1), (2, 3, 4), free="0:0,1")
    sample(op, t(3, 1), (-1, -1) if op == "expand" else (3, 1), free="0:0")
    sample(op, t(3), (2, 3), free="0:0")
sample("expand", t(2, 3, 1), -1, -1, 4, free="0:0,1")
sample("expand_as", t(2, 3, 1), t(2, 3, 4), free="0:0,1 1:0,1,2")
sample("expand_as", t(3, 1), other=t(2, 3, 4), free="0:0 other:0,1,2")
for op in (nn.ChannelShuffle(2), nn.ChannelShuffle(3)):
    sample(op, t(2, 6, 3, 5), free="0:0,1,2,3")
sample(F.channel_shuffle, t(2, 6, 3), 3, free="0:0,1,2")
sample(nn.PixelShuffle(2), t(2, 8, 3, 5), free="0:0,1")
sample(F.pixel_shuffle, t(12, 2, 5), 2, free="0:0")
sample(F.pixel_shuffle, t(2, 8, 3, 5), upscale_factor=2, free="0:0,1")
sample(nn.PixelUnshuffle(2), t(2, 3, 4, 6), free="0:0,1")
sample(F.pixel_unshuffle, t(3, 4, 6), 2, free="0:0")
sample(F.unfold, t(2, 3, 4, 5), 2, free="0:0,1")
sample(F.unfold, t(3, 4, 5), kernel_size=(2, 3), padding=1)
sample(nn.Unfold(2, stride=2), t(2, 3, 4, 6), free="0:0,1")

for op in (torchvision.ops.deform_conv2d,):
    sample(op, t(2, 4, 5, 6), t(2, 18, 5, 6), w(3, 4, 3, 3), w(3), padding=1, free="0:1 2:0,1 3:0")
    sample(op, t(2, 4, 5, 6), t(2, 18, 5, 6), w(3, 4, 3, 3), padding=1, mask=t(2, 9, 5, 6), free="0:1 2:0,1")
    sample(op, t(2, 4, 5, 6), t(2, 18, 5, 6), w(4, 2, 3, 3), padding=1)
sample(torchvision.ops.DeformConv2d(4, 3, 3, padding=1), t(2, 4, 5, 6), t(2, 18, 5, 6), free="0:1 weight:0,1 bias:0")
sample(torchvision.ops.DeformConv2d(4, 3, 1), t(2, 4, 5, 6), t(2, 2, 5, 6), t(2, 1, 5, 6), free="0:1 weight:0,1 bias:0")
sample("unfold", t(2, 3, 6, 4), 2, 3, 1, free="0:0,1,3")
sample(nn.Conv1d(2, 3, 1), t(2, 2, 4), free="0:0,1,2 weight:0,1 bias:0")
sample(F.scaled_dot_product_attention, t(2, 4, 5, 3), t(2, 2, 6, 3), t(2, 2, 6, 7), enable_gqa=True,
       free="0:0,1,2 1:1 2:1,3")  # fmt: skip
sample(set_items, t(2, 3, 4), (slice(None), 0), t(2, 4), free="2:1")
