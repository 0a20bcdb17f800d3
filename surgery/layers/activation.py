"""Activations as layers of their own, made from the op table's record of an op."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor, fx, nn

from surgery.graph.rule_table import Rule


class Applied(nn.Module):
    """A function, or a method of tensors, as a layer.

    Args:
        function: called with the input first; a string names a method.
        args, kwargs: what it is called with besides.
    """

    def __init__(self, function: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs

    def forward(self, input: Tensor) -> Any:
        function = getattr(type(input), self.function) if isinstance(self.function, str) else self.function
        return function(input, *self.args, **self.kwargs)

    def extra_repr(self) -> str:
        name = getattr(self.function, "__name__", self.function)
        return ", ".join([str(name), *map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())])


def make_activation(rule: Rule, node: fx.Node | None = None, leaf: nn.Module | None = None) -> nn.Module:
    """A layer that does what an activation does, however it is spelled, and that changes nothing in place.

    Args:
        rule: the record of the activation.
        node: what calls it, for its settings; by default the layer has those of its class.
        leaf: the layer that ``node`` calls, if it calls one.
    """
    if leaf is not None:
        made: Any = copy.deepcopy(leaf)
    elif rule.layer is not None:
        known = list(inspect.signature(rule.layer).parameters)
        made = rule.layer(**({} if node is None else _settings(node, known)))
    else:
        args, kwargs = (node.args[1:], node.kwargs) if node is not None else ((), {})
        made = Applied(rule.targets[0], *args, **kwargs)
    if getattr(made, "inplace", False):
        made.inplace = False
    assert isinstance(made, nn.Module)
    return made


def has_defaults(rule: Rule) -> bool:
    """Whether `make_activation` needs no node: the layer's class has a default for each of its settings."""
    settings = {} if rule.layer is None else inspect.signature(rule.layer).parameters
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in settings.values())


def _settings(node: fx.Node, known: list[str]) -> dict[str, Any]:
    """What a function is called with, as far as its layer has it too."""
    try:
        names = list(inspect.signature(node.target).parameters)[1:]  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a method, or a function of torch's core
        names = known
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    return {name: value for name, value in given.items() if name in known}
