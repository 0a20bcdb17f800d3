"""Odd small models: each is traced, permuted, widened, deepened and slimmed, in both modes, or refuses for a reason.

A model is a ``forward`` with the layers that it uses; ``frozen`` lists the reasons for which channels other than those
of the network's ends are left alone.
"""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

import surgery
from tests.zoo import randomised

EXACT = 1e-10
ENDS = {"network input", "network output"}
IMAGE = (2, 3, 6, 6)


@dataclass(frozen=True)
class Odd:
    forward: Callable[..., Any]
    shapes: tuple[Any, ...]
    named: dict[str, Any]
    children: dict[str, Callable[[], Any]]
    frozen: tuple[str, ...]
    modes: tuple[bool, ...]

    def build(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = type("Net", (nn.Module,), {"forward": self.forward})()
            for name, make in self.children.items():
                child = make()
                if isinstance(child, torch.Tensor) and not isinstance(child, nn.Parameter):
                    net.register_buffer(name, child)
                else:
                    setattr(net, name, child)
            for module in net.modules():
                if isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)):
                    for parameter in module.parameters():
                        parameter.data.uniform_(0.5, 1.5)
            args = tuple(torch.randn(shape, dtype=torch.float64) for shape in self.shapes)
            kwargs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in self.named.items()}
            return randomised(net).double(), args, kwargs


MODELS: dict[str, Odd] = {}


def odd(*shapes, named=None, frozen=(), modes=(False, True), **children):
    def register(forward):
        MODELS[forward.__name__] = Odd(forward, shapes or (IMAGE,), named or {}, children, frozen, modes)
        return forward

    return register


def conv(inputs, outputs, kernel=3, **options):
    return lambda: nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


def linear(inputs, outputs, **options):
    return lambda: nn.Linear(inputs, outputs, **options)


def norm(channels):
    return lambda: nn.BatchNorm2d(channels)


def parameter(*shape):
    return lambda: nn.Parameter(torch.randn(*shape))


def gap(x):
    return x.mean((2, 3))


@odd(a=conv(3, 4), b=conv(3, 4), c=conv(3, 8), d=conv(8, 5), bn=norm(8))
def add_of_cat(self, x):
    return gap(self.d(torch.relu(self.bn(self.c(x) + torch.cat([self.a(x), self.b(x)], 1)))))


@odd(a=conv(3, 4), d=conv(8, 5))
def cat_same(self, x):
    y = self.a(x).relu()
    return gap(self.d(torch.cat([y, y], 1)))


@odd(a=conv(3, 1), d=conv(2, 5))
def cat_same_single(self, x):
    y = self.a(x).relu()
    return gap(self.d(torch.cat([y, y], 1)))


@odd(a=conv(3, 4), d=conv(4, 5))
def add_itself(self, x):
    y = self.a(x).sigmoid()
    return gap(self.d(y + y))


@odd(a=conv(3, 8), b=conv(4, 5), c=conv(4, 5))
def chunk2(self, x):
    p, q = self.a(x).chunk(2, 1)
    return gap(self.b(p.tanh()) + self.c(q))


@odd(a=conv(3, 7), b=conv(3, 5), c=conv(3, 5), e=conv(1, 5))
def split_sizes(self, x):
    p, q, r = torch.split(self.a(x), [3, 3, 1], dim=1)
    return gap(self.b(p.tanh()) + self.c(q) + self.e(r))


@odd(a=conv(3, 7), b=conv(3, 5), c=conv(3, 5), e=conv(1, 5))
def split_int(self, x):
    p, q, r = self.a(x).split(3, dim=-3)
    return gap(self.b(p.tanh()) + self.c(q) + self.e(r))


@odd(a=conv(3, 8), b=conv(3, 5), c=conv(6, 5))
def slices(self, x):
    y = self.a(x)
    return gap(self.b(y[:, -3:].relu()) + self.c(y[:, :-2, ...]))


@odd(a=conv(3, 8), b=conv(4, 5), c=conv(4, 5))
def step_slices(self, x):
    y = self.a(x)
    return gap(self.b(y[:, ::2].relu()) + self.c(y[:, 1::2]))


@odd(a=conv(3, 8), b=conv(5, 5), frozen=("no layer contracts over it",))
def slice_middle_only(self, x):
    y = self.a(x)
    return gap(self.b(y[:, 2:7].relu()))


@odd(a=conv(3, 8), b=conv(4, 5))
def glu(self, x):
    return gap(self.b(F.glu(self.a(x), 1)))


@odd(a=conv(3, 8), b=conv(4, 5), g=lambda: nn.GLU(1))
def glu_module(self, x):
    return gap(self.b(self.g(self.a(x))))


@odd(a=conv(3, 8), b=conv(4, 5))
def gate_chunk(self, x):
    p, q = self.a(x).chunk(2, 1)
    return gap(self.b(p * q.sigmoid()))


@odd(a=conv(3, 8), b=conv(8, 5))
def shuffle_view(self, x):
    y = self.a(x)
    n, c, h, w = y.shape
    y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
    return gap(self.b(y))


@odd(a=conv(3, 8), b=conv(8, 8, groups=4), c=conv(8, 5, groups=1), s=lambda: nn.ChannelShuffle(2))
def shuffle_module_grouped(self, x):
    return gap(self.c(self.b(self.s(self.a(x))).relu()))


@odd(a=conv(3, 8), c=conv(8, 5), s=lambda: nn.ChannelShuffle(4))
def shuffle_module(self, x):
    return gap(self.c(self.s(self.a(x)).relu()))


@odd(a=conv(3, 8), b=conv(2, 5))
def pixel_shuffle(self, x):
    return gap(self.b(F.pixel_shuffle(self.a(x), 2)))


@odd(a=conv(3, 8), b=conv(2, 5), s=lambda: nn.PixelShuffle(2))
def pixel_shuffle_module(self, x):
    return gap(self.b(self.s(self.a(x))))


@odd(a=conv(3, 4), b=conv(16, 5), s=lambda: nn.PixelUnshuffle(2))
def pixel_unshuffle(self, x):
    return gap(self.b(self.s(self.a(x))))


@odd(a=conv(3, 12), b=conv(12, 12, groups=2), c=conv(12, 12, groups=3), d=conv(12, 5))
def chained_groups(self, x):
    return gap(self.d(self.c(self.b(self.a(x)).relu()).relu()))


@odd(
    a=conv(3, 4),
    b=conv(4, 4, groups=2),
    d=conv(4, 5),
    s=lambda: nn.ChannelShuffle(2),
    frozen=("b reads parts of it that cannot be told apart",),
)
def collapsed_groups(self, x):
    y = self.a(x)
    y = y + self.s(y)
    return gap(self.d(self.b(y).relu()))


