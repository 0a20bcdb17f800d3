"""The rule table: one row for each op, with all that the package knows of it."""

from __future__ import annotations

import importlib
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, Unpack

from torch import fx, nn

from surgery.errors import UsageError, unknown_name


@dataclass(frozen=True, eq=False)
class Rule:
    """A row of the table: one op in all its spellings, such as `nn.ReLU`, `F.relu`, ``"relu"`` and ``"relu_"``.

    Everything but ``relate`` has a default that is safe: nothing wrong is done with an op that says no more, but
    `widen` and `deepen` find fewer ways through it.
    """

    relate: Callable[..., Any]
    """Says how the axes of the op's tensors relate (`surgery.Op`). It takes the op and the arguments of the function,
    by the function's names; for a layer, which is called with fewer, the others have defaults."""
    targets: tuple[Any, ...] = ()
    """The spellings: functions, names of methods, classes of layers."""
    rewrite: Callable[[NodeEdit], None] | None = None
    """Adapts the node's constants, or the layer's attributes, to an edit."""
    movement: bool = False
    """The op only moves data: its output can be had from its input by selecting positions."""
    linear: str = ""
    """How the op is linear, beyond only moving data: one of the keys of `LINEAR`, or empty."""
    contracts: str = ""
    """How the op reads its argument ``input`` by its parameter ``weight``: one of the keys of `CONTRACTS`, or empty."""
    zeros: tuple[str, ...] = ()
    """Parameters, as the layer or ``relate`` names them, with which all of the op's first output is 0: those of what
    it does last. An affine op needs an input that is 0 as well."""
    pole: int | None = None
    """Which operand, by its place, must not be 0 if the result or its gradient is to be finite: 1 of a division."""
    regular: float = 1
    """A number at which that operand gives a finite result and gradient."""
    within: bool | tuple[float, float] = False
    """Bounds of the output's numbers. True: the least and the greatest of the input and 0, as in pooling."""
    kind: str = ""
    """What the op is besides: one of the keys of `KINDS`, or empty."""
    over: Callable[..., Any] | None = None
    """A norm whose statistics leave channels out: called with the input, a bool mask of the channels to keep (of the
    shape of the norm's weight) and, by name, the layer's attributes or the function's arguments that it asks for."""
    in_place: tuple[Any, ...] = ()
    """Further spellings, which change their first argument. (So do all with the argument or attribute ``inplace``.)"""
    tensors: tuple[str, ...] = ()
    """Names of the layer's parameters and buffers, besides ``weight`` and ``bias``."""
    python: str | Callable[[Mapping[str, Any]], bool] = ""
    """Whether the op follows an edit where Python calls it outside a graph, so that its arguments stay as they are:
    ``"always"``, ``"never"``, ``"sizes"`` (if each size that changes is -1 or was read from such an axis), or a
    function of the arguments by name. By default an op follows always, and one with a rewrite never."""
    finite: bool | Callable[..., Any] | None = None
    """For what Python asks of numbers before it branches: what the op finds of a number that is finite, or how it sums
    up such findings."""
    macs: Callable[..., int | None] | None = None
    """The multiply-accumulates of one call, from shapes alone: called with the shape of the output, ``layer`` (or
    None), and by name the function's arguments, with the shape of each tensor in its place; of a layer also the shapes
    of its parameters. None where they cannot be told. What has no ``macs`` multiplies nothing."""

    @property
    def activation(self) -> bool:
        return self.kind in ("activation", "gate", "idempotent", "learned activation")

    @property
    def norm(self) -> bool:
        return self.kind.endswith("norm")

    @property
    def layer(self) -> type[nn.Module] | None:
        """The class of layers that does what the op does."""
        return next((t for t in self.targets if _is_layer(t)), None)

    @property
    def name(self) -> str:
        """Of an activation, in recipes: its class in `torch.nn`; else the qualified name of its class or function."""
        known = self.layer or self.targets[0]
        if isinstance(known, str) or known.__module__.startswith(("torch.nn.modules", "surgery.layers")):
            return known if isinstance(known, str) else str(known.__name__)
        return f"{known.__module__}.{known.__qualname__}"

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """What a node is called with, by the names that ``relate`` has for it; empty where that does not fit."""
        return self.bound(node.args, node.kwargs)

    def bound(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """Arguments of the op by name."""
        try:
            given = dict(inspect.signature(self.relate).bind(None, *args, **kwargs).arguments)
        except TypeError:
            return {}
        kinds = list(inspect.signature(self.relate).parameters.values())
        given.pop(kinds[0].name)
        for kind in kinds:
            if kind.kind is kind.VAR_KEYWORD:
                given.update(given.pop(kind.name, {}))
        return given


CONTRACTS = {
    "linear": "the last axis, by the columns of the weight: Linear",
    "convolution": "the channels of a patch, with ``stride``, ``padding``, ``dilation`` and ``groups``",
    "transposed convolution": "likewise, the input spread; ``output_padding`` besides",
}

LINEAR = {
    "sum": "jointly linear in its operands, and alike for every channel: add, sub",
    "first": "linear in its first operand, and alike for every channel: dropout, a mean",
    "product": "linear in each of its operands: mul",
    "quotient": "linear in its first operand, with a factor for each position: div",
    "writes": "made of rows of weights, each of which gives a channel in the same way: Linear, Conv2d, matmul",
    "affine": "a factor and a term for each channel that no batch changes: FrozenBatchNorm2d",
}
"""The words that say how an op is linear."""

KINDS = {
    "activation": "applied position by position, behind layers: GELU",
    "gate": "an activation that is mostly a factor for something else: Sigmoid",
    "learned activation": "an activation with parameters, so that none is like another: PReLU",
    "idempotent": "an activation without settings that changes nothing when it is applied again: ReLU",
    "concatenation": "a movement that joins the tensors in its first argument along ``dim`` (or ``axis``): cat",
    "batch norm": "of each channel over batch and positions, with running statistics: BatchNorm2d",
    "instance norm": "of each channel over positions: InstanceNorm2d",
    "layer norm": "by mean and variance over the last axes: LayerNorm",
    "group norm": "by mean and variance over groups of channels: GroupNorm",
    "rms norm": "by the mean square over the last axes: RMSNorm",
    "fixed norm": "a factor and a term for each channel that no batch changes: FrozenBatchNorm2d",
    "restricted norm": "a norm whose statistics leave channels out already",
    "norm": "any other normalisation",
}
"""The words that say what an op is."""


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
    """Undo on exit what is registered inside the ``with`` block.

    Returns:
        a context manager.

    Example:
        >>> with surgery.restore_rules():
        ...     surgery.oprule(my_function, kind="activation")(lambda op, x: op.elementwise(x))
    """
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


class Words(TypedDict, total=False):
    """What a rule says besides how axes relate: see `Rule`."""

    rewrite: Callable[[NodeEdit], None] | None
    movement: bool
    linear: str
    contracts: str
    zeros: tuple[str, ...]
    pole: int | None
    regular: float
    within: bool | tuple[float, float]
    kind: str
    over: Callable[..., Any] | None
    in_place: tuple[Any, ...]
    tensors: tuple[str, ...]
    python: str | Callable[[Mapping[str, Any]], bool]
    finite: bool | Callable[..., Any] | None
    macs: Callable[..., int | None] | None


def oprule(*targets: Any, **words: Unpack[Words]) -> Callable[[Relate], Relate]:
    """Register the decorated function as the rule of ``targets``: functions, method names and module classes.

    A layer whose class has a rule is called as a whole by traced models, and so is a Python function that has one,
    where the model calls it by a global name. `Rule` explains the words, and `Op` what the function can say.

    Args:
        targets: the spellings of the op.
        words: what else is known of it, by the names of `Rule`.

    Returns:
        a decorator that gives back the function it decorates.

    Example::

        @surgery.oprule(my_package.Swoosh, my_package.swoosh, kind="activation")
        def _swoosh(op, x, slope=1.0):
            return op.elementwise(x)

    Raises:
        UsageError: an unknown word.
    """
    kind = words.get("kind", "")
    for what, word, known in (
        ("how an op is linear", words.get("linear"), LINEAR),
        ("how an op contracts", words.get("contracts"), CONTRACTS),
        ("the kind of an op", kind, KINDS),
    ):
        if word and word not in known:
            raise UsageError(f"unknown word {word!r} for {what}: one of {', '.join(map(repr, known))}")

    def register(relate: Relate) -> Relate:
        _load()  # first, so that a row of the user's replaces one of the package's
        _STATE["version"] += 1
        spellings = (*targets, *words.get("in_place", ()))
        moves = words.get("movement", False) or kind == "concatenation"
        row: Words = {**words, "movement": moves}
        rule = Rule(relate, spellings, **row)
        for target in spellings:
            if isinstance(target, str):
                _METHODS[target] = rule
            elif _is_layer(target):
                _MODULES[target] = rule
            else:
                _FUNCTIONS[target] = rule
        return relate

    return register


def _is_layer(target: Any) -> bool:
    return isinstance(target, type) and issubclass(target, nn.Module)


def ruled_functions() -> list[Any]:
    """The functions that have a rule."""
    _load()
    return list(_FUNCTIONS)


def rule_for(node: fx.Node, leaf: nn.Module | None) -> Rule:
    """The rule of a node; `UNKNOWN` where there is none."""
    _load()
    if leaf is not None:
        return _module_rule(leaf) or UNKNOWN
    return _METHODS.get(str(node.target), UNKNOWN) if node.op == "call_method" else rule_of_function(node.target)


def rule_of_function(function: Any) -> Rule:
    """The rule of a function; `UNKNOWN` where there is none."""
    _load()
    try:
        return _FUNCTIONS.get(function, UNKNOWN)
    except TypeError:  # an unhashable callable
        return UNKNOWN


def rule_of_class(module: nn.Module) -> Rule:
    """The rule of a layer's class or of the nearest of its bases, whatever the class changes; `UNKNOWN` without one."""
    _load()
    return next((rule for cls in type(module).__mro__ if (rule := _MODULES.get(cls)) is not None), UNKNOWN)


def activation_named(name: str) -> Rule:
    """The activation of that `Rule.name`.

    Raises:
        UsageError: there is none.
    """
    _load()
    rules = {id(r): r for table in (_MODULES, _FUNCTIONS) for r in table.values() if r.activation}.values()
    found = {rule.name: rule for rule in rules}
    if name not in found:
        raise unknown_name("activation", name, found)
    return found[name]


def layer_tensors() -> frozenset[str]:
    """The names that layers have for their parameters and buffers."""
    _load()
    return frozenset({"weight", "bias"}.union(*(rule.tensors for rule in _MODULES.values())))


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
    """A node that a rewrite adapts to an edit, and the shapes that the edit asks for.

    A rewrite changes numbers only; that the result is what the edit asked for is checked by the caller. Arguments go by
    the names that the rule's function has for them, as in the attributes of a layer.
    """

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
    computed: Mapping[fx.Node, tuple[int, ...]]
    """Values of the arguments that are shapes computed in the graph."""
    copies: Mapping[int, int]
    """For each dim of the first output how often every channel along it is there, where that is equally often."""
    tensors: Mapping[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]]
    """Old and new shapes of the arguments that are tensors, positional or not."""
    read: Mapping[fx.Node, Mapping[int, int]]
    """As ``copies``, for each of these."""
    sources: Mapping[int, Any]
    """For each changed dim of the first output the old position that each new one copies, (size,) of int64."""

    def argument(self, name: str, default: Any = None) -> Any:
        """What the function or method is called with, or the layer's attribute of that name."""
        if self.module is not None:
            return getattr(self.module, name, default)
        at = self._place(name)
        return self.node.args[at] if at < len(self.node.args) else self.node.kwargs.get(name, default)

    def set_argument(self, name: str, value: Any) -> None:
        """Change what `argument` gives."""
        node, at = self.node, self._place(name)
        if self.module is not None:
            setattr(self.module, name, value)
        elif at < len(node.args):
            node.args = (*node.args[:at], value, *node.args[at + 1 :])
        else:
            node.kwargs = {**node.kwargs, name: value}

    def tensor(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Old and new shape of an argument; None where it is no tensor."""
        value = self.argument(name)
        return self.tensors.get(value) if isinstance(value, fx.Node) else None

    def copies_of(self, name: str) -> Mapping[int, int]:
        """As ``copies``, for an argument that is a tensor."""
        value = self.argument(name)
        return self.read.get(value, {}) if isinstance(value, fx.Node) else {}

    def call(self, function: Any, *args: Any) -> fx.Node:
        """A new node, of the module that the node is in."""
        node = self.node.graph.call_function(function, args)
        node.meta["path"] = self.node.meta.get("path", "")
        return node

    def unpacked(self, shape: Any) -> Any:
        """A shape that another node computes, as a tuple of its entries; any other as it is."""
        size = self.computed.get(shape) if isinstance(shape, fx.Node) else None
        if size is None:
            return shape
        with self.node.graph.inserting_before(self.node):
            return tuple(self.call(operator.getitem, shape, k) for k in range(len(size)))

    def resized(self, shape: Any, first: int = 0) -> Any:
        """``shape``, the sizes of the first output from dim ``first`` on, as the edit asks for them."""
        new, old = self.shapes[0], self.old[0]
        return type(shape)(
            size if d not in self.changed or size == -1 else self._scaled(size, new[d], old[d])
            for d, size in enumerate(shape, start=first)
        )

    def _scaled(self, size: Any, new: int, old: int) -> Any:
        """A constant gives way to the new size. A size that is computed may hold others too (batch times heads)."""
        if not isinstance(size, fx.Node):
            return new
        factor = math.gcd(new, old)
        with self.node.graph.inserting_before(self.node):
            for function, number in ((operator.mul, new // factor), (operator.floordiv, old // factor)):
                size = size if number == 1 else self.call(function, size, number)
        return size

    def _place(self, name: str) -> int:
        names = list(inspect.signature(rule_for(self.node, self.module).relate).parameters)[1:]
        return names.index(name) if name in names else len(self.node.args)
