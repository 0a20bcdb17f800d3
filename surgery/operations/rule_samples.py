"""An op on numbers: a sample of its arguments, and a network of nothing but the op.

`check_rule` tries on these what the rule of the op claims.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.rules.elementwise import bare_axes

Axis = tuple[str, int]
"""A tensor and one of its axes: ``("0", 1)`` is axis 1 of the first argument, ``("0.2", 1)`` of the third tensor of the
list that is the first argument, ``("weight", 0)`` axis 0 of the argument or parameter of that name."""


@dataclass(frozen=True)
class Variant:
    """Which axes of a sample's arguments hold channels. By default each holds its own."""

    joined: Axis | None = None
    """This axis and the next are factors of one."""
    alone: Axis | None = None
    """Of the activations' axes only this one holds channels."""
    bare: str | None = None
    """This tensor's axes hold none."""

    def __str__(self) -> str:
        if self.joined is not None:
            path, dim = self.joined
            return f" ({axis_name(path, (dim, dim + 1))} being factors of one)"
        if self.bare is not None:
            return f" (argument {self.bare} holding none)"
        return "" if self.alone is None else f" ({axis_name(self.alone[0], self.alone[1:])} alone holding channels)"


class Sample:
    """An op and its arguments as numbers, by name."""

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.weights: set[str] = set()
        """Names of the arguments that are parameters."""
        self.tensors: dict[str, torch.Tensor] = {}
        self.op = op
        if isinstance(op, nn.Module):
            self.op = copy.deepcopy(op).double().eval()
            with torch.no_grad():
                for tensor in (*self.op.parameters(), *self.op.buffers()):
                    if tensor.is_floating_point():
                        tensor += 0.5 * torch.rand(tensor.shape, generator=self.generator, dtype=tensor.dtype)
        self.args = tuple(self.name_tensors(a, str(k)) for k, a in enumerate(args))
        self.kwargs = {k: self.name_tensors(a, k) for k, a in kwargs.items()}
        self.name = op if isinstance(op, str) else type(op).__name__ if isinstance(op, nn.Module) else op.__name__
        self.outputs = list(output_leaves(self.call(self.state())))
        """Output tensors, and how to index the output to get them."""

    def name_tensors(self, value: Any, path: str) -> Any:
        """The value with a `Ref` for each tensor."""
        if isinstance(value, (list, tuple)):
            parts = [self.name_tensors(v, f"{path}.{k}") for k, v in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {k: self.name_tensors(v, f"{path}.{k}") for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(value, nn.Parameter):
            self.weights.add(path)
        value = value.detach()
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
            value = value.double() + 0.1 * noise
        self.tensors[path] = value.clone()
        return Ref(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return self  # nothing in it changes

    def axes(self) -> list[Axis]:
        """Axes of activations that can hold channels."""
        shapes = {path: value.shape for path, value in self.tensors.items() if path not in self.weights}
        return [(path, dim) for path, shape in shapes.items() for dim, size in enumerate(shape) if size > 1]

    def neighbours(self) -> list[Axis]:
        """Axes that could be factors of one with the axis behind them."""
        axes = self.axes()
        return [(path, dim) for path, dim in axes if (path, dim + 1) in axes]

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors that the op reads, by name: arguments, and a layer's parameters and buffers."""
        own = {}
        if isinstance(self.op, nn.Module):
            own = {k: v.detach() for k, v in (*self.op.named_parameters(), *self.op.named_buffers())}
        return {**own, **self.tensors}

    def fill(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The op's arguments with these values for tensors."""
        fill: Callable[[Any], Any] = lambda v: values[v.path] if isinstance(v, Ref) else v  # noqa: E731
        args, kwargs = pytree.tree_map(fill, (self.args, self.kwargs))
        return args, kwargs

    def run(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The op's output tensors, as float64, for the given numbers."""
        return [leaf.double() for _, leaf in output_leaves(self.call(state))]

    def call(self, state: Mapping[str, torch.Tensor]) -> Any:
        args, kwargs = self.fill({k: state[k].clone() for k in self.tensors})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            if isinstance(self.op, nn.Module):
                own = {k: v.clone() for k, v in state.items() if k not in self.tensors}
                return torch.func.functional_call(self.op, own, args, kwargs)
            if isinstance(self.op, str):
                return getattr(args[0], self.op)(*args[1:], **kwargs)
            return self.op(*args, **kwargs)


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor among the arguments."""

    path: str


def output_leaves(output: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors of an output and how to index it to get them."""
    if isinstance(output, torch.Tensor):
        yield path, output
    elif isinstance(output, (list, tuple)):
        for k, part in enumerate(output):
            yield from output_leaves(part, (*path, k))
    elif isinstance(output, dict):
        for k, part in output.items():
            yield from output_leaves(part, (*path, k))


class SampleNetwork(nn.Module):
    """The op between parameters that hold its arguments and layers that contract every axis of its results.

    Everything is read, arguments too, so an axis that is frozen is frozen by the op's rule. Its ``forward`` is for
    `surgery.trace` alone.
    """

    def __init__(self, sample: Sample, variant: Variant, factored: Mapping[int, list[tuple[int, ...]]]) -> None:
        super().__init__()
        self.sample = sample
        if isinstance(sample.op, nn.Module):
            self.op = copy.deepcopy(sample.op)
        self.arguments = nn.ModuleDict()
        self.readers = nn.ModuleDict()
        for path, value in sample.tensors.items():
            name = f"of_{path.replace('.', '_')}"
            self.arguments[name] = _Argument(value, path, path in sample.weights, variant)
            if path not in sample.weights:
                dim = variant.joined[1] if variant.joined is not None and variant.joined[0] == path else None
                self.readers[name] = _Reader(value, [] if dim is None else [(dim, dim + 1)], sample.generator)
        for k, (_, value) in enumerate(sample.outputs):
            self.readers[f"result_{k}"] = _Reader(value, factored.get(k, []), sample.generator)

    def forward(self) -> Any:
        names = {path: f"of_{path.replace('.', '_')}" for path in self.sample.tensors}
        values = {path: self.arguments[name]() for path, name in names.items()}
        args, kwargs = self.sample.fill(values)
        output: Any
        if isinstance(self.sample.op, nn.Module):
            output = self.op(*args, **kwargs)
        else:
            kind = "call_method" if isinstance(self.sample.op, str) else "call_function"
            output = next(iter(values.values())).tracer.create_proxy(kind, self.sample.op, args, kwargs)
        results = [self.readers[name](values[path]) for path, name in names.items() if name in self.readers]
        for k, (path, _) in enumerate(self.sample.outputs):
            part = output
            for key in path:
                part = part[key]
            results.append(self.readers[f"result_{k}"](part))
        return tuple(results)


class _Argument(nn.Module):
    """A tensor of the module as an activation, or as the weight that it is."""

    def __init__(self, value: torch.Tensor, path: str, weight: bool, variant: Variant) -> None:
        super().__init__()
        self.weight = weight
        self.factors: tuple[int, tuple[int, ...]] | None = None
        self.bare: list[int] = []
        stored = value.clone()
        if variant.joined is not None and variant.joined[0] == path:
            dim = variant.joined[1]
            self.factors = dim, tuple(value.shape[dim : dim + 2])
            stored = value.flatten(dim, dim + 1).clone()
        if variant.alone is not None:
            self.bare = [d for d in range(value.ndim) if (path, d) != variant.alone]
        if variant.bare == path:
            self.bare = list(range(value.ndim))
        self.dtype = stored.dtype
        if weight and not stored.is_floating_point():
            self.register_buffer("value", stored)
        else:
            self.value = nn.Parameter(stored.double())

    def forward(self) -> Any:
        value: Any = self.value
        if self.weight:
            return value
        if self.factors is not None:
            value = value.unflatten(*self.factors)
        if self.dtype != torch.float64:
            value = value.to(self.dtype)
        return value.tracer.create_proxy("call_function", bare_axes, (value, self.bare), {})


class _Reader(nn.Module):
    """Contracts each axis of a tensor with a weight of its own; those that are factors of one with one weight."""

    def __init__(self, value: torch.Tensor, factored: list[tuple[int, ...]], generator: torch.Generator) -> None:
        super().__init__()
        self.rank, self.cast = value.ndim, value.dtype != torch.float64
        self.plan = [*factored, *((d,) for d in range(value.ndim) if not any(d in dims for dims in factored))]
        self.layers = nn.ModuleList()
        for dims in self.plan:
            layer = nn.Linear(int(np.prod([value.shape[d] for d in dims])), 2, bias=False, dtype=torch.float64)
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
            self.layers.append(layer)

    def forward(self, x: Any) -> Any:
        x = x.double() if self.cast else x
        place = list(range(self.rank))  # which of the first axes stands where
        for dims, layer in zip(self.plan, self.layers, strict=True):
            at = [place.index(d) for d in dims]
            if len(dims) > 1 and at == list(range(at[0], at[-1] + 1)):
                x, at = x.flatten(at[0], at[-1]), at[:1]
            x = x.movedim(at, list(range(-len(at), 0)))
            x = layer(x.flatten(-len(at)) if len(at) > 1 else x)
            place = [*(d for d in place if d not in dims), dims[0]]
        return x


def axis_name(path: str, dims: tuple[int, ...]) -> str:
    axes = f"axis {dims[0]}" if len(dims) == 1 else f"axes {' and '.join(map(str, dims))}"
    return f"{axes} of argument {path}" if path[0].isdigit() else f"{axes} of {path!r}"