@odd(a=conv(3, 4), b=conv(4, 12, groups=4), d=conv(12, 5))
def depthwise_multiplier(self, x):
    return gap(self.d(self.b(self.a(x)).relu()))


@odd(a=conv(3, 4), b=conv(4, 8, groups=4), d=conv(7, 5))
def depthwise_multiplier_sliced(self, x):
    return gap(self.d(self.b(self.a(x)).relu()[:, 1:]))


@odd(a=conv(3, 4), b=conv(4, 8, groups=4), d=conv(4, 5), e=conv(4, 5))
def depthwise_multiplier_chunked(self, x):
    p, q = self.b(self.a(x)).relu().chunk(2, 1)
    return gap(self.d(p) + self.e(q))


@odd(
    a=conv(3, 4), b=conv(4, 8, groups=4), d=conv(8, 5, groups=1), s=lambda: nn.ChannelShuffle(2), e=conv(8, 8, groups=8)
)
def depthwise_multiplier_shuffled(self, x):
    return gap(self.d(self.e(self.s(self.b(self.a(x)).relu()))))


@odd(a=conv(3, 4), b=lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), d=conv(6, 5), bn=norm(6))
def transposed(self, x):
    return gap(self.d(self.bn(self.b(self.a(x))).relu()))


@odd(a=conv(3, 4), b=lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), d=conv(6, 5), bn=norm(6))
def transposed_grouped(self, x):
    return gap(self.d(self.bn(self.b(self.a(x))).relu()))


@odd(a=conv(3, 4), b=lambda: nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), d=conv(4, 5), bn=norm(4))
def transposed_depthwise(self, x):
    return gap(self.d(self.bn(self.b(self.a(x))).relu()))


@odd(a=conv(3, 4), b=lambda: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=4), d=conv(8, 5), bn=norm(8))
def transposed_depthwise_multiplier(self, x):
    return gap(self.d(self.bn(self.b(self.a(x))).relu()))


@odd(a=conv(3, 8), f1=linear(8, 2), f2=linear(2, 8), d=conv(8, 5))
def se_linear(self, x):
    y = self.a(x)
    s = self.f2(self.f1(gap(y)).relu()).sigmoid()[:, :, None, None]
    return gap(self.d(y * s))


@odd(a=conv(3, 8), f1=linear(8, 2), f2=linear(2, 8), d=conv(8, 5))
def se_view(self, x):
    y = self.a(x)
    b, c, _, _ = y.size()
    s = F.adaptive_avg_pool2d(y, 1).view(b, c)
    s = self.f2(self.f1(s).relu()).sigmoid().view(b, c, 1, 1)
    return gap(self.d(y * s.expand_as(y)))


@odd(a=conv(3, 4), f=linear(4 * 36, 5))
def flatten_nhwc(self, x):
    return self.f(self.a(x).permute(0, 2, 3, 1).flatten(1))


@odd(a=conv(3, 1), f=linear(36, 5))
def flatten_nhwc_single(self, x):
    return self.f(self.a(x).permute(0, 2, 3, 1).flatten(1))


@odd(a=conv(3, 1), f=linear(36, 5))
def flatten_single(self, x):
    return self.f(self.a(x).flatten(1))


@odd(a=conv(3, 4), f=linear(4 * 36, 5))
def view_constants(self, x):
    return self.f(self.a(x).view(-1, 4 * 6 * 6))


@odd(a=conv(3, 4), f=linear(4 * 36, 5))
def reshape_batch(self, x):
    return self.f(self.a(x).reshape(x.shape[0], -1))


@odd(a=conv(3, 4), f=linear(4 * 36, 5))
def view_numfeatures(self, x):
    y = self.a(x)
    return self.f(y.view(y.size(0), y.size(1) * y.size(2) * y.size(3)))


@odd(a=conv(3, 4), b=conv(8, 5))
def repeat_channels(self, x):
    return gap(self.b(self.a(x).repeat(1, 2, 1, 1)))


@odd(a=conv(3, 1), b=conv(3, 5))
def repeat_single(self, x):
    return gap(self.b(self.a(x).repeat(1, 3, 1, 1)))


@odd(a=conv(3, 4), b=conv(8, 5))
def repeat_interleave_channels(self, x):
    return gap(self.b(self.a(x).repeat_interleave(2, 1)))


@odd(a=conv(3, 4), b=conv(3, 4), d=conv(4, 5))
def stack_sum(self, x):
    return gap(self.d(torch.stack([self.a(x), self.b(x)]).sum(0)))


@odd(a=conv(3, 4), b=conv(3, 4), d=conv(4, 5))
def stack_mean1(self, x):
    return gap(self.d(torch.stack([self.a(x), self.b(x)], 1).mean(1)))


@odd(a=conv(3, 4), b=conv(3, 4), d=conv(8, 5))
def stack_flatten(self, x):
    return gap(self.d(torch.stack([self.a(x), self.b(x)], 1).flatten(1, 2)))


@odd(a=conv(3, 4), b=conv(3, 4), d=conv(8, 5))
def stack_flatten2(self, x):
    return gap(self.d(torch.stack([self.a(x), self.b(x)], 2).flatten(1, 2)))


@odd(a=conv(3, 4), b=conv(3, 4), f1=linear(4, 3), f2=linear(3, 8), d=conv(4, 5))
def selective_kernel(self, x):
    p, q = self.a(x), self.b(x)
    u = p + q
    z = self.f2(self.f1(gap(u)).relu()).view(-1, 2, 4, 1, 1).softmax(1)
    return gap(self.d((torch.stack([p, q], 1) * z).sum(1)))


@odd(a=conv(3, 4), d=conv(4, 5))
def roll_space(self, x):
    return gap(self.d(torch.roll(self.a(x), (1, -2), (2, 3))))


@odd(a=conv(3, 4), d=conv(4, 5))
def roll_channels(self, x):
    return gap(self.d(torch.roll(self.a(x), 1, 1)))


@odd(a=conv(3, 4), d=conv(4, 5))
def flip_space(self, x):
    return gap(self.d(torch.flip(self.a(x), [3])))


@odd(a=conv(3, 4), d=conv(4, 5))
def flip_channels(self, x):
    return gap(self.d(self.a(x).flip(1)))


@odd(a=conv(3, 4), d=conv(4, 5))
def add_flip(self, x):
    y = self.a(x)
    return gap(self.d(y + y.flip(1)))


@odd(a=conv(3, 4), d=conv(8, 5))
def cat_flip(self, x):
    y = self.a(x)
    return gap(self.d(torch.cat([y, y.flip(1)], 1)))


