"""The rule table: one row for each op, with all that the package knows of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx, nn

from surgery.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """A row of the table."""

    relate: Callable[..., Any]
    rewrite: Callable[[NodeEdit], None] | None = None
    """Adapts the node's constants, or the layer's attributes, to an edit."""
    movement: bool = False
    """The op only moves data: its output can be had from its input by selecting positions."""
    linear: str = ""
    """How the op is linear, beyond only moving data: one of the keys of `LINEAR`, or empty."""
    zeros: tuple[str, ...] = ()
    """Parameters, as the layer or the rule names them, with which all of the op's first output is 0: those of what it
    does last. An affine op needs an input that is 0 as well."""
    within: bool = False
    """Each number of the output lies between the least and the greatest of the input and 0, as in pooling."""


LINEAR = {
    "sum": "jointly linear in its operands, and alike for every channel: add, sub",
    "first": "linear in its first operand, and alike for every channel: dropout, a mean",
    "product": "linear in each of its operands: mul",
    "quotient": "linear in its first operand, with a factor for each position: div",
    "writes": "made of rows of weights, each of which gives a channel in the same way: Linear, Conv2d, matmul",
    "affine": "a factor and a term for each channel that no batch changes: FrozenBatchNorm2d",
}
"""The words that say how an op is linear."""


_FUNCTIONS: dict[Any, Rule] = {}
_METHODS: dict[str, Rule] = {}
_MODULES: dict[type[nn.Module], Rule] = {}
_STATE = {"version": 0, "loaded": 0}

Relate = TypeVar("Relate", bound=Callable[..., Any])


def version() -> int:
    """A number that grows with every change of the table: what an analysis depends on besides its module."""
    _load()
    return _STATE["version"]


@contextmanager
def restore_rules() -> Iterator[None]:
    """Undo on exit what is registered inside the ``with`` block."""
    _load()
    tables: tuple[dict[Any, Rule], ...] = (_FUNCTIONS, _METHODS, _MODULES)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, rows in zip(tables, before, strict=True):
            table.clear()
            table.update(rows)
        _STATE["version"] += 1


def _load() -> None:
    """Import the rows that the package has, once. They register themselves here."""
    if not _STATE["loaded"]:
        _STATE["loaded"] = 1
        importlib.import_module("surgery.rules")


def oprule(
    *targets: Any,
    rewrite: Callable[[NodeEdit], None] | None = None,
    movement: bool = False,
    linear: str = "",
    zeros: tuple[str, ...] = (),
    within: bool = False,
) -> Callable[[Relate], Relate]:
    """Register the decorated function as the rule of ``targets``: functions, method names and module classes.

    A layer whose class has a rule is called as a whole by traced models, and so is a Python function that has one,
    where the model calls it by a global name. The other words are explained at `Rule`; without them nothing wrong is
    done with the op, but `widen` and `deepen` find fewer ways through it.
    """
    if linear and linear not in LINEAR:
        raise UsageError(f"unknown word {linear!r} for how an op is linear: one of {', '.join(map(repr, LINEAR))}")

    def register(relate: Relate) -> Relate:
        _load()  # first, so that a row of the user's replaces one of the package's
        _STATE["version"] += 1
        rule = Rule(relate, rewrite, movement, linear, zeros, within)
        for target in targets:
            if isinstance(target, str):
                _METHODS[target] = rule
            elif isinstance(target, type) and issubclass(target, nn.Module):
                _MODULES[target] = rule
            else:
                _FUNCTIONS[target] = rule
        return relate

    return register


def ruled_functions() -> list[Any]:
    """The functions that have a rule."""
    _load()
    return list(_FUNCTIONS)


def rule_for(node: fx.Node, leaf: nn.Module | None) -> Rule:
    """The rule of a node; `UNKNOWN` where there is none."""
    _load()
    if leaf is not None:
        return _module_rule(leaf) or UNKNOWN
    table: dict[Any, Rule] = _METHODS if node.op == "call_method" else _FUNCTIONS
    try:
        return table.get(node.target, UNKNOWN)
    except TypeError:  # an unhashable callable
        return UNKNOWN


def has_module_rule(module: nn.Module) -> bool:
    """Whether a layer's class, or the class whose ``forward`` it inherits, has a rule."""
    _load()
    return _module_rule(module) is not None


def _module_rule(module: nn.Module) -> Rule | None:
    for cls in type(module).__mro__:
        rule = _MODULES.get(cls)
        if rule is not None:
            own = any(getattr(type(module), name, None) is not getattr(cls, name, None) for name in _COMPUTES)
            return None if own or "forward" in module.__dict__ else rule
    return None


_COMPUTES = ("forward", "_conv_forward")
"""Methods of a layer that say what it computes: a subclass that has its own is another layer."""


def unknown(op: Any, *args: Any, why: str = "has no rule", **kwargs: Any) -> Any:
    """The rule of an op that nothing is known of: every axis that reaches it is frozen."""
    return op.unknown(*args, *kwargs.values(), why=why)


UNKNOWN = Rule(unknown)


@dataclass(frozen=True)
class NodeEdit:
    """Where a rewrite works."""

    node: fx.Node
    module: Any
    """The new layer, its parameters already gathered; None for a function or method."""
    shapes: tuple[tuple[int, ...], ...]
    """New shapes of the outputs."""
    old: tuple[tuple[int, ...], ...]
    """Their old shapes."""
    changed: frozenset[int]
    """Dims of the outputs whose channels changed."""
    inputs: tuple[tuple[int, ...] | None, ...]
    """New shapes of the positional arguments that are tensors."""
    before: tuple[tuple[int, ...] | None, ...]
    """Their old shapes."""
    computed: Mapping[fx.Node, tuple[int, ...]]
    """Values of the arguments that are shapes computed in the graph."""
    copies: Mapping[int, int]
    """For each dim of the first output how often every channel along it is there, where that is equally often."""
    tensors: Mapping[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]]
    """Old and new shapes of the arguments that are tensors, positional or not."""
