"""Conditions on whether numbers are finite, by which Python guards against overflow.

Where all numbers are, what such a condition gives is known without them. A graph goes that way, and refuses others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgery.errors import UsageError
from surgery.graph.rule_table import rule_for


def is_finding(node: fx.Node) -> bool:
    """Whether a node says something of numbers, which nothing reads once Python has looked at it."""
    return node.op in ("call_function", "call_method") and rule_for(node, None).finite is not None


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

    def find(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        said = rule_for(value, None).finite if value.op in ("call_function", "call_method") else None
        if callable(said):
            return said(*map(find, value.args), **value.kwargs)
        if said is None or not isinstance(value.args[0], fx.Node):
            raise LookupError
        sources.append(value.args[0])
        return said

    try:
        result = find(node)
    except (LookupError, TypeError):
        return None
    return (bool(result), sources) if sources else None