@odd(a=conv(3, 6), g=conv(6, 1, 7), d=conv(6, 5), frozen=("mul broadcasts it",))
def spatial_gate(self, x):
    y = self.a(x)
    return gap(self.d(y * self.g(y).sigmoid()))


@odd(a=conv(3, 6), g=conv(6, 1, 7), d=conv(6, 5), frozen=("expand_as broadcasts it",))
def spatial_gate_expand(self, x):
    y = self.a(x)
    return gap(self.d(y * self.g(y).sigmoid().expand_as(y)))


@odd(a=conv(3, 6), g=conv(6, 1, 7), d=conv(6, 5), frozen=("expand broadcasts it",))
def spatial_gate_expand_sizes(self, x):
    y = self.a(x)
    return gap(self.d(y * self.g(y).sigmoid().expand(-1, 6, -1, -1)))


@odd(a=conv(3, 6), b=conv(1, 5))
def mean_channels(self, x):
    return gap(self.b(self.a(x).mean(1, keepdim=True)))


@odd(a=conv(3, 6), b=conv(6, 5), frozen=("softmax works along it",))
def softmax_channels(self, x):
    return gap(self.b(F.softmax(self.a(x), dim=1)))


@odd(a=conv(3, 6), b=conv(1, 5))
def max_channels(self, x):
    return gap(self.b(self.a(x).max(1, keepdim=True)[0]))


@odd(a=conv(3, 6), b=conv(2, 5))
def extremes_by_axis(self, x):
    y = self.a(x)
    return gap(self.b(torch.cat([y.max(axis=1, keepdim=True)[0], torch.min(y, axis=1, keepdim=True)[0]], 1)))


@odd(a=conv(3, 6), b=conv(2, 5))
def cbam_spatial(self, x):
    y = self.a(x)
    return gap(self.b(torch.cat([y.mean(1, True), y.amax(1, True)], 1)))


@odd(a=conv(3, 6), b=conv(6, 5))
def sub_mean(self, x):
    y = self.a(x)
    return gap(self.b(y - y.mean(1, keepdim=True)))


@odd(a=conv(3, 6), b=conv(6, 5))
def l2_norm_args(self, x):
    return gap(self.b(F.normalize(self.a(x), 2, 1)))


@odd((2, 3, 6), a=lambda: nn.Conv1d(3, 6, 1), b=lambda: nn.Conv1d(6, 5, 1))
def norm_positional(self, x):
    y = self.a(x)
    return self.b(y / (y.norm(2, 1).unsqueeze(1) + 1)).mean(2)


@odd((2, 3, 6), a=lambda: nn.Conv1d(3, 6, 1), b=lambda: nn.Conv1d(6, 5, 1))
def norm_positional_function(self, x):
    y = self.a(x)
    return self.b(y / (torch.norm(y, 2, 1, True) + 1)).mean(2)


@odd(a=conv(3, 6), f=linear(12, 5))
def var_unbiased(self, x):
    y = self.a(x)
    return self.f(torch.cat([y.mean((2, 3)), torch.var(y, (2, 3), False)], 1))


@odd(a=conv(3, 6), f=linear(6, 5))
def std_keepdim_positional(self, x):
    y = self.a(x)
    return self.f(torch.std(y, (2, 3), False, True).flatten(1))


@odd(a=conv(3, 8), n=lambda: nn.GroupNorm(2, 8), d=conv(8, 5))
def group_norm(self, x):
    return gap(self.d(self.n(self.a(x)).relu()))


@odd(a=conv(3, 8), n=lambda: nn.GroupNorm(1, 8), d=conv(8, 5))
def group_norm1(self, x):
    return gap(self.d(self.n(self.a(x)).relu()))


@odd(a=conv(3, 8), n=lambda: nn.GroupNorm(8, 8), d=conv(8, 5))
def group_norm_instance(self, x):
    return gap(self.d(self.n(self.a(x)).relu()))


@odd(a=conv(3, 4), b=conv(3, 4), n=lambda: nn.GroupNorm(1, 8), d=conv(8, 5))
def group_norm_cat(self, x):
    return gap(self.d(self.n(torch.cat([self.a(x), self.b(x)], 1)).relu()))


@odd(a=conv(3, 4), n=lambda: nn.GroupNorm(1, 7), d=conv(7, 5))
def group_norm_cat_input(self, x):
    return gap(self.d(self.n(torch.cat([self.a(x), x], 1)).relu()))


@odd((2, 7), a=linear(7, 8), n=lambda: nn.LayerNorm(8), d=linear(8, 5))
def layer_norm(self, x):
    return self.d(self.n(self.a(x)).relu())


@odd((2, 7), a=linear(7, 4), b=linear(7, 4), n=lambda: nn.LayerNorm(8), d=linear(8, 5))
def layer_norm_cat(self, x):
    return self.d(self.n(torch.cat([self.a(x), self.b(x)], 1)).relu())


@odd((2, 7), a=linear(7, 8), d=linear(8, 5))
def layer_norm_function(self, x):
    y = self.a(x)
    return self.d(F.layer_norm(y, y.shape[1:]).relu())


@odd((2, 7), a=linear(7, 8), d=linear(8, 5), w=parameter(8), b=parameter(8))
def layer_norm_function_const(self, x):
    y = self.a(x)
    return self.d(F.layer_norm(y, (8,), self.w, self.b).relu())


@odd(a=conv(3, 8), n=lambda: nn.LayerNorm((8, 6, 6)), d=conv(8, 5), frozen=("n has positions in it",))
def layer_norm_chw(self, x):
    return gap(self.d(self.n(self.a(x)).relu()))


