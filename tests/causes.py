"""Small models of what once left channels alone, one for each cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d


class Net(nn.Module):
    """A ``forward`` and the layers, parameters and buffers that it reads."""

    def __init__(self, run: Callable[..., torch.Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def over_channels(function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    """A net whose 8 channels, which are nowhere 0 when they are switched off, go through ``function``."""

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = function(net, net.write(x).tanh() + 0.3)
        return net.head(net.read(y).tanh().mean((2, 3)))

    return lambda: Net(
        run, write=nn.Conv2d(3, 8, 3), read=nn.Conv2d(8, 6, 1), head=nn.Linear(6, 5),
        scale=weight(8), gate=nn.Conv2d(2, 1, 3, padding=1), taps=nn.Conv1d(2, 1, 1),
    )  # fmt: skip


def _rms(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.permute(0, 2, 3, 1)
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * net.scale).permute(0, 3, 1, 2)


def _layer_norm(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-5) * net.scale[:, None, None]


def _spread(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)


def _var_mean(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-3)


def _response_norm(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    length = x.norm(p=2, dim=(2, 3), keepdim=True)
    return x + net.scale.view(1, -1, 1, 1) * x * length / (length.mean(1, keepdim=True) + 1e-6)


def _spatial_gate(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * net.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


def _extremes(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x.max(1, keepdim=True)[0] + x.min(1, keepdim=True).values)


def _lengths(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    a = torch.linalg.vector_norm(x, dim=1, keepdim=True) + x.norm(1, 1, True)
    return x / (a + torch.linalg.norm(x, 3, 1, True)) * x.abs().sum(1, keepdim=True).sigmoid()


def _means_of_all(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * x.mean((1, 2), keepdim=True).sigmoid() * (x.sum((1, 2, 3), keepdim=True) / x.shape[1])


def _cast_like(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * net.scale.to(x)[:, None, None].type_as(x.mean((0, 2, 3)))


def _stacked_taps(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate = net.taps(torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)).squeeze(1).sigmoid()
    return x * gate[:, :, None, None]


def _attention(kv: int, how: str, rotary: str = "", heads: int = 4, size: int = 6) -> Callable[[], nn.Module]:
    """``kv`` heads of keys and values for ``heads`` of queries, spelled as ``how`` and ``rotary`` say."""

    def turned(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        half = size // 2
        if rotary == "halves":
            a, b = x.chunk(2, -1)
            return x * net.cos + torch.cat([-b, a], -1) * net.sin
        if rotary == "pairs":
            return x * net.cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * net.sin
        a, b, cos, sin = x[..., :half], x[..., half:], net.cos[:, :half], net.sin[:, :half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1) if rotary else x

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        y = net.embed(x)
        q = turned(net, net.q(y).view(batch, tokens, heads, size).transpose(1, 2))
        k = turned(net, net.k(y).view(batch, tokens, kv, size).transpose(1, 2))
        v = net.v(y).view(batch, tokens, kv, size).transpose(1, 2)
        shared = heads // kv
        if how == "expand":
            k, v = (t[:, :, None].expand(batch, kv, shared, tokens, size) for t in (k, v))
            k, v = (t.reshape(batch, heads, tokens, size) for t in (k, v))
        elif how == "interleave":
            k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
        if how == "grouped":
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif how == "broadcast":
            mixed = (q @ k.transpose(-1, -2) * size**-0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return net.head((y + net.out(mixed.transpose(1, 2).reshape(batch, tokens, heads * size))).tanh())

    def make() -> nn.Module:
        angle = torch.rand(9, size // 2).repeat(1, 2)
        return Net(
            run, embed=nn.Linear(7, 10), q=nn.Linear(10, heads * size), k=nn.Linear(10, kv * size),
            v=nn.Linear(10, kv * size), out=nn.Linear(heads * size, 10), head=nn.Linear(10, 5),
            cos=angle.cos(), sin=angle.sin(),
        )  # fmt: skip

    return make


def _packed(heads: int, how: str, size: int = 8) -> Callable[[], nn.Module]:
    """Keys and values from one projection, taken apart as ``how`` says."""

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        y = net.embed(x)
        q = net.q(y).reshape(batch, tokens, heads, size).permute(0, 2, 1, 3)
        kv = net.kv(y).reshape(batch, -1, 2, heads, size).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0) if how == "unbind" else (kv[0], kv[1]) if how == "index" else kv.chunk(2, 0)
        k, v = (t.squeeze(0) if how == "chunk" else t for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return net.head((y + net.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))).tanh())

    width = heads * size
    return lambda: Net(
        run, embed=nn.Linear(7, 10), q=nn.Linear(10, width), kv=nn.Linear(10, 2 * width),
        out=nn.Linear(width, 10), head=nn.Linear(10, 5),
    )  # fmt: skip


def _merge_patches(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.embed(x.permute(0, 2, 3, 1)) + net.positions
    batch, high, wide, channels = y.shape
    y = y.reshape(batch, high // 2, 2, wide // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return net.head(net.reduce(net.norm(y)).tanh().mean((1, 2)))


def _generate(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.write(x)
    y = net.unflatten(y) if hasattr(net, "unflatten") else y.view(-1, 6, 4, 4)
    return net.head(net.up(net.norm(y).sigmoid()).tanh().mean((2, 3)))


def _standardised(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kernel = net.conv.weight
    kernel = F.batch_norm(
        kernel.reshape(1, kernel.shape[0], -1), None, None, (net.gain * 0.3).view(-1), training=True, momentum=0.0
    ).reshape_as(kernel)
    y = F.conv2d(net.write(x).sigmoid(), kernel, net.conv.bias, 1, 1)
    return net.head(y.tanh().mean((2, 3)))


def _standardised_by_hand(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kernel = net.conv.weight
    mean, variance = kernel.mean((1, 2, 3), keepdim=True), kernel.var((1, 2, 3), keepdim=True)
    kernel = (kernel - mean) / (variance + 1e-4).sqrt() * net.gain
    y = F.conv2d(net.write(x).sigmoid(), kernel, net.conv.bias, 1, 1)
    return net.head(y.tanh().mean((2, 3)))


def _deformed(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.write(x).sigmoid()
    y = deform_conv2d(y, net.offsets(y), net.conv.weight, net.conv.bias, padding=1)
    return net.head(y.tanh().mean((2, 3)))


def _padded_channels(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = F.pad(net.write(x).sigmoid(), (0, 0, 0, 0, 2, 3))
    return net.head((net.conv(x) + y).tanh().mean((2, 3)))


def _other_keys(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.embed(x)
    return net.head(y + net.attention(y, net.keys(x), net.values(x), need_weights=False)[0])


def _cross(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(
        _other_keys, embed=nn.Linear(7, 12), keys=nn.Linear(7, options.get("kdim", 12)),
        values=nn.Linear(7, options.get("vdim", 12)), head=nn.Linear(12, 5),
        attention=nn.MultiheadAttention(12, 3, batch_first=True, **options),
    )  # fmt: skip


def _picked_token(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.embed(x).tanh()
    picked = y[torch.arange(x.shape[0], device=x.device), x[..., 0].argmax(-1)]
    return net.head((net.out(picked) + y.mean(1)).tanh())


def _gathered_tokens(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = net.embed(x).tanh()
    at = x[..., 0].argsort(1)[:, :4]
    picked = y.gather(1, at[..., None].expand(-1, -1, y.shape[-1]))
    return net.head((net.out(picked).mean(1) + y.mean(1)).tanh())


_TOKENS, _IMAGE = (2, 9, 7), (2, 3, 6, 6)

CAUSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    **{
        function.__name__.strip("_"): (over_channels(function), _IMAGE, "write")
        for function in (
            _rms, _layer_norm, _spread, _var_mean, _response_norm, _spatial_gate, _extremes, _lengths, _means_of_all,
            _stacked_taps, _cast_like,
        )
    },
    **{
        f"grouped queries: {how}": (_attention(2, how), _TOKENS, "embed q")
        for how in ("expand", "interleave", "grouped")
    },
    "one head of keys": (_attention(1, "broadcast"), _TOKENS, "embed q"),
    **{f"rotary: {how}": (_attention(4, "", how), _TOKENS, "embed q") for how in ("halves", "pairs", "slices")},
    **{f"packed: {how}": (_packed(1, how), _TOKENS, "embed q") for how in ("unbind", "index", "chunk")},
    "packed heads": (_packed(3, "unbind"), _TOKENS, "embed q"),
    "patch merging": (
        lambda: Net(_merge_patches, embed=nn.Linear(3, 8), positions=weight(1, 6, 6, 8), norm=nn.LayerNorm(32),
                    reduce=nn.Linear(32, 16), head=nn.Linear(16, 5)),
        _IMAGE, "embed reduce",
    ),
    "generator": (
        lambda: Net(_generate, write=nn.Linear(7, 96), norm=nn.BatchNorm2d(6), up=nn.ConvTranspose2d(6, 8, 4, 2, 1),
                    head=nn.Linear(8, 5)),
        (2, 7), "write up",
    ),
    "generator, unflattened": (
        lambda: Net(_generate, write=nn.Linear(7, 96), norm=nn.BatchNorm2d(6), up=nn.ConvTranspose2d(6, 8, 4, 2, 1),
                    unflatten=nn.Unflatten(1, (6, 4, 4)), head=nn.Linear(8, 5)),
        (2, 7), "write up",
    ),
    **{
        name: (
            lambda run=run: Net(run, write=nn.Conv2d(3, 6, 3), conv=nn.Conv2d(6, 8, 3), gain=weight(8, 1, 1, 1),
                                head=nn.Linear(8, 5)),
            _IMAGE, "write conv",
        )
        for name, run in (("standardised", _standardised), ("standardised by hand", _standardised_by_hand))
    },
    "deformed": (
        lambda: Net(_deformed, write=nn.Conv2d(3, 6, 3), offsets=nn.Conv2d(6, 18, 3, padding=1),
                    conv=nn.Conv2d(6, 8, 3), head=nn.Linear(8, 5)),
        _IMAGE, "write conv",
    ),
    "padded channels": (
        lambda: Net(_padded_channels, write=nn.Conv2d(3, 6, 3), conv=nn.Conv2d(3, 11, 3), head=nn.Linear(11, 5)),
        _IMAGE, "write",
    ),
    "keys of another width": (_cross(kdim=10, vdim=11), _TOKENS, "embed keys values attention"),
    "picked token": (
        lambda: Net(_picked_token, embed=nn.Linear(7, 8), out=nn.Linear(8, 8), head=nn.Linear(8, 5)), _TOKENS, "embed",
    ),
    "gathered tokens": (
        lambda: Net(_gathered_tokens, embed=nn.Linear(7, 8), out=nn.Linear(8, 8), head=nn.Linear(8, 5)),
        _TOKENS, "embed",
    ),
    "learned keys": (_cross(add_bias_kv=True, add_zero_attn=True), _TOKENS, "embed attention"),
}  # fmt: skip
"""What used to leave channels alone, each with the shape of its input and the groups that are edited."""
