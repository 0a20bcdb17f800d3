"""Layers that contract over channels, seen while a network runs: which weights they read, what they are given, and
what they give.

Calls of torch are watched, not layers: a convolution is seen as a layer, as a function, and in Python outside the
graphs. Weights are known by where they lie in memory, so that a part of a packed weight (the keys of an attention) is
known too.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgery.edit.read_rows import Layer
from surgery.graph.rule_table import rule_of_function
from surgery.graph.traced import named_tensors


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter or buffer by its qualified name, or the rows of it from ``first``."""

    name: str
    first: int


@dataclass(frozen=True, eq=False)
class Read:
    """One call of a layer that contracts over channels."""

    part: Part
    weight: Tensor
    bias: Tensor | None
    layer: Layer
    x: Tensor


def find_read(book: Book, func: Any, args: Any, kwargs: Any) -> Read | None:
    """A call of torch as a layer that reads by a weight in ``book``; None where it is something else."""
    rule = rule_of_function(func)
    if not rule.contracts:
        return None
    given = rule.bound(args, kwargs)
    part = book.find(given["weight"])
    if part is None:
        return None
    return Read(part, given["weight"], given.get("bias"), _layer(rule.contracts, given), given["input"])


class Watch(TorchFunctionMode):
    """Tells of calls of torch.

    Args:
        book: the tensors of the network that runs.
        read: called with each `Read` of a weight that is in ``book``, and with what it gives.
        other: called with the function, its arguments and what it gives, after each call that is no `Read`.
    """

    def __init__(
        self,
        book: Book,
        read: Callable[[Read, Tensor], None],
        other: Callable[[Any, Any, Any, Any], None],
    ) -> None:
        super().__init__()
        self.book, self.read, self.other = book, read, other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        found = find_read(self.book, func, args, kwargs)
        if found is not None:
            self.read(found, result)
        else:
            self.other(func, args, kwargs, result)
        return result


def _layer(contracts: str, given: Mapping[str, Any]) -> Layer:
    if contracts == "linear":
        return Layer()
    transposed = contracts == "transposed convolution"
    spatial = given["weight"].ndim - 2

    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        numbers = (value,) if isinstance(value, int) else tuple(value)
        return numbers * spatial if len(numbers) == 1 else numbers

    stride, dilation, groups = each("stride", 1), each("dilation", 1), given.get("groups", 1)
    kernel = given["weight"].shape[2:]
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    wanted = given.get("padding", 0)
    if wanted == "same":
        padding = tuple((span // 2, span - span // 2) for span in spans)
    elif wanted == "valid":
        padding = ((0, 0),) * spatial
    elif transposed:
        further = each("output_padding", 0)
        sides = zip(spans, each("padding", 0), further, strict=True)
        padding = tuple((span - p, span - p + more) for span, p, more in sides)
    else:
        padding = tuple((p, p) for p in each("padding", 0))
    return Layer(spatial, transposed, groups, stride, padding, dilation)


def batch_norm(args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of `torch.nn.functional.batch_norm` by name."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    defaults = {"weight": None, "bias": None, "training": False, "eps": 1e-5}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


class Trail:
    """Which call gave a tensor, for as long as the tensor lives."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def mark(self, tensor: Tensor, what: Any) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), what

    def find(self, tensor: Tensor) -> Any:
        """What the tensor was marked with; None where it was not."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None


class Book:
    """The parameters and buffers of a module by where they lie in memory."""

    def __init__(self, module: torch.nn.Module) -> None:
        held = {t.data_ptr(): (name, t) for name, t in reversed(named_tensors(module).items()) if t.numel()}
        self.starts = sorted(held)
        self.tensors = [held[start] for start in self.starts]

    def find(self, tensor: Tensor) -> Part | None:
        """Where a tensor lies: a parameter or rows of one; None where it is neither."""
        found = self.holder(tensor)
        if found is None:
            return None
        name, whole = found
        offset = tensor.data_ptr() - whole.data_ptr()
        row = whole.stride(0) * whole.element_size() if whole.ndim else 1
        same = tensor.ndim == whole.ndim and tensor.stride() == whole.stride() and tensor.shape[1:] == whole.shape[1:]
        return Part(name, offset // max(row, 1)) if same and offset % max(row, 1) == 0 else None

    def holder(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """The name, and the parameter or buffer that a tensor shares memory with."""
        if tensor.layout != torch.strided or not tensor.numel():
            return None
        at = bisect.bisect_right(self.starts, tensor.data_ptr()) - 1
        if at < 0:
            return None
        name, whole = self.tensors[at]
        within = tensor.data_ptr() < whole.data_ptr() + whole.numel() * whole.element_size()
        return (name, whole) if within and tensor.device == whole.device else None


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a value."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