@odd(a=conv(3, 8), n=lambda: nn.LayerNorm(8), d=conv(8, 5))
def layer_norm_channels_last(self, x):
    return gap(self.d(self.n(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


@odd(
    (2, 3, 6),
    a=lambda: nn.Conv1d(3, 8, 1),
    n=lambda: nn.LayerNorm(6),
    d=lambda: nn.Conv1d(8, 5, 1),
    frozen=("n has positions in it",),
)
def layer_norm_over_length(self, x):
    return self.d(self.n(self.a(x)).relu()).mean(2)


@odd(a=conv(3, 8), n=lambda: nn.InstanceNorm2d(8, affine=True), d=conv(8, 5))
def instance_norm(self, x):
    return gap(self.d(self.n(self.a(x)).relu()))


@odd(
    (2, 3, 6),
    a=lambda: nn.Conv1d(3, 8, 1),
    n=lambda: nn.InstanceNorm1d(6, affine=True),
    d=lambda: nn.Conv1d(8, 5, 1),
    frozen=("n computes statistics over it",),
)
def instance_norm_over_channels(self, x):
    return self.d(self.n(self.a(x).transpose(1, 2)).transpose(1, 2)).mean(2)


@odd(
    (2, 3, 6),
    a=lambda: nn.Conv1d(3, 8, 1),
    n=lambda: nn.BatchNorm1d(6),
    d=lambda: nn.Conv1d(8, 5, 1),
    frozen=("n computes statistics over it",),
)
def batch_norm_over_channels(self, x):
    return self.d(self.n(self.a(x).transpose(1, 2)).transpose(1, 2)).mean(2)


@odd(a=conv(3, 8), n=lambda: nn.LocalResponseNorm(3), d=conv(8, 5), frozen=("n mixes neighbouring channels",))
def lrn(self, x):
    return gap(self.d(self.n(self.a(x))))


@odd(a=conv(3, 8), n=lambda: nn.PReLU(8), d=conv(8, 5))
def prelu(self, x):
    return gap(self.d(self.n(self.a(x))))


@odd(a=conv(3, 8), w=parameter(8), d=conv(8, 5))
def prelu_function(self, x):
    return gap(self.d(F.prelu(self.a(x), self.w)))


@odd(a=conv(3, 8), d=conv(8, 5), e=conv(8, 8))
def shared_twice(self, x):
    return gap(self.d(self.e(self.e(self.a(x)).relu()).relu()))


@odd(a=conv(3, 8), d=conv(8, 5), e=lambda: nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1)))
def shared_container(self, x):
    y = self.a(x)
    y = y + self.e(y)
    y = y + self.e(y.relu())
    return gap(self.d(y))


@odd(a=conv(3, 8), g=parameter(8, 1, 1), d=conv(8, 5))
def layer_scale(self, x):
    return gap(self.d(self.a(x) * self.g))


@odd(a=conv(3, 8), g=parameter(1, 8, 1, 1), d=conv(8, 5))
def layer_scale4(self, x):
    return gap(self.d(self.a(x) * self.g + self.g))


@odd(a=conv(3, 8), g=parameter(1), d=conv(8, 5))
def scalar_scale(self, x):
    return gap(self.d(self.a(x) * self.g))


@odd(
    a=conv(3, 8, 2, stride=2, padding=0),
    cls=parameter(1, 1, 8),
    pos=parameter(1, 10, 8),
    f=linear(8, 6),
    h=linear(6, 5),
    frozen=("add combines it with an axis that holds no channels", "getitem picks positions of it"),
)
def class_token(self, x):
    y = self.a(x).flatten(2).transpose(1, 2)
    y = torch.cat([self.cls.expand(y.shape[0], -1, -1), y], 1) + self.pos
    return self.h(self.f(y).relu()[:, 0])


@odd(w=parameter(8, 3, 3, 3), b=parameter(8), d=conv(8, 5), frozen=("kernel size",))
def functional_conv(self, x):
    return gap(self.d(F.conv2d(x, self.w, self.b, padding=1).relu()))


@odd((2, 6), w=parameter(8, 6), b=parameter(8), d=linear(8, 5))
def functional_linear(self, x):
    return self.d(F.linear(x, self.w, self.b).relu())


@odd(a=conv(3, 8), bn=norm(8), d=conv(8, 5))
def functional_bn(self, x):
    return gap(
        self.d(
            F.batch_norm(
                self.a(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.training
            )
        )
    )


def standardised(w):
    return (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, standardised(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class PrivatelyStandardised(nn.Conv2d):
    """Overrides what `nn.Conv2d` computes, but not its ``forward``."""

    def _conv_forward(self, x, w, b):
        return super()._conv_forward(x, standardised(w), b)


class StandardisedByBatchNorm(nn.Conv2d):
    """As timm does it, with every setting by its place."""

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(rows, None, None, None, None, True, 0.0, 0.5).reshape_as(self.weight)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


@odd(
    a=lambda: StandardisedByBatchNorm(3, 8, 3),
    b=lambda: StandardisedByBatchNorm(8, 8, 3, padding=1),
    d=conv(8, 5),
    frozen=("reshape merges it with another axis", "reshape_as reads its size"),
)
def weight_standardised_by_batch_norm(self, x):
    return gap(self.d(self.b(self.a(x).relu()).relu()))


@odd(
    a=lambda: Standardised(3, 8, 3),
    b=lambda: Standardised(8, 8, 3, padding=1),
    d=conv(8, 5),
    frozen=("kernel size",),
)
def weight_standardised(self, x):
    return gap(self.d(self.b(self.a(x).relu()).relu()))


@odd(
    a=lambda: PrivatelyStandardised(3, 8, 3),
    b=lambda: PrivatelyStandardised(8, 8, 3, padding=1),
    d=conv(8, 5),
    frozen=("kernel size",),
)
def weight_standardised_private(self, x):
    return gap(self.d(self.b(self.a(x).relu()).relu()))


@odd(IMAGE, IMAGE, a=conv(3, 8), b=conv(3, 8), d=conv(8, 5))
def two_inputs(self, x, y):
    return {"sum": gap(self.d(self.a(x) + self.b(y))), "other": (gap(self.d(self.a(y))),)}


@odd(named={"y": (2, 3, 6, 6)}, a=conv(3, 8), b=conv(3, 8), d=conv(8, 5))
def kwargs_input(self, x, *, y):
    return gap(self.d(self.a(x) + self.b(y)))


@odd(IMAGE, IMAGE, a=conv(3, 8), b=conv(3, 8), d=conv(8, 5))
def star_inputs(self, *xs):
    return gap(self.d(self.a(xs[0]) + self.b(xs[1])))


@odd(named={"y": (2, 3, 6, 6)}, a=conv(3, 8), b=conv(3, 8), d=conv(8, 5))
def star_kwargs(self, x, **kw):
    return gap(self.d(self.a(x) + self.b(kw["y"])))


class Halving(nn.Module):
    """Branches on its own flag, as users' DropPath does."""

    def forward(self, x):
        if self.training:
            return x * 0.5
        return x


class Shuffling(nn.Module):
    """Branches on its own flag, and computes with sizes."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        if self.training:
            x = x * 2
        return self.c(x).view(n, 2, c // 2, h, w).flatten(1, 2) * c**-0.5


@odd(a=conv(3, 8), b=conv(8, 8), d=conv(8, 5), p=Halving)
def modal_shared(self, x):
    y = self.a(x)
    y = y + self.p(self.b(y))
    y = y + self.p(self.b(y.relu()))
    return gap(self.d(y))


@odd(a=conv(3, 8), b=conv(8, 8), d=conv(8, 5), p=Halving)
def modal_two_widths(self, x):
    y = self.p(self.a(self.p(x)))
    y = y + self.p(self.b(y))
    return gap(self.p(self.d(y)))


@odd(a=conv(3, 8), d=conv(8, 5), p=Shuffling)
def modal_sizes(self, x):
    y = self.a(x)
    return gap(self.d(self.p(y).relu()))


@odd(a=conv(3, 8), d=conv(8, 5), p=Shuffling)
def modal_sizes_twice(self, x):
    y = self.a(x)
    return gap(self.d(self.p(self.p(y)).relu()))


@odd(a=conv(3, 8), b=conv(3, 8), d=conv(8, 5), modes=(False,))  # autograd cannot differentiate it
def inplace(self, x):
    y = self.a(x)
    y += self.b(x)
    y.add_(self.b(x)).relu_()
    F.relu(y, inplace=True)
    return gap(self.d(y.mul_(2)))


@odd(
    a=conv(3, 8),
    d=conv(8, 5),
    frozen=("mul_ changes it in place through a view", "relu_ changes it in place through a view"),
    modes=(False,),  # autograd cannot differentiate it
)
def inplace_view(self, x):
    y = self.a(x)
    y[:, :4].relu_()
    y[:, 2:6].mul_(3.0)
    return gap(self.d(y))


@odd(a=conv(3, 8), d=conv(8, 5), frozen=("relu_ changes it in place through a view",))
def inplace_view_step(self, x):
    y = self.a(x)
    y[:, ::2].relu_()
    return gap(self.d(y))


@odd(
    a=conv(3, 8),
    d=conv(8, 5),
    s=lambda: nn.ReLU(inplace=True),
    frozen=("s changes it in place through a view",),
    modes=(False,),  # autograd forbids to write into one of several views
)
def inplace_chunk(self, x):
    y = self.a(x)
    self.s(y.chunk(2, 1)[0])
    return gap(self.d(y))


@odd(a=conv(3, 8), d=conv(8, 5), e=conv(4, 5), frozen=("relu_ changes it in place through a view",))
def inplace_view_shuffle(self, x):
    y = self.a(x)
    n, c, h, w = y.shape
    z = y.view(n, 2, c // 2, h, w).transpose(1, 2)[:, :, 1]
    z.relu_()
    return gap(self.d(y) + self.e(z))


@odd(
    a=lambda: nn.Conv2d(3, 8, 3, padding=2, padding_mode="circular", dilation=2),
    b=lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, padding_mode="reflect"),
    d=conv(6, 5),
)
def padding_modes(self, x):
    return gap(self.d(self.b(self.a(x)).relu()))


@odd(
    (2, 3, 9),
    a=lambda: nn.Conv1d(3, 8, 3),
    bn=lambda: nn.BatchNorm1d(8),
    b=lambda: nn.Conv1d(8, 8, 3, groups=8),
    d=lambda: nn.Conv1d(8, 5, 1),
)
def one_d(self, x):
    return self.d(F.max_pool1d(self.b(self.bn(self.a(x))).relu(), 2)).mean(-1)


@odd(
    (2, 3, 5, 5, 5),
    a=lambda: nn.Conv3d(3, 8, 3),
    bn=lambda: nn.BatchNorm3d(8),
    b=lambda: nn.ConvTranspose3d(8, 6, 2),
    d=lambda: nn.Conv3d(6, 5, 1),
)
def three_d(self, x):
    return self.d(F.adaptive_avg_pool3d(self.b(self.bn(self.a(x))).relu(), 2)).mean((2, 3, 4))


@odd((3, 6, 6), a=conv(3, 8), b=conv(8, 6), d=conv(6, 5))
def unbatched(self, x):
    return self.d(self.b(self.a(x).relu()).relu()).mean((1, 2))


@odd((3, 6, 6), a=conv(3, 8), b=conv(8, 6), d=conv(6, 5), modes=(False,))
def unbatched_pool(self, x):
    return self.d(F.max_pool2d(self.b(self.a(F.avg_pool2d(x, 2)).relu()), 2).relu()).mean((1, 2))


@odd((1, 3, 6, 6), a=conv(3, 8), b=norm(8), f=linear(8 * 9, 5))
def batch_one(self, x):
    return self.f(F.max_pool2d(self.b(self.a(x)).relu(), 2).view(1, -1))


@odd((1, 3, 6, 6), a=conv(3, 8), f=linear(8, 5))
def squeeze_all(self, x):
    return self.f(F.adaptive_avg_pool2d(self.a(x), 1).squeeze())


@odd(a=conv(3, 2), f=linear(2, 5))
def squeeze_two(self, x):
    return self.f(F.adaptive_avg_pool2d(self.a(x), 1).squeeze())


@odd(a=conv(3, 2), f=linear(2, 5))
def squeeze_dims(self, x):
    return self.f(F.adaptive_avg_pool2d(self.a(x), 1).squeeze(-1).squeeze(-1))


@odd(a=conv(3, 1), f=linear(6, 5), frozen=("squeeze removes it",))
def squeeze_channel(self, x):
    return self.f(self.a(x).squeeze(1)).mean(1)


@odd(a=conv(3, 8), d=conv(8, 5))
def scale_by_size(self, x):
    y = self.a(x)
    return gap(self.d(y * y.shape[1] ** -0.5)) / y.size(1)


@odd(a=conv(3, 8), d=conv(8, 5))
def sum_over_count(self, x):
    y = self.a(x)
    return gap(self.d(y / y[0].numel()))


@odd(a=conv(3, 8), d=conv(4, 5), e=conv(4, 5))
def slice_by_size(self, x):
    y = self.a(x)
    c = y.shape[1] // 2
    return gap(self.d(y[:, :c]) + self.e(y[:, c:]))


@odd(a=conv(3, 8), b=conv(3, 8), d=conv(8, 5))
def view_as_shape(self, x):
    y = self.a(x)
    z = self.b(x).flatten(1)
    return gap(self.d(y + z.view(y.shape)))


@odd(a=conv(3, 8), b=conv(3, 8), d=conv(8, 5))
def view_as_other(self, x):
    y = self.a(x)
    z = self.b(x).flatten(1)
    return gap(self.d(y + z.view_as(y)))


@odd(a=conv(3, 8), d=conv(8, 5))
def chunk_batch(self, x):
    p, q = torch.cat([x, x]).chunk(2, 0)
    return gap(self.d(torch.cat([self.a(p), self.a(q)]).chunk(2, 0)[0].relu()))


@odd(a=conv(3, 8), d=conv(8, 5))
def chunk_space(self, x):
    p, q = self.a(x).chunk(2, 3)
    return gap(self.d(p.relu() + q))


@odd(
    a=conv(3, 8),
    d=conv(8, 5),
    ps=lambda: nn.ParameterList([nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(8, 1, 1))]),
    pd=lambda: nn.ParameterDict({"g": nn.Parameter(torch.randn(8, 1, 1))}),
)
def parameter_containers(self, x):
    return gap(self.d(self.a(x) * self.ps[0] + self.ps[1] * self.pd["g"]))


@odd(a=conv(3, 8), d=conv(8, 5), u=conv(3, 9))
def unused(self, x):
    return gap(self.d(self.a(x)))


@odd(a=conv(3, 8), b=conv(8, 8), d=conv(8, 5))
def feature_output(self, x):
    y = self.b(self.a(x).relu())
    return gap(self.d(y)), y


@odd(a=conv(3, 8), d=conv(8, 5), frozen=("add combines it with an axis that holds no channels",))
def arange_bias(self, x):
    y = self.a(x)
    return gap(self.d(y + torch.arange(y.shape[1]).view(1, -1, 1, 1)))


@odd(a=conv(3, 1), d=conv(1, 5))
def arange_bias_single(self, x):
    y = self.a(x)
    return gap(self.d(y + torch.arange(y.shape[1]).view(1, -1, 1, 1) + 1))


@odd(a=conv(3, 8), d=conv(8, 5))
def zeros_like_(self, x):
    y = self.a(x)
    return gap(self.d(torch.maximum(y, torch.zeros_like(y)) + torch.ones_like(y)))


@odd(a=conv(3, 8), d=conv(11, 5))
def cat_zeros(self, x):
    y = self.a(x)
    return gap(self.d(torch.cat([y, torch.zeros(x.shape[0], 3, 6, 6, dtype=torch.float64)], 1)))


@odd((2, 5, 3), a=linear(3, 8), d=linear(8, 5))
def cat_zeros_other_axis(self, x):
    y = self.a(x)
    return self.d(torch.cat([y, torch.zeros(x.shape[0], 2, 8, dtype=torch.float64)], 1)).mean(1)


@odd(
    (2, 6, 6, 8),
    p=linear(8, 8),
    a=lambda: ShiftedWindowAttention(8, [2, 2], [1, 1], 2),
    d=linear(8, 5),
    frozen=("_get_relative_position_bias holds positions in it",),
)
def windowed_attention_alone(self, x):
    """No stream ties what it writes to what it reads."""
    return self.d(self.a(self.p(x)).mean((1, 2)))


@odd(
    (2, 5, 8),
    a=lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    p=linear(8, 8),
    d=linear(8, 5),
)
def mha(self, x):
    y = self.p(x)
    return self.d(self.a(y, y, y)[0].mean(1))


@odd(
    (2, 5, 8),
    p=linear(8, 8),
    a=lambda: nn.LSTM(8, 6, batch_first=True),
    d=linear(6, 5),
)
def lstm(self, x):
    return self.d(self.a(self.p(x))[0][:, -1])


@odd(a=conv(3, 8), d=conv(8, 5))
def pad_space(self, x):
    return gap(self.d(F.pad(self.a(x), pad=(1, 1, 0, 2))))


@odd(
    a=conv(3, 4),
    b=conv(3, 8),
    d=conv(8, 5),
)
def pad_channels(self, x):
    return gap(self.d(F.pad(self.a(x), (0, 0, 0, 0, 2, 2)) + self.b(x)))


@odd(a=conv(3, 8), d=conv(8, 5))
def kw_spellings(self, x):
    y = torch.flatten(input=self.a(x), start_dim=2)
    y = y.permute(dims=(0, 2, 1)).transpose(dim0=1, dim1=2)
    y = torch.unsqueeze(y, dim=-1)
    y = torch.cat(tensors=[y, y], axis=2)
    return gap(self.d(y))


@odd(a=conv(3, 8), d=conv(8, 5))
def axis_spelling(self, x):
    return self.d(self.a(x)).mean(axis=(2, 3))


@odd(a=conv(3, 8), d=conv(8, 5))
def unflatten_const(self, x):
    return gap(self.d(self.a(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)))


@odd(
    a=conv(3, 8),
    d=conv(8, 5),
    w=parameter(2, 4, 1, 1),
    frozen=("mul shares it among heads, or other parts of an axis",),
)
def unflatten_param(self, x):
    return gap(self.d((self.a(x).unflatten(1, (2, 4)) * self.w).flatten(1, 2)))


@odd(
    a=conv(3, 8),
    d=conv(8, 5),
    u=lambda: nn.Unflatten(1, (2, 4)),
    w=parameter(2, 4, 1, 1),
    frozen=("mul shares it among heads, or other parts of an axis",),
)
def unflatten_module(self, x):
    return gap(self.d((self.u(self.a(x)) * self.w).flatten(1, 2)))


@odd(a=conv(3, 8), d=conv(4, 5))
def grouped_mean(self, x):
    return gap(self.d(self.a(x).view(x.shape[0], 2, 4, 6, 6).mean(1)))


@odd(a=conv(3, 8), d=conv(4, 5))
def maxout(self, x):
    return gap(self.d(self.a(x).view(x.shape[0], 4, 2, 6, 6).amax(2)))


@odd((2, 6), w=parameter(8, 6), d=linear(8, 5), e=linear(6, 5), frozen=("getitem picks positions of it",))
def weight_as_value(self, x):
    return self.d(F.linear(x, self.w).relu()) + self.e(x * self.w[0])


@odd((2, 6), a=linear(6, 8), d=linear(8, 4), e=linear(8, 5), f=linear(4, 5), frozen=("getitem picks positions of it",))
def consumer_as_value(self, x):
    y = self.a(x)
    return self.f(self.d(y)) + self.e(y * self.d.weight[0])


@odd((2, 7), emb=lambda: nn.Linear(7, 6, bias=False), d=linear(6, 6))
def autoencoder(self, x):
    return F.linear(self.d(self.emb(x).relu()).relu(), self.emb.weight.t())


@odd(a=conv(3, 8), b=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), d=conv(8, 5))
def weight_norm(self, x):
    return gap(self.d(self.b(self.a(x))))


@odd(
    a=conv(3, 8),
    b=lambda: nn.utils.spectral_norm(nn.Conv2d(8, 8, 3)),
    d=conv(8, 5),
    modes=(False,),
    frozen=("b has hooks",),
)
def spectral_norm_old(self, x):
    return gap(self.d(self.b(self.a(x))))


@odd(a=conv(3, 8), b=lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), d=conv(8, 5), modes=(False,))
def spectral_norm_new(self, x):
    return gap(self.d(self.b(self.a(x))))


def hooked():
    layer = nn.Conv2d(3, 8, 3)
    layer.register_forward_hook(lambda module, args, output: output * torch.arange(8.0).view(-1, 1, 1))
    return layer


@odd(a=hooked, d=conv(8, 5))
def hook_changes_output(self, x):
    return gap(self.d(self.a(x)))


@odd(a=conv(3, 4), d=lambda: nn.Conv2d(1, 2, 3), e=conv(8, 5), frozen=("view merges it with another axis",))
def per_channel_conv(self, x):
    y = self.a(x)
    n, c, h, w = y.shape
    y = self.d(y.view(n * c, 1, h, w)).view(n, 2 * c, h - 2, w - 2)
    return gap(self.e(y))


@odd(a=conv(3, 4), b=conv(3, 4), d=conv(4, 5))
def narrow(self, x):
    return gap(self.d(self.a(x).narrow(2, 1, 3) + torch.narrow(self.b(x), 2, 0, 3)))


@odd(a=conv(3, 4), b=conv(3, 6), d=conv(4, 5), e=conv(6, 5))
def where_bool(self, x):
    y = self.a(x)
    z = self.b(x)
    return gap(self.d(torch.where(y > 0, y, torch.zeros_like(y))) + self.e(z.clamp(min=0) * (z < 1)))


@odd(a=conv(3, 4), d=conv(4, 5), const=lambda: torch.randn(8))
def buffer_unused(self, x):
    return gap(self.d(self.a(x)))


@odd(a=conv(3, 4), d=conv(4, 5), sh=lambda: torch.randn(1, 4, 1, 1))
def buffer_shift(self, x):
    return gap(self.d(self.a(x) + self.sh))


@odd(a=conv(3, 4), b=conv(3, 6), c=conv(3, 4), d=conv(10, 5), e=conv(10, 4))
def dense_block(self, x):
    y = self.a(x)
    z = torch.cat([y, self.b(x)], 1)
    w = self.e(z.relu())
    return gap(self.d(torch.cat((w + y, z[:, 4:]), 1)))


@odd(a=conv(3, 6), d=conv(6, 5), b=conv(6, 6, groups=6), bn=norm(6))
def depthwise_res(self, x):
    y = self.a(x)
    return gap(self.d(y + self.bn(self.b(y)).relu()))


@odd(a=conv(3, 6), d=conv(6, 5))
def unbind_batch(self, x):
    p, q = self.a(torch.stack([x, x * 2], 1).flatten(0, 1)).unflatten(0, (2, 2)).unbind(1)
    return gap(self.d(p + q))


@odd(a=conv(3, 6), d=conv(2, 5))
def unbind_factor(self, x):
    p, q, r = self.a(x).view(x.shape[0], 3, 2, 6, 6).unbind(1)
    return gap(self.d(p * q + r))


@odd(a=conv(3, 6), b=conv(6, 6), d=conv(6, 5))
def size_ops(self, x):
    y = self.a(x)
    n, c, h, w = y.size()
    y = F.interpolate(y, size=(h * 2, w * 2))
    y = y.reshape(n, c, -1).reshape(n, c, 2 * h, 2 * w)
    return gap(self.d(self.b(y)))


@odd(
    a=conv(3, 6),
    d=conv(6, 5),
    dr=lambda: nn.Dropout2d(0.0),
    ups=lambda: nn.Upsample(scale_factor=2),
    z=lambda: nn.ZeroPad2d(1),
    u=lambda: nn.UpsamplingNearest2d(scale_factor=2),
    lp=lambda: nn.LPPool2d(2, 2),
)
def misc_modules(self, x):
    return gap(self.d(self.lp(self.u(self.z(self.ups(self.dr(self.a(x))))))))


@odd(a=conv(3, 6), d=conv(6, 5))
def torch_pools(self, x):
    return gap(self.d(F.lp_pool2d(torch.max_pool2d(self.a(x), 2) + F.avg_pool2d(self.a(x), 2), 2, 2)))


@odd(
    a=conv(3, 6),
    d=conv(6, 5),
    mp=lambda: nn.MaxPool2d(2, return_indices=True),
    up=lambda: nn.MaxUnpool2d(2),
    frozen=("up has no rule",),
)
def unpool(self, x):
    y, i = self.mp(self.a(x))
    return gap(self.d(self.up(y, i)))


@odd(a=conv(3, 6), wt=parameter(6, 4, 2, 2), d=conv(4, 5), frozen=("kernel size",))
def functional_transposed(self, x):
    return gap(self.d(F.conv_transpose2d(self.a(x), self.wt, stride=2)))


@odd(a=conv(3, 6), d=conv(54, 5, 1))
def unfold(self, x):
    return gap(self.d(F.unfold(self.a(x), 3, padding=1).view(x.shape[0], 54, 6, 6)))


@odd(a=conv(3, 8), d=conv(8, 5))
def movedim(self, x):
    return gap(self.d(self.a(x).movedim(1, -1).movedim(-1, 1)))


@odd(a=conv(3, 1), b=conv(1, 4), d=conv(4, 5))
def narrow_one(self, x):
    return gap(self.d(self.b(self.a(x).relu()).relu()))


@odd(a=conv(3, 2), b=conv(2, 2, groups=2), d=conv(2, 5))
def dw_to_one(self, x):
    return gap(self.d(self.b(self.a(x).relu()).relu()))


@odd(a=conv(3, 1), s=parameter(1, 1, 1), f=linear(1, 5))
def one_everything(self, x):
    return self.f((F.adaptive_avg_pool2d(self.a(x), 1) * self.s).flatten(1))


@odd(a=conv(3, 4), b=conv(3, 4), d=conv(8, 5), n=lambda: nn.BatchNorm1d(8))
def list_ops(self, x):
    ys = [m(x) for m in (self.a, self.b)]
    ys.append(ys[0] * 2)
    return gap(self.d(torch.cat(ys[1:], dim=1)))


def reasons(traced):
    """Why channels are left alone, but for the network's ends and for layers that read what holds no channels."""
    found = {r for g in surgery.dimension_groups(traced) for r in g.reason.split("; ") if r}
    return {r for r in found - ENDS if "relates it to an axis that holds no channels" not in r}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in MODELS])
def case(request):
    model = MODELS[request.param]
    net, args, kwargs = model.build()
    traced = surgery.trace(net, args, kwargs=kwargs)

    def same(a, b):
        for train in model.modes:
            check = surgery.verify(a, b, args, kwargs=kwargs, train=train)
            assert check.max_rel <= EXACT, (train, check)

    return model, net, traced, same


def hold(traced, same):
    """The three oracles."""
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    same(surgery.reindex(traced, {g.name: g.permutation(seed=1) for g in groups}), traced)
    for width in (1.5, 2.0):
        same(surgery.widen(traced, width), traced)
    slim = surgery.slim(traced, 0.5)
    same(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5)))


