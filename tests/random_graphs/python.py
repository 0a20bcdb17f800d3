"""Steps of random networks in which Python does what a graph could lose: batches in shapes, autograd, branches.

Also the outputs of random networks: containers and objects of many classes.
"""

from __future__ import annotations

import collections
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.random_graphs.planning import Planning, as_map, as_tokens

FOLDED = ["attention", "reshapes", "positions", "windows", "shared filter", "single channel"]
AUTOGRAD = ["reversal", "straight through", "no grad", "detach", "frozen layer", "grad in no grad", "two inputs"]
ISLANDS = ["branch", "samples", "cross", "encoder"]


class PythonSteps(Planning):
    """What `RandomNet` can do with Python around its ops."""

    def plan_folded(self, name, a, b, m, n):
        """A part of the channels, or of the positions, runs along the batch for a while."""
        heads, size, form = 1 + n % 4, 1 + n // 4 % 3, FOLDED[m % len(FOLDED)]
        width = heads * size
        self.add_module(f"{name}_in", nn.Conv2d(self.widths[a], width, 1))
        if form == "positions":
            self.add_module(name, nn.Linear(width, width))
        elif form == "shared filter":
            self.add_module(name, nn.Conv2d(size, size, 3, padding=1))
        elif form == "single channel":
            self.add_module(name, nn.Conv2d(1, 2, 3, padding=1))
        self.call("folded", name, [a], [width * (1 + (form == "single channel"))], (form, heads, size))

    def plan_autograd(self, name, a, b, m, n):
        form = AUTOGRAD[m % len(AUTOGRAD)]
        if form == "frozen layer":
            self.add_module(name, nn.Conv2d(self.widths[a], self.widths[a], 1))
        self.call("autograd", name, [a], [self.widths[a]], form)

    def plan_island(self, name, a, b, m, n):
        """Attention in a layer whose Python looks at values. They are those of the second input."""
        heads = 1 + n % 2
        a = self.multiple(name, a, heads)
        island = Island(ISLANDS[m % len(ISLANDS)], self.widths[a], self.widths[b], heads)
        self.add_module(name, island)
        self.call("island", name, [a, b, 1], [self.widths[a]])

    # ---- running

    def run_folded(self, name, maps, how):
        (form, heads, size), x = how, self.get_submodule(f"{name}_in")(maps[0]).contiguous()
        n, c, h, w = x.shape
        if form == "attention":
            q = x.reshape(n * heads, size, h * w)
            return (q @ (q.transpose(1, 2) @ q).softmax(1)).reshape(n, c, h, w)
        if form == "reshapes":
            q = x.reshape(n * heads, size, h * w).transpose(1, 2)
            q = q.reshape(q.shape[0], h, w, -1).tanh()
            return q.permute(0, 3, 1, 2).reshape(n, heads * size, h, w)
        if form == "positions":
            y = self.get_submodule(name)(x.permute(0, 2, 3, 1).reshape(-1, x.size(1))).relu()
            return y.view(x.size(0), h, w, -1).permute(0, 3, 1, 2)
        if form == "windows":
            y = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
            y = y + (y @ y.transpose(1, 2)).softmax(-1) @ y
            return y.view(n, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        if form == "shared filter":
            return self.get_submodule(name)(x.view(-1, size, h, w)).view(n, -1, h, w)
        return self.get_submodule(name)(x.flatten(0, 1)[:, None]).unflatten(0, (n, -1)).flatten(1, 2)

    def run_autograd(self, name, maps, form):
        x = maps[0]
        if form == "reversal":
            return Reversal.apply(x)
        if form == "straight through":
            return StraightThrough.apply(x)
        if form == "two inputs":
            return Gated.apply(x, x.mean((2, 3), keepdim=True))
        if form == "detach":
            return x + (x.tanh() - x).detach()
        if form == "no grad":
            with torch.no_grad():
                gate = x.mean((2, 3), keepdim=True).sigmoid()
            return x * gate
        if form == "frozen layer":
            with torch.set_grad_enabled(False):
                y = self.get_submodule(name)(x)
            return x + y
        with torch.no_grad():
            gate = x.sigmoid()
            with torch.enable_grad():
                y = x * gate
        return y

    def run_island(self, name, maps, extra):
        return self.get_submodule(name)(*maps)


class Reversal(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class StraightThrough(torch.autograd.Function):
    """Rounds to halves, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (2 * x).round() / 2 + 0.1 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Gated(torch.autograd.Function):
    """A product, whose gradient is that of the first factor alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gate,) = ctx.saved_tensors
        return gradient * gate * 3, None


class Island(nn.Module):
    """Attention layers, and Python around them that looks at the values of a tensor."""

    def __init__(self, form: str, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.form = form
        if form == "encoder":
            self.layer = nn.TransformerEncoderLayer(width, heads, 3, dropout=0.0, batch_first=True)
        elif form == "cross":
            self.layer = nn.MultiheadAttention(width, heads, batch_first=True, kdim=other, vdim=other)
        else:
            self.layer = nn.MultiheadAttention(width, heads, batch_first=True, bias=heads == 1)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor, signal: Tensor) -> Tensor:
        tokens, keys = as_tokens(x), as_tokens(other)
        if self.form == "encoder":
            y = self.layer(tokens)
        elif self.form == "cross":
            y = self.layer(tokens, keys, keys)[0]
        elif self.form == "samples":
            y = torch.stack([self.layer(sample, sample, sample, need_weights=False)[0] for sample in tokens])
        else:
            y, shares = self.layer(tokens, tokens, tokens)
            y = y + shares.mean(-1, keepdim=True)
        y = self.mix(y).relu() if float(signal[0, 0, 0, 0]) > 0 else y - self.mix(tokens)
        return as_map(tokens + y)


# ---------------------------------------------------------------------------------------------------------------------
# What a network returns


@dataclass
class Result:
    """A dataclass of tensors and of something else."""

    first: Tensor
    second: Tensor
    label: str = "result"


class Output(dict):
    """A mapping whose entries are attributes too, as some libraries return it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Holder:
    """A plain object."""

    def __init__(self, first: Tensor, rest: list[Tensor]) -> None:
        self.first = first
        self.rest = rest


Pair = collections.namedtuple("Pair", ["first", "second"])

OUTPUTS = {
    "tuple": lambda a, b: (a, b),
    "dataclass": Result,
    "namespace": lambda a, b: types.SimpleNamespace(first=a, second=b),
    "dict subclass": lambda a, b: Output(first=a, second=b),
    "object": lambda a, b: Holder(a, [b]),
    "named tuple": Pair,
    "nested": lambda a, b: {"all": [a, (b, a + b)]},
}
"""How the two outputs of a network are returned."""
