"""From the names a user writes to the groups they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.errors import EditError, UsageError, unknown_name

T = TypeVar("T")


def resolve(analysis: Analysis, module: nn.Module, wishes: Mapping[str, T]) -> dict[DimensionGroup, T]:
    """The group, or groups, that each name means.

    A name is a group's own, a layer that produces channels, a container (all layers inside), or a glob over layer
    names. Where several names reach one group the most specific decides: a layer before a glob before a container, a
    glob that spells out more letters before one with fewer, a container before those that it is in.

    Raises:
        UsageError: a name matches nothing, or two names disagree of which neither is more specific.
        EditError: a group, or a layer of it, is named that cannot be edited, or a container or glob in which none can.
    """
    found = {name: _matches(analysis, module, name) for name in wishes}
    result: dict[DimensionGroup, T] = {}
    decided: dict[DimensionGroup, str] = {}
    for name in sorted(found, key=lambda n: (found[n][1], _letters(n)), reverse=True):
        groups, kind = found[name]
        for group in groups:
            other = decided.setdefault(group, name)
            wish = result.setdefault(group, wishes[name])
            if other != name and wish != wishes[name] and found[other][1] == kind and not _decides(other, name, kind):
                raise UsageError(
                    f"{other!r} asks for {wish} of group {group.name!r}, {name!r} for {wishes[name]}"
                    + (f": name {group.name!r} as well to decide" if kind < _LAYER else "")
                )
    return {group: result[group] for name in wishes for group in found[name][0]}


_CONTAINER, _GLOB, _LAYER = range(3)


def _decides(name: str, other: str, kind: int) -> bool:
    """Whether a name is more specific than another of its kind that has no more letters."""
    if kind == _CONTAINER:
        return not other or name.startswith(f"{other}.")
    return kind == _GLOB and _letters(name) > _letters(other)


def _letters(name: str) -> int:
    """How many characters of a name stand for themselves."""
    return len(re.sub(r"\[.*?\]|[*?]", "", name))


def _matches(analysis: Analysis, module: nn.Module, name: str) -> tuple[list[DimensionGroup], int]:
    """The groups that a name means, and what kind of name it is."""
    if not isinstance(name, str):
        raise UsageError(f"layers are named by strings, not {name!r}")
    layers = analysis.layers
    own = {g.name: g for g in analysis.groups}
    group = own.get(name) or layers.get(name)
    if group is not None:
        if not group.editable:
            raise EditError(f"group {group.name!r} cannot be edited: {group.reason}")
        return [group], _LAYER
    if any(c in name for c in "*?["):
        found, kind = {g: None for layer, g in layers.items() if fnmatchcase(layer, name)}, _GLOB
    else:
        found, kind = {g: None for layer, g in layers.items() if layer.startswith(f"{name}.") or not name}, _CONTAINER
    if not found:
        containers = (n for n, m in module.named_modules() if n and any(True for _ in m.children()))
        raise unknown_name("layer", name, dict.fromkeys([*layers, *containers, *own]))
    editable = [g for g in found if g.editable]
    if not editable:
        raise EditError(f"nothing that {name!r} matches can be edited: {next(iter(found)).reason}")
    return editable, kind