@pytest.mark.filterwarnings("ignore")
def test_odd_models_are_edited_exactly(case):
    _, net, traced, same = case
    same(traced, net)
    hold(traced, same)


@pytest.mark.filterwarnings("ignore")
def test_edited_odd_models_can_be_edited_again(case):
    _, _, traced, same = case
    hold(surgery.slim(traced, 0.5), same)
    hold(surgery.widen(traced, 1.5, seed=2), same)


@pytest.mark.filterwarnings("ignore")
def test_each_group_is_edited_exactly_alone_or_refused(case):
    """What all groups do together, some layers can express that cannot where one of them does it alone."""
    _, _, traced, same = case
    for group in surgery.dimension_groups(traced):
        if group.editable:
            rate = {group.name: 0.5}
            with contextlib.suppress(surgery.EditError):  # in one line; what is made is right
                slim = surgery.slim(traced, rate)
                same(slim, surgery.masked(traced, surgery.split_masks(traced, rate)))
            with contextlib.suppress(surgery.EditError):
                same(surgery.reindex(traced, {group.name: [*range(group.units)] * 2}), traced)


@pytest.mark.filterwarnings("ignore")
def test_odd_models_leave_channels_alone_for_known_reasons_only(case):
    model, _, traced, _ = case
    assert reasons(traced) == set(model.frozen)


