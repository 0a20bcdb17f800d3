"""From the selectors a user writes to the dimension groups they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.axes.ledger import labelled_leaves
from surgery.errors import EditError, UsageError
from surgery.selectors import (
    Selector,
    Where,
    class_named,
    describe_selector,
    each_selector,
    is_glob,
    matches,
    rank,
    select,
)

K = TypeVar("K")
T = TypeVar("T")

_LAYER = 3
"""The rank of a name that is a group's, or that of a layer or parameter with channels."""


@dataclass(frozen=True)
class Wish(Generic[K, T]):
    """What one selector asks for."""

    selector: Selector
    rank: tuple[int, int]
    targets: tuple[K, ...]
    value: T


def resolve(
    analysis: Analysis, module: nn.Module, wishes: Mapping[Any, T], *, frozen: bool = False
) -> dict[DimensionGroup, T]:
    """The groups that each selector means, and what is asked of them.

    A selector (`surgery.selectors`) means the groups that the layers it matches write; a group's own name means it.
    Where several selectors reach one group, the most specific decides (`surgery.selectors.rank`).

    Args:
        wishes: by selector, what is asked.
        frozen: whether a group may be named that cannot be edited, to be left as it is.

    Raises:
        UsageError: a selector matches nothing, or two equally specific ones disagree.
        EditError: a named group or layer cannot be edited, or nothing that a selector matches can; with the reason.
    """
    asked = [_find(analysis, module, s, value, frozen) for where, value in wishes.items() for s in each_selector(where)]
    return decide(asked, lambda group: f"group {group.name!r}")


def find_places(module: nn.Module, wishes: Iterable[tuple[Where, T]]) -> dict[str, T]:
    """The layers and containers that each selector names, and what is asked of them: see `resolve`.

    Raises:
        UsageError: a selector matches nothing, or two equally specific ones disagree.
    """
    asked = [
        Wish(s, (_LAYER, 0) if names == (s,) else rank(s), names, value)
        for where, value in wishes
        for s in each_selector(where)
        for names in [select(module, s)]
    ]
    return decide(asked, repr)


def decide(asked: Sequence[Wish[K, T]], describe: Callable[[K], str]) -> dict[K, T]:
    """What is asked of each target, by the most specific wish; in the order of the wishes.

    Raises:
        UsageError: two equally specific wishes disagree.
    """
    decided: dict[K, Wish[K, T]] = {}
    for wish in sorted(asked, key=lambda w: w.rank, reverse=True):
        for target in wish.targets:
            other = decided.setdefault(target, wish)
            if other.value != wish.value and not _is_more_specific(other, wish):
                name = describe(target).removeprefix("group ")
                hint = f": name {name} as well to decide" if wish.rank[0] < _LAYER else ""
                raise UsageError(
                    f"{describe_selector(other.selector)} asks for {other.value} of {describe(target)}, "
                    f"{describe_selector(wish.selector)} for {wish.value}{hint}"
                )
    return {target: decided[target].value for wish in asked for target in wish.targets}


def _is_more_specific(wish: Wish[Any, Any], other: Wish[Any, Any]) -> bool:
    """Whether one wish decides where another of no higher rank disagrees."""
    kind = wish.rank[0]
    if kind != other.rank[0]:
        return True
    if kind == 0:
        ours, theirs = (class_named(s) if isinstance(s, str) else s for s in (wish.selector, other.selector))
        return isinstance(ours, type) and isinstance(theirs, type) and ours is not theirs and issubclass(ours, theirs)
    if kind == _LAYER:
        return False
    outer = str(other.selector)
    return wish.rank > other.rank if kind == 2 else not outer or str(wish.selector).startswith(f"{outer}.")


def _find(analysis: Analysis, module: nn.Module, selector: Selector, value: T, frozen: bool) -> Wish[DimensionGroup, T]:
    """The groups that one selector means."""
    named = analysis.layers
    own = {g.name: g for g in analysis.groups}
    if isinstance(selector, str):
        group = own.get(selector) or named.get(selector)
        if group is not None:
            if not (group.editable or frozen):
                raise EditError(f"group {group.name!r} cannot be edited: {group.reason}")
            return Wish(selector, (_LAYER, len(selector)), (group,), value)
    modules = dict(module.named_modules(remove_duplicate=False))
    more = [*named, *(own if isinstance(selector, str) and not is_glob(selector) else ())]
    names = matches(modules, selector, more)
    found: dict[DimensionGroup, None] = {}
    for name in names:
        inside = (g for n, g in named.items() if not name or n.startswith(f"{name}."))
        found.update(dict.fromkeys([named[name]] if name in named else inside))
    groups = tuple(g for g in found if g.editable)
    if not groups:
        reason = next(iter(found)).reason if found else _reason(analysis, names)
        what = f"{selector!r}" if names == [selector] else f"nothing that {describe_selector(selector)} matches"
        raise EditError(f"{what} {'cannot' if names == [selector] else 'can'} be edited: {reason}")
    return Wish(selector, rank(selector), groups, value)


def _reason(analysis: Analysis, names: list[str]) -> str:
    """Why layers that are in no group, or only read one, cannot be edited."""
    for name in names:
        for _, reason in analysis.reasons:
            if reason.startswith((f"{name} ", f"{name}.")):
                return reason
    written = {group.name: None for name in names for group in _groups_written_by(analysis, name)}
    if written:
        return f"it has no channels of its own; name the layer that writes them: {', '.join(map(repr, written))}"
    return "it holds no channels"


def _groups_written_by(analysis: Analysis, name: str) -> list[DimensionGroup]:
    """The groups whose channels are in the output of a layer or container."""
    units: list[Any] = []
    for (scope, node_name), value in analysis.values.items():
        path, graph = analysis.graphs[scope]
        node = next((n for n in graph.nodes if n.name == node_name and n.op == "call_module"), None)
        if node is not None and f"{path}.{node.target}.".lstrip(".").startswith(f"{name}."):
            units += [analysis.unit_of[f.ids].ravel() for label in labelled_leaves(value) for f in label.fields]
    held = np.unique(np.concatenate(units)) if units else np.zeros(0, np.int64)
    return [g for g in analysis.groups if ((held >= g.start) & (held < g.start + g.units)).any()]
