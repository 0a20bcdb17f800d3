"""From the names a user writes to the groups they mean."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from surgery.errors import EditError, UsageError, unknown_name
from surgery.graph.dims import DimensionGroup, Dimensions

T = TypeVar("T")


def resolve(dims: Dimensions, module: nn.Module, wishes: Mapping[str, T]) -> dict[DimensionGroup, T]:
    """The group, or groups, that each name means.

    A name is a group's own, a layer that produces channels, a container (all layers inside), or a glob over layer
    names. Where several names reach one group the most specific decides: a layer before a glob before a container, a
    longer name before a shorter one.

    Raises:
        UsageError: a name matches nothing, or two equally specific names disagree.
        EditError: a group, or a layer of it, is named that cannot be edited, or a container or glob in which none can.
    """
    result: dict[DimensionGroup, T] = {}
    rank: dict[DimensionGroup, tuple[int, int]] = {}
    for name, wish in wishes.items():
        groups, precision = _matches(dims, module, name)
        for group in groups:
            before = rank.get(group, (-1, 0))
            if before == precision and result[group] != wish:
                raise UsageError(f"{name!r} asks for {wish} of group {group.name!r}, another name for {result[group]}")
            if precision >= before:
                result[group], rank[group] = wish, precision
    return result


def _matches(dims: Dimensions, module: nn.Module, name: str) -> tuple[list[DimensionGroup], tuple[int, int]]:
    layers = dims.layers
    own = {g.name: g for g in dims.groups}
    group = own.get(name) or layers.get(name)
    if group is not None:
        if not group.editable:
            raise EditError(f"group {group.name!r} cannot be edited: {group.reason}")
        return [group], (2, len(name))
    if any(c in name for c in "*?["):
        found, kind = {g: None for layer, g in layers.items() if fnmatchcase(layer, name)}, 1
    else:
        found, kind = {g: None for layer, g in layers.items() if layer.startswith(f"{name}.") or not name}, 0
    if not found:
        containers = (n for n, m in module.named_modules() if n and any(True for _ in m.children()))
        raise unknown_name("layer", name, dict.fromkeys([*layers, *containers, *own]))
    editable = [g for g in found if g.editable]
    if not editable:
        raise EditError(f"nothing that {name!r} matches can be edited: {next(iter(found)).reason}")
    return editable, (kind, len(name))
