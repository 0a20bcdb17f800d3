"""Attention as people write it by hand: heads are found, and chosen as a whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery

EXACT = 1e-10


class Packed(nn.Module):
    """One projection to queries, keys and values; optionally fused, with norms of each head, or rotary positions."""

    def __init__(self, width: int, heads: int, fused: bool = False, norms: bool = False, rotary: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.fused, self.rotary = heads, width // heads, fused, rotary
        self.scale = self.size**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.size) if norms else nn.Identity() for _ in range(2))
        self.register_buffer("cos", torch.randn(7, self.size))
        self.register_buffer("sin", torch.randn(7, self.size))

    def rotated(self, x):
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = self.rotated(q), self.rotated(k)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Separate(nn.Module):
    """Three projections; heads split off and merged by view."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) / self.size**0.5, dim=-1)
        mixed = torch.matmul(weights, v).transpose(1, 2).contiguous()
        return self.o(mixed.view((*mixed.size()[:-2], c)))


class Channels(nn.Module):
    """Attention between the channels of each head (XCiT): what is normalised over are channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        q, k = F.normalize(qkv[0], dim=-1), F.normalize(qkv[1], dim=-1)
        weights = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1)
        return self.proj((weights @ qkv[2]).permute(0, 3, 1, 2).reshape(b, n, c))


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Linear(5, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention, self.head = attention, nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.last(x + self.attention(self.norm(x))).mean(1))


CASES = {
    "by hand": (lambda: Packed(12, 3), "attention.qkv", 3),
    "fused": (lambda: Packed(12, 3, fused=True), "attention.qkv", 3),
    "norms of each head": (lambda: Packed(12, 3, norms=True), "attention.qkv", 3),
    "rotary": (lambda: Packed(12, 3, fused=True, rotary=True), "attention.qkv", 3),
    "rotary by hand": (lambda: Packed(12, 2, rotary=True), "attention.qkv", 2),
    "separate": (lambda: Separate(12, 4), "attention.q", 4),
    "between channels": (lambda: Channels(12, 3), "attention.qkv", 3),
}


@pytest.fixture(params=CASES)
def case(request):
    make, name, heads = CASES[request.param]
    torch.manual_seed(0)
    net = Net(make()).double()
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.3, 1.5)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    return surgery.trace(net, x), x, name, heads


def test_heads_are_units(case):
    traced, _, name, heads = case
    group = next(g for g in surgery.dimension_groups(traced) if g.name == name)
    assert group.editable
    assert group.units == heads


def test_heads_can_be_moved_copied_and_cut(case):
    traced, x, name, heads = case
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    index = {g.name: g.permutation(1) for g in groups}
    assert surgery.verify(surgery.reindex(traced, index), traced, x).max_rel <= EXACT
    more = surgery.reindex(traced, {name: [*range(heads), 0, heads - 1, 0]})
    assert surgery.verify(more, traced, x).max_rel <= EXACT
    for width in (1.5, 2.0):
        assert surgery.verify(surgery.widen(traced, width), traced, x).max_rel <= EXACT
    slim = surgery.slim(traced, 0.5)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.verify(slim, masked, x).max_rel <= EXACT


def test_an_edited_attention_takes_any_batch(case):
    traced, _, _, _ = case
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    for edited in (surgery.slim(traced, 0.5), surgery.widen(traced, 2.0)):
        assert (edited(x)[1:2] - edited(x[1:2])).abs().max() <= EXACT
