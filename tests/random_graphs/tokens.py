"""Steps of random networks on tokens: a map as (batch, positions, channels). Attention, transformers, bare weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.random_graphs.planning import SIZE, Planning


class TokenSteps(Planning):
    """What `RandomNet` can do with tokens."""

    def plan_attention(self, name, a, b, m, n):
        """A residual self-attention, its heads spelled in one of six ways."""
        width, heads, size = self.widths[a], 1 + n % 3, 1 + n // 3 % 3
        if m % len(ATTENTIONS) == ATTENTIONS.index("layer"):
            a = self.multiple(name, a, heads)
            self.add_module(f"{name}_layer", nn.MultiheadAttention(self.widths[a], heads, batch_first=True))
        else:
            self.add_module(f"{name}_qkv", nn.Linear(width, 3 * heads * size))
            self.add_module(f"{name}_out", nn.Linear(heads * size, width))
            if n % 2:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(heads, 1, SIZE * SIZE)))
        self.call("attention", name, [a], [self.widths[a]], (ATTENTIONS[m % len(ATTENTIONS)], heads, size))

    def plan_stream(self, name, a, b, m, n):
        """A residual block of a transformer: normalised, two layers, added."""
        width, hidden = self.widths[a], 1 + n % 5
        norm = nn.LayerNorm(width, elementwise_affine=m % 3 != 0)
        for parameter in norm.parameters():
            parameter.data.uniform_(0.5, 1.5)
        block = nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.add_module(name, block)
        self.call("stream", name, [a], [width], m % 2)

    def plan_bare(self, name, a, b, m, n):
        """A weight that is no layer's."""
        width = 1 + n % 6
        shape = (self.widths[a], width) if m % 4 == 0 else (width, self.widths[a])
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.call("bare", name, [a], [width], m % 4)

    def plan_tied(self, name, a, b, m, n):
        """Two layers with one weight, and what reads it the other way round."""
        width = self.widths[a]
        first = nn.Linear(width, width if m % 3 else 1 + n % 6)
        self.add_module(name, first)
        if m % 3:
            second = nn.Linear(width, width)
            second.weight = first.weight
            self.add_module(f"{name}_second", second)
        self.call("tied", name, [a], [width], m % 3 > 0)

    # ---- running

    def run_attention(self, name, maps, how):
        (form, heads, size), x = how, maps[0].flatten(2).transpose(1, 2)
        if form == "layer":
            y = self.get_submodule(f"{name}_layer")(x, x, x, need_weights=False)[0]
        else:
            bias = getattr(self, f"{name}_bias", None)
            y = attend(form, self.get_submodule(f"{name}_qkv")(x), heads, size, bias)
            y = self.get_submodule(f"{name}_out")(y)
        return (x + y).transpose(1, 2).unflatten(2, (SIZE, SIZE))

    def run_stream(self, name, maps, form):
        block = self.get_submodule(name)
        if form:
            return maps[0] + block(maps[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = maps[0].flatten(2).transpose(1, 2)
        return (x + block(x)).transpose(1, 2).reshape(maps[0].shape)

    def run_bare(self, name, maps, form):
        x, w = maps[0].permute(0, 2, 3, 1), getattr(self, name)
        y = [lambda: x @ w, lambda: F.linear(x, w), lambda: x @ w.t(), lambda: torch.einsum("nhwc,dc->nhwd", x, w)]
        return y[form]().permute(0, 3, 1, 2)

    def run_tied(self, name, maps, twice):
        x = maps[0].permute(0, 2, 3, 1)
        first = self.get_submodule(name)
        if twice:
            return self.get_submodule(f"{name}_second")(first(x).relu()).permute(0, 3, 1, 2)
        return (first(x).tanh() @ first.weight).permute(0, 3, 1, 2)


ATTENTIONS = ["permute", "chunk", "views", "einsum", "fused", "layer"]


def attend(form: str, qkv: torch.Tensor, heads: int, size: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention of packed queries, keys and values (batch, tokens, 3 * heads * size), in the words of many models."""
    n, tokens = qkv.shape[:2]
    if form == "permute":
        q, k, v = qkv.reshape(n, tokens, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    elif form == "chunk":
        q, k, v = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in qkv.chunk(3, -1))
    else:
        q, k, v = (t.view(n, tokens, heads, -1).transpose(1, 2) for t in torch.split(qkv, heads * size, dim=-1))
    if form == "fused":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        if form == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * size**-0.5
        else:
            scores = torch.matmul(q / size**0.5, k.transpose(-2, -1))
        weights = (scores if bias is None else scores + bias).softmax(-1)
        if form == "einsum":
            return torch.einsum("bhij,bhjd->bihd", weights, v).reshape(n, tokens, -1)
        y = weights @ v
    return (
        y.transpose(1, 2).contiguous().view(n, tokens, heads * size)
        if form == "views"
        else y.transpose(1, 2).flatten(2)
    )