@pytest.mark.filterwarnings("ignore")
def test_odd_models_are_deepened_behind_their_layers_or_refuse(case):
    model, _, traced, _ = case
    layers = {g.members[0].layer for g in surgery.dimension_groups(traced) if g.editable}
    _, args, kwargs = model.build()
    for layer in sorted(layers & {name for name, _ in traced.named_modules()}):
        try:
            deep = surgery.deepen(traced, [layer])
        except surgery.EditError:
            continue
        assert surgery.verify(deep, traced, args, kwargs=kwargs).max_rel <= EXACT
        assert surgery.verify(surgery.widen(deep, 1.5), traced, args, kwargs=kwargs).max_rel <= EXACT


@pytest.mark.parametrize("name", ["chunk_batch", "chunk_space", "shuffle_view", "size_ops", "se_view", "flatten_nhwc"])
@pytest.mark.parametrize("batch", [1, 3])
def test_edited_models_run_at_other_batch_sizes(name, batch):
    net, args, _ = MODELS[name].build()
    traced = surgery.trace(net.eval(), args)
    x = torch.randn(batch, *args[0].shape[1:], dtype=torch.float64)
    for edited in (surgery.widen(traced, 1.5), surgery.widen(traced, 2.0)):
        assert surgery.verify(edited, net, x).max_rel <= EXACT


