"""Conditions on whether numbers are finite, by which Python guards against overflow.

Where all numbers are, what such a condition gives is known without them. A graph goes that way, and refuses others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from surgery.errors import UsageError

_TESTS: dict[Any, bool] = {
    test: value
    for name, value in (("isfinite", True), ("isinf", False), ("isnan", False))
    for test in (name, getattr(torch, name))
}
"""Functions and methods that look at numbers, and what they find of a finite one."""

_SAME = ("any", "all", torch.any, torch.all)
"""What sums up many findings that are alike."""

_LOGIC: dict[Any, Callable[..., bool]] = {
    **dict.fromkeys(("logical_not", "bitwise_not", torch.logical_not, operator.invert), operator.not_),
    **dict.fromkeys(("logical_or", torch.logical_or, torch.bitwise_or, operator.or_), lambda a, b: a or b),
    **dict.fromkeys(("logical_and", torch.logical_and, torch.bitwise_and, operator.and_), lambda a, b: a and b),
}

FINITE = (*_TESTS, *_SAME, *_LOGIC)
"""The ops of such conditions: nodes that nothing reads once Python has looked at them."""


def expect_finite(value: torch.Tensor, where: str) -> None:
    """A node of the graph: refuse numbers that are not finite, for which the model's Python would go another way.

    Args:
        value: what Python looked at.
        where: the source line.

    Raises:
        UsageError: there are such numbers.
    """
    if not value.is_meta and not torch.isfinite(value).all():
        raise UsageError(
            f"{where}: there are numbers that are not finite here, for which the Python of the traced model goes a way "
            "that its graph does not have"
        )


fx.node.has_side_effect(expect_finite)


def where_finite(node: fx.Node) -> tuple[bool, list[fx.Node]] | None:
    """What a condition gives where all numbers that it looks at are finite, and which these are.

    Returns:
        None for any other condition.
    """
    sources: list[fx.Node] = []

    def find(value: Any) -> bool:
        if not isinstance(value, fx.Node):
            raise LookupError
        if value.op != "placeholder" and value.target in _TESTS and isinstance(value.args[0], fx.Node):
            sources.append(value.args[0])
            return _TESTS[value.target]
        if value.op.startswith("call_") and value.target in _SAME:
            return find(value.args[0])
        if value.op.startswith("call_") and value.target in _LOGIC:
            return _LOGIC[value.target](*map(find, value.args))
        raise LookupError

    try:
        return find(node), sources
    except LookupError:
        return None
