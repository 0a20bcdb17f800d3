"""Which units are kept: those with the best scores, of each group for itself or of several together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from surgery.axes.groups import DimensionGroup
from surgery.errors import UsageError, unknown_name
from surgery.operations.importance.registry import Scores, UnitScores
from surgery.settings import RANKINGS

Kept = NDArray[np.bool_]
"""For each unit of a group whether it is kept, (units,)."""


def check_ranking(ranking: str) -> None:
    """Raise `UsageError` for an unknown ranking."""
    if ranking not in RANKINGS:
        raise unknown_name("ranking", ranking, RANKINGS)


def keep_best(
    module: nn.Module, rates: Mapping[DimensionGroup, float], round_to: int, scores: UnitScores, ranking: str
) -> dict[DimensionGroup, Kept]:
    """For each unit of each group that a rate is for, whether it is kept.

    Args:
        module: what the groups are of.
        rates: the share of units to keep; with another ranking than ``"local"`` of all groups of the same rate that are
            ranked together.
        round_to: kept channels of a segment are rounded up to a multiple, as far as there are any.
        scores: of these groups.
        ranking: one of `RANKINGS`. In any, each class of each group keeps a unit at least.

    Raises:
        UsageError: an unknown ranking, or scores that do not compare across groups.
    """
    check_ranking(ranking)
    if ranking == "local":
        return {group: _keep_local(group, rate, round_to, scores[group.name]) for group, rate in rates.items()}
    if scores.across == "never":
        raise UsageError(
            f"importance {scores.name!r} does not compare channels of different groups: take ranking='local', or "
            "another importance"
        )
    kept: dict[DimensionGroup, Kept] = {}
    for rate, groups in _pools(module, rates, scores, ranking):
        found = {g: _comparable(g, scores, ranking) for g in groups}
        if len(found) == 1:
            kept |= {g: _keep_local(g, rate, round_to, own) for g, own in found.items()}
        else:
            kept |= _keep_together(found, rate, round_to)
    return {group: kept[group] for group in rates}


def _pools(
    module: nn.Module, rates: Mapping[DimensionGroup, float], scores: UnitScores, ranking: str
) -> Iterator[tuple[float, list[DimensionGroup]]]:
    """The groups that are ranked together, with their rate."""
    pools: dict[object, list[DimensionGroup]] = {}
    for group, rate in rates.items():
        kind: object = structure(module, group) if ranking == "isomorphic" else None
        if group.name in scores.instead:
            kind = group.name
        pools.setdefault((rate, kind), []).append(group)
    for groups in pools.values():
        yield rates[groups[0]], groups


def structure(module: nn.Module, group: DimensionGroup) -> tuple[tuple[str, ...], ...]:
    """What groups have in common that are isomorphic: the members in their order, each by the class of its layer, the
    name of its parameter there, its axis and its role. Sizes do not matter."""
    layers = dict(module.named_modules())

    def kind(layer: str) -> str:
        return type(layers[layer]).__qualname__ if layer in layers else ""

    return tuple(
        (kind(m.layer), m.name.rpartition(".")[2] if m.layer != m.name else "", str(m.axis), m.role)
        for m in group.members
    )


def _comparable(group: DimensionGroup, scores: UnitScores, ranking: str) -> Scores:
    """The scores of a group as they compare with those of others."""
    own = scores[group.name]
    if scores.across == "raw" or ranking == "isomorphic":
        return own
    mean = np.abs(own).mean()
    return own / mean if mean > 0 else own


def _keep_together(scores: Mapping[DimensionGroup, Scores], rate: float, round_to: int) -> dict[DimensionGroup, Kept]:
    """The best units of several groups: ``ceil(rate * n)`` of all that may go; of equal ones the first. The best unit
    of each class of each group stays before any other."""
    groups = list(scores)
    sizes = np.cumsum([0, *(group.units for group in groups)])
    every = np.concatenate([scores[group] for group in groups])
    free = np.concatenate([~group.frozen for group in groups])
    wanted = math.ceil(round(rate * int(free.sum()), 9))
    first = [
        start + int(part[scores[group][part].argmax()])
        for group, start in zip(groups, sizes, strict=False)
        for parts in group.free
        for part in parts
    ]
    order = np.argsort(-every, kind="stable")
    rest = order[free[order] & ~np.isin(order, first)]
    chosen = np.zeros(len(every), dtype=bool)
    chosen[[*first, *rest[: max(0, wanted - len(first))]]] = True
    return {
        group: _rounded(group, scores[group], chosen[start : start + group.units], round_to)
        for group, start in zip(groups, sizes, strict=False)
    }


def _rounded(group: DimensionGroup, scores: Scores, chosen: Kept, round_to: int) -> Kept:
    """As chosen, with the next best units of each segment up to a multiple."""
    keep = group.frozen | chosen
    step = _step(group, round_to)
    for parts in group.free:
        free = np.concatenate(parts)
        count = int(chosen[free].sum())
        more = min(len(free), math.ceil(count / step) * step) - count
        others = np.sort(free[~chosen[free]])
        keep[others[np.argsort(-scores[others], kind="stable")[:more]]] = True
    return keep


def _keep_local(group: DimensionGroup, rate: float, round_to: int, scores: Scores) -> Kept:
    """The units of each class with the largest scores, of equal ones the first; their number is shared out so that each
    segment keeps ``ceil(s * n)``."""
    keep = group.frozen.copy()
    step = _step(group, round_to)
    for parts in group.free:
        free = sum(map(len, parts))
        count = math.ceil(round(rate * free, 9))
        count = min(free, math.ceil(count / step) * step)
        for part, n in zip(parts, _share_out(count, [len(p) for p in parts]), strict=True):
            keep[part[np.argsort(-scores[part], kind="stable")[:n]]] = True
    return keep


def _step(group: DimensionGroup, round_to: int) -> int:
    return max(1, math.ceil(round_to * group.units / group.size))


def _share_out(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` in parts proportional to ``sizes``, by largest remainder; no part empty while there is enough."""
    exact = [total * s / sum(sizes) for s in sizes]
    parts = [max(1, math.floor(e)) for e in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda k: parts[k] - exact[k])
    for k in by_remainder * 2:
        if sum(parts) < total and parts[k] < sizes[k]:
            parts[k] += 1
    for k in reversed(by_remainder):
        if sum(parts) > total and parts[k] > 1:
            parts[k] -= 1
    return parts