@pytest.mark.parametrize("name", ["size_ops", "shuffle_view", "chunk_space", "scale_by_size"])
def test_edited_models_run_at_other_image_sizes(name):
    net, args, _ = MODELS[name].build()
    wide = surgery.widen(surgery.trace(net.eval(), args), 1.5)
    assert surgery.verify(wide, net, torch.randn(2, 3, 8, 4, dtype=torch.float64)).max_rel <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_memory_format_and_flags_survive(dtype):
    net, args, _ = MODELS["depthwise_res"].build()
    net = net.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    traced = surgery.trace(net, args[0].to(dtype))
    for edited in (traced, surgery.widen(traced, 2.0), surgery.slim(traced, 0.5)):
        assert {p.dtype for p in edited.parameters()} == {dtype}
        assert not any(p.requires_grad for p in edited.parameters())
        assert edited.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert surgery.verify(surgery.widen(traced, 2.0), net, args[0].to(dtype)).ok


def test_a_network_with_selections_loads_in_a_fresh_process(tmp_path):
    """Positions that selections read are rebuilt from the recipe, not stored."""
    program = """
import sys, torch, surgery
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 5, 1)
    def forward(self, x):
        y = self.a(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)
        return self.b(torch.cat([y, y.flip(1)], 1)) * y.shape[1]
x = torch.linspace(-1, 1, 96).view(2, 3, 4, 4)
where = sys.argv[1]
if len(sys.argv) > 2:
    torch.manual_seed(0)
    net = surgery.slim(surgery.reindex(surgery.trace(Net(), x), {"a": [5, 1, 1, 0, 7, 2, 3]}), 0.6)
    surgery.save(net, where)
else:
    net = surgery.load(where, Net())
print([f"{v:.9e}" for v in net(x).flatten().tolist()])
"""
    where = str(tmp_path / "saved")
    outputs = [
        subprocess.run([sys.executable, "-c", program, where, *more], capture_output=True, text=True, check=True).stdout
        for more in (["save"], [])
    ]
    assert outputs[0] == outputs[1] != ""


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpointed_layer_is_edited_like_any_other(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=reentrant))

    net, x = Checkpointed().double(), torch.randn(2, 4, dtype=torch.float64)
    wide = surgery.widen(surgery.trace(net, x), 2.0)
    assert wide.a.out_features == 12
    assert surgery.verify(wide, net, x).max_rel <= EXACT


