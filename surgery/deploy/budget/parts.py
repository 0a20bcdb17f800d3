"""Parts of a model that are slimmed separately: its dimension groups, or its stages."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from surgery.axes.analysis import dimension_groups
from surgery.axes.groups import DimensionGroup
from surgery.errors import EditError, unknown_name
from surgery.operations.importance.registry import How
from surgery.operations.slim import slim


def find_parts(module: nn.Module, by: str) -> dict[str, tuple[DimensionGroup, ...]]:
    """Find the editable groups of a traced module by part, in the order of the forward pass.

    Args:
        by: ``"group"``: each group is a part. ``"stage"``: a part is all groups in one container, on the outermost
            level with four or more containers (``layer1`` … ``layer4`` of a ResNet).

    Raises:
        UsageError: another ``by``.
        EditError: no group can be edited.
    """
    if by not in ("group", "stage"):
        raise unknown_name("kind of part", by, ("group", "stage"))
    groups = [group for group in dimension_groups(module) if group.editable]
    if not groups:
        raise EditError("no dimension group of the model can be edited")
    found: dict[str, list[DimensionGroup]] = {}
    cut = _cut([group.name for group in groups]) if by == "stage" else None
    for group in groups:
        found.setdefault(group.name if cut is None else cut(group.name), []).append(group)
    return {name: tuple(members) for name, members in found.items()}


def _cut(names: Sequence[str]) -> Callable[[str], str]:
    """Map a layer's name to its stage's: open the largest container until there are four or more."""
    inside = ""
    while True:
        depth = inside.count(".")
        below = Counter(n.split(".")[depth] for n in names if n.startswith(inside) and n.count(".") >= depth)
        largest = below.most_common(1)[0][0]
        deeper = f"{inside}{largest}."
        if len(below) >= 4 or not any(n.startswith(deeper) for n in names):
            break
        inside = deeper

    def stage(name: str) -> str:
        pairs = zip(name.split("."), inside.split("."), strict=False)
        known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return ".".join(name.split(".")[: known + 1])

    return stage


def slim_each_alone(
    module: nn.Module,
    found: Mapping[str, Sequence[DimensionGroup]],
    rate: float,
    *,
    round_to: int = 1,
    importance: How = "prefix",
) -> Iterator[tuple[str, nn.Module]]:
    """Yield each part's name with the model in which it alone is slimmed."""
    for name, groups in found.items():
        yield name, slim(module, {g.name: rate for g in groups}, round_to=round_to, importance=importance)
