"""Small models written as libraries of models write theirs: each has one idiom that a tracer has to follow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _filling_in(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        scale = kwargs.pop("scale", 2.0)
        return forward(self, *args, scale=scale, **kwargs)

    return wrapper


class Base(nn.Module):
    """A stem, a body of the subclass's own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self.stem(x)))

    def body(self, x: Tensor) -> Any:
        raise NotImplementedError


class Decorated(Base):
    @_filling_in
    def body(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x).relu() * scale

    @_filling_in
    def forward(self, x: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
        out = self.head(self.body(self.stem(x)))
        return out * scale if mask is None else out * mask


class SlicedLayers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x).relu()
        return x


class MadeInForward(Base):
    def body(self, x: Tensor) -> Tensor:
        return nn.ReLU()(self.layer(x))


class WrittenPositions(Base):
    """Writes whole channels at some positions, and a number."""

    def body(self, x: Tensor) -> Tensor:
        z = self.layer(x).relu() + 0.5
        z[:, 0] = x[:, 1]
        z[:, 2:] = 0.5
        return z


class WrittenChannels(Base):
    def body(self, x: Tensor) -> Tensor:
        z = self.layer(x).relu() + 0.5
        z[..., :2] = x[..., 1:3]
        return z


class LowestNumber(Base):
    def body(self, x: Tensor) -> Tensor:
        lowest = torch.finfo(x.dtype).min
        scores = (x @ self.layer(x).transpose(1, 2)).masked_fill(torch.ones(4, 4).tril() == 0, lowest)
        return scores.softmax(-1) @ x


class ChecksFinite(Base):
    def body(self, x: Tensor) -> Tensor:
        x = self.layer(x).relu()
        if torch.isinf(x).any() or not torch.isfinite(x).all():
            x = x.clamp(-1000, 1000)
        return x


class ExpandsPositions(Base):
    """Expands what is of batch 1, unless the batch is."""

    def body(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if x.shape[0] != positions.shape[0]:
            positions = positions.expand(x.shape[0], -1)
        return self.layer(x).relu() * positions[..., None].to(x.dtype).cos()


class Part(nn.Module):
    """Branches on its own mode, and gives what may be None."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.lin, self.weights = nn.Linear(8, 8), weights

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y = self.lin(x).relu() if self.training else self.lin(x).relu() * 1.5
        y = y if mask is None else y * mask
        return y, y.mean(-1, keepdim=True) if self.weights else None


class NoneAmongTensors(Base):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part(weights=True)])

    def forward(self, x: Tensor, *masks: Tensor | None) -> Tensor:
        x = self.stem(x)
        for part, mask in zip(self.parts, masks, strict=True):
            x, weights = part(x, mask)
            if weights is not None:
                x = x * weights
        return self.head(x)


_COLLECTED: list[list[Any] | None] = [None]


class Captured(Base):
    """Sets hooks on its parts when it is called for the first time, and reads what they collected."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])

    def forward(self, x: Tensor) -> Tensor:
        def collect(module: nn.Module, args: Any, output: Any) -> None:
            if _COLLECTED[0] is not None:
                _COLLECTED[0].append(output[0])

        if not self.__dict__.get("hooked"):
            for part in self.parts:
                part.register_forward_hook(collect)
            self.__dict__["hooked"] = True
        _COLLECTED[0] = []
        x = self.stem(x)
        for part in self.parts:
            x = part(x)[0]
        x = sum(_COLLECTED[0])
        _COLLECTED[0] = None
        return self.head(x)


class Named(dict[str, Any]):
    """An output whose entries are attributes too, some of them None, as those of transformers are."""

    def __init__(self, **entries: Any) -> None:
        super().__init__({name: value for name, value in entries.items() if value is not None})
        self.__dict__.update(entries)


class NamingPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Named:
        return Named(values=self.lin(x).relu() if self.training else self.lin(x).relu() * 1.5, weights=None)


class AttributesOfOutputs(Base):
    """Hands on what a part that branches on its mode names."""

    def __init__(self) -> None:
        super().__init__()
        self.part = NamingPart()

    def body(self, x: Tensor) -> Tensor:
        found = self.part(x)
        other = Named(values=found.values, weights=found.weights)
        return other.values if other.weights is None else other.values * other.weights


class NumbersOfNumpy(Base):
    def body(self, x: Tensor) -> Tensor:
        return torch.mul(self.layer(x).relu(), np.log(np.float64(3.0))) + np.float32(0.5)


class EmptyParts(Base):
    """Rotates all of each head, and joins it with the rest, which is nothing."""

    def body(self, x: Tensor) -> Tensor:
        mixed = []
        for part in (self.layer(x), x):
            heads = part.view(*x.shape[:2], 4, 2).transpose(1, 2)
            turned, rest = heads[..., :2], heads[..., 2:]
            mixed.append(torch.cat([turned.flip(-1) * 0.5 + turned, rest], -1))
        heads = F.scaled_dot_product_attention(*mixed, mixed[0])
        return heads.transpose(1, 2).reshape(*x.shape[:2], 8)


@functools.lru_cache(maxsize=4)
def _numbered(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.float64)


class CachedPositions(Base):
    """Reads a tensor that a function has kept since an earlier call."""

    def body(self, x: Tensor) -> Tensor:
        return self.layer(x).relu() + _numbered(x.shape[1], x.device)[None, :, None]


class NoBias(Base):
    """Attention with a bias of one number for each head."""

    def body(self, x: Tensor) -> Tensor:
        split = [v.view(*x.shape[:2], -1, 2).transpose(1, 2) for v in (self.layer(x), x, x.relu())]
        bias = torch.zeros((1, 4, x.shape[1], x.shape[1]), dtype=x.dtype, device=x.device)
        bias = bias + torch.ones(1, 4, x.shape[1], 1, dtype=x.dtype, device=x.device)
        mixed = F.scaled_dot_product_attention(*split, attn_mask=bias)
        return mixed.transpose(1, 2).reshape(*x.shape[:2], -1)


class Cached(Base):
    """Gives a cache as well, where its configuration says so."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu()
        return y * len([y]) if self.config.use_cache else y


class FunctionalNorm(nn.Module):
    """A norm that is a layer in evaluation and a function in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, norm = self.conv(x), self.norm
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, True) if self.training else norm(x)
        return self.head(x.relu())


IDIOMS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (
        *(Decorated, SlicedLayers, MadeInForward, WrittenPositions, WrittenChannels, LowestNumber, ChecksFinite),
        *(ExpandsPositions, NoneAmongTensors, Captured, NoBias),
        *(AttributesOfOutputs, NumbersOfNumpy, EmptyParts, CachedPositions),
    )
}
