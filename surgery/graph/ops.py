"""The rule table's machinery: how a rule is registered and found, and the words a rule has to say how axes relate.

A rule is a function that takes the op and the op's own arguments, and returns the `Field`s of its output. On the way it
may tie channels together (`Op.tie`), freeze them (`Op.freeze`), or say what becomes of a parameter's axis
(`Op.produces`, `Op.consumes`, `Op.per_channel`). An op without a rule freezes every axis that reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.graph.labels import Field, Fields, Labelled, moved
from surgery.graph.rewrites import Site

if TYPE_CHECKING:
    from surgery.graph.propagate import Ledger


@dataclass(frozen=True)
class Rule:
    """A row of the table."""

    relate: Callable[..., Any]
    rewrite: Callable[[Site], None] | None = None
    """Adapts the node's constants, or the layer's attributes, to an edit."""
    movement: bool = False
    """The op only moves data: its output can be had from its input by selecting positions."""


_FUNCTIONS: dict[Any, Rule] = {}
_METHODS: dict[str, Rule] = {}
_MODULES: dict[type[nn.Module], Rule] = {}


def oprule(
    *targets: Any, rewrite: Callable[[Site], None] | None = None, movement: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the rule of ``targets``: functions, method names and module classes."""

    def register(relate: Callable[..., Any]) -> Callable[..., Any]:
        rule = Rule(relate, rewrite, movement)
        for target in targets:
            if isinstance(target, str):
                _METHODS[target] = rule
            elif isinstance(target, type) and issubclass(target, nn.Module):
                _MODULES[target] = rule
            else:
                _FUNCTIONS[target] = rule
        return relate

    return register


def rule_for(node: fx.Node, leaf: nn.Module | None) -> Rule:
    """The rule of a node; `UNKNOWN` where there is none."""
    if leaf is not None:
        return _module_rule(leaf) or UNKNOWN
    table: dict[Any, Rule] = _METHODS if node.op == "call_method" else _FUNCTIONS
    try:
        return table.get(node.target, UNKNOWN)
    except TypeError:  # an unhashable callable
        return UNKNOWN


def has_module_rule(module: nn.Module) -> bool:
    """Whether a layer's class, or the class whose ``forward`` it inherits, has a rule."""
    return _module_rule(module) is not None


def _module_rule(module: nn.Module) -> Rule | None:
    for cls in type(module).__mro__:
        rule = _MODULES.get(cls)
        if rule is not None:
            return rule if getattr(type(module), "forward", None) is getattr(cls, "forward", None) else None
    return None


