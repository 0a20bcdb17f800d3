"""What the analysis of a module depends on, as a value to compare: the key under which the analysis is remembered."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from surgery.graph.rule_table import version
from surgery.graph.traced import TracedModule, info


@dataclass(frozen=True)
class State:
    """All that an analysis depends on: the rule table, the traced inputs, and of each module its class, its hooks, its
    tensors, its attributes and its graphs.

    Objects that have no value to compare are compared by identity. They are kept, so that no other object can take
    over the identity of one that is gone.
    """

    key: tuple[Any, ...]
    kept: list[Any] = field(compare=False, repr=False)


def read_state(module: nn.Module) -> State:
    """The state of a traced module.

    Returns:
        a value that differs from that of an earlier call if the analysis may differ. What a container of more than
        1,000 entries holds, and what objects hold deeper than their own numbers and names, is not looked at.
    """
    reader, known = _Reader(), info(module)
    paths = module.named_modules(remove_duplicate=False)
    key = (
        version(),
        reader.value((known.args, known.kwargs)),
        known.modes,
        *((path, *reader.module(part)) for path, part in paths),
    )
    return State(key, reader.kept)


class _Reader:
    """Reads values into tuples that compare by value, and keeps the objects that compare by identity."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def module(self, module: nn.Module) -> tuple[Any, ...]:
        own = module.__dict__
        hooks = (*own["_forward_hooks"].values(), 0, *own["_forward_pre_hooks"].values())
        tensors = (*own["_parameters"].items(), *own["_buffers"].items())
        return (
            self.same(type(module)),
            tuple(map(self.same, hooks)) if len(hooks) > 1 else (),
            tuple((name, None if tensor is None else self.tensor(tensor)) for name, tensor in tensors),
            self.traced(module)
            if isinstance(module, TracedModule)
            else tuple((name, self.value(value)) for name, value in own.items() if name not in _NO_ATTRIBUTES),
        )

    def traced(self, module: TracedModule) -> tuple[Any, ...]:
        names = module.__dict__.get("_attribute_names", ())
        attributes = tuple((name, self.value(module.__dict__.get(name))) for name in names)
        return (attributes, *(self.graph(module, graph) for graph in module.graphs))

    def graph(self, module: TracedModule, graph: fx.Graph) -> tuple[Any, ...]:
        self.kept.append(graph)
        code: list[Any] = [id(graph)]
        for node in graph.nodes:
            target = node.target if isinstance(node.target, str) else self.same(node.target)
            code += (node.op, node.name, target, self.value(node.args), self.value(node.kwargs))
            if node.op == "get_attr":
                code.append(self.value(operator.attrgetter(str(node.target))(module)))
        return tuple(code)

    def tensor(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Which tensor it is, and its form."""
        return self.same(tensor), *self.form(tensor)

    def form(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Shape, strides and dtype of a tensor; of one that may hold positions also which one it is, and how often it
        was written to."""
        strides = tensor.stride() if tensor.layout is torch.strided else None
        if tensor.is_floating_point() or tensor.ndim == 0:
            return tensor.shape, strides, tensor.dtype
        written = None if tensor.is_inference() else tensor._version
        return tensor.shape, strides, tensor.dtype, self.same(tensor), written

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind is fx.Node:
            return id(value)  # its graph keeps it
        if kind in _PLAIN:
            return kind, value
        if isinstance(value, (tuple, list)) and len(value) <= _LONG:
            return kind, *map(self.value, value)
        if isinstance(value, dict) and len(value) <= _LONG:
            return kind, *((self.value(k), self.value(v)) for k, v in value.items())
        if kind is slice:
            return kind, self.value(value.start), self.value(value.stop), self.value(value.step)
        if isinstance(value, torch.Tensor):
            return self.form(value)
        if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
            return self.same(value), len(value) if isinstance(value, (tuple, list, dict, set)) else None
        return self.same(value), *((k, type(v), v) for k, v in vars(value).items() if type(v) in _PLAIN)

    def same(self, thing: Any) -> int:
        self.kept.append(thing)
        return id(thing)


_LONG = 1000
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})
_NO_ATTRIBUTES = nn.Module().__dict__.keys() | {"_surgery", "_analysis"}
"""Entries of a module that are read in another way, or that say nothing of what it computes."""