def test_a_tensor_that_is_a_mere_attribute_moves_and_changes_with_the_model():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.arange(1.0, 7.0)

        def forward(self, x):
            return x * self.scale

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.inner, self.b = nn.Linear(4, 6), Inner(), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.inner(self.a(x)))

    net, x = Outer(), torch.randn(2, 4)
    traced = surgery.trace(net, x)
    assert list(traced.state_dict()) == list(net.state_dict())
    for edited in (copy.deepcopy(traced), surgery.widen(traced, 1.5)):
        assert surgery.verify(edited, net, x).ok
    assert surgery.widen(traced, 1.5).inner.scale.shape == (9,)


def test_hooks_of_the_model_itself_still_run():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(2, 4)
    net.register_forward_hook(lambda module, args, output: output * 2)
    traced = surgery.trace(net, x)
    for edited in (traced, surgery.widen(traced, 2.0)):
        assert surgery.verify(edited, net, x).ok


def test_a_model_with_a_shape_that_depends_on_the_data_is_traced_in_parts():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 6)

        def forward(self, x):
            y = self.a(x)
            return y[y > 0].sum()

    (group,) = (g for g in surgery.dimension_groups(surgery.trace(Masked(), torch.randn(2, 4))) if g.name == "a")
    assert not group.editable


def test_a_network_of_tokens_is_deepened_by_linear_layers():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), torch.randn(2, 5, 4).double()
    deep = surgery.deepen(surgery.trace(net, x), ["0"])
    assert surgery.verify(deep, net, x).max_rel <= EXACT
    added = [m for n, m in deep.named_modules() if "identity" in n and isinstance(m, (nn.Linear, nn.Conv1d))]
    assert [type(m) for m in added] == [nn.Linear]
    assert added[0].in_features == 6