class Op:
    """One op in a graph, as a rule sees it: its output's shape, and the words to say how its axes relate."""

    def __init__(
        self, run: Ledger, node: fx.Node, module: nn.Module | None, path: str, key: tuple[str, str], out: Any
    ) -> None:
        self.run = run
        self.node = node
        self.module: Any = module
        self.path = path
        self.key = ("node", *key)
        self.out = out
        self.name = path or getattr(node.target, "__name__", str(node.target))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output, or of its first tensor."""
        first: Labelled = next(leaf for leaf in pytree.tree_leaves(self.out) if isinstance(leaf, Labelled))
        return first.shape

    def param(self, name: str, dims: int = 2) -> Labelled | None:
        """A parameter or buffer of the layer, its first ``dims`` axes labelled (those after two are kernels)."""
        value: torch.Tensor | None = getattr(self.module, name, None)
        return None if value is None else self.run.tensor(value, range(min(value.ndim, dims)))

    def cut(self, f: Field) -> None:
        """``f`` is a part of an axis: its channels are not moved into or out of it."""
        self.run.books.cuts.append(f.ids.ravel())

    def tie(self, a: Field | None, b: Field | None) -> None:
        """Position for position, ``a`` and ``b`` hold the same channel."""
        if a is None or b is None:
            self.freeze(a if b is None else b, f"{self.name} relates it to an axis that holds no channels")
        elif a.ids.shape != b.ids.shape:
            for f in (a, b):
                self.freeze(f, f"{self.name} relates it to an axis of another size")
        else:
            self.run.tie(a, b, self.name)

    def together(self, ids: Any) -> None:
        """Along the first axis of ``ids``, channels are chosen together: row by row the same units."""
        self.run.tie_ids(ids[:1], ids)

    def freeze(self, f: Field | None, reason: str) -> None:
        if f is not None:
            self.run.freeze(f.ids, reason)

    def produces(self, f: Field | None) -> None:
        self._role(f, "producer")

    def consumes(self, f: Field | None) -> None:
        self._role(f, "consumer")

    def per_channel(self, f: Field | None) -> None:
        self._role(f, "per-channel")

    def _role(self, f: Field | None, role: str) -> None:
        if f is None:
            return
        if f.key is not None and f.key[0] == "param":
            self.run.books.axes[f.key[1], f.key[2]].roles.add(role)
        elif role == "consumer":
            self.run.books.single.append((f.ids.ravel(), f"{self.name} contracts a computed weight"))

    def elementwise(self, *operands: Any) -> Fields:
        """Output fields of an op that works position by position, with broadcasting."""
        shape = self.shape
        tensors = [t for t in operands if isinstance(t, Labelled)]
        result: list[Field] = []
        for tensor in tensors:
            shift = len(shape) - tensor.ndim
            for f in tensor.fields:
                f = moved(f, tuple(d + shift for d in f.dims))
                if any(f.ids.shape[k] != shape[d] for k, d in enumerate(f.dims)):
                    self.freeze(f, f"{self.name} broadcasts it")
                else:
                    self.meet(result, f)
        for f in result:
            for tensor in tensors:
                shift = len(shape) - tensor.ndim
                if any(d >= shift and tensor.shape[d - shift] > 1 and tensor.at(d - shift) is None for d in f.dims):
                    self.freeze(f, f"{self.name} combines it with an axis that holds no channels")
        return tuple(result)

    def meet(self, result: list[Field], f: Field) -> None:
        for k, g in enumerate(result):
            common = set(f.dims) & set(g.dims)
            if not common:
                continue
            if f.dims == g.dims:
                self.tie(f, g)
                for side in (f, g):
                    if side.key is not None and side.key[0] == "param":
                        self.per_channel(side)
                return
            fine, coarse = (f, g) if len(f.dims) > len(g.dims) else (g, f)
            if set(coarse.dims) <= set(fine.dims):
                self.run.tie_ids(_spread(coarse, fine), fine.ids)
                result[k] = fine
            else:
                self.freeze(f, f"{self.name} mixes its factors")
                self.freeze(g, f"{self.name} mixes its factors")
            return
        result.append(f)

    def keep(self, x: Labelled, dims: Any = (), reason: str = "") -> Fields:
        """Fields of ``x`` whose dims are unchanged; those that touch ``dims`` are frozen and dropped."""
        touched = {d % max(x.ndim, 1) for d in dims}
        for f in x.fields:
            if touched & set(f.dims):
                self.freeze(f, reason or f"{self.name} works along it")
        return tuple(f for f in x.fields if not touched & set(f.dims))

    def unlabelled(self) -> Any:
        """No fields for any output."""
        return pytree.tree_map(lambda _: (), self.out)

    def lose(self, fields: list[Field], reason: str) -> None:
        for f in fields:
            self.freeze(f, reason)


def _spread(coarse: Field, fine: Field) -> Any:
    shape = [coarse.ids.shape[coarse.dims.index(d)] if d in coarse.dims else 1 for d in fine.dims]
    return np.broadcast_to(coarse.ids.reshape(shape), fine.ids.shape)


def unknown(op: Op, *args: Any, **kwargs: Any) -> Any:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Labelled):
            for f in leaf.fields:
                op.freeze(f, f"{op.name} has no rule")
    return op.unlabelled()


UNKNOWN = Rule(unknown)
