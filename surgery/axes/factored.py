"""Axes that factor one, as heads x channels of a head do: which of them may change, and what follows for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from surgery.axes.labels import Ids
from surgery.axes.ledger import Findings, Grid, Row, pair

Tie = tuple[Ids, Ids]


@dataclass(frozen=True, eq=False)
class Settled:
    """What the rules said, after the decision for every grid.

    Attributes:
        component: for each id, the number of the connected component it is in under all ties.
        frozen: ids that must stay as they are, and why.
        rows: rows that must stay rows.
    """

    component: Ids
    frozen: tuple[tuple[Ids, str], ...]
    rows: tuple[Row, ...]


def settle(findings: Findings, grids: Sequence[Grid] = ()) -> Settled:
    """Decide for every grid, those in ``grids`` too, which of its axes may change. ``findings`` are not changed.

    A grid with one free axis is decided: that axis may change. This ties more ids, which may decide other grids. When
    it decides no more, the rows of the remaining grids are tied, so that the last of their free axes may change.
    """
    ties, frozen, rows = list(findings.ties), list(findings.frozen), list(findings.rows)
    component = find_components(ties, findings.count)
    undecided = [*findings.grids, *grids]
    while undecided:
        free = [_free_axes(component[grid.ids]) for grid in undecided]
        left = [grid for grid, axes in zip(undecided, free, strict=True) if len(axes) > 1]
        for grid, axes in zip(undecided, free, strict=True):
            if len(axes) <= 1:
                axis = axes[0] if axes else None
                ties += [pair(np.moveaxis(grid.ids, axis, -1), ids) for n, ids in grid.partners if n == axis]
                frozen += [(ids, _SHARED.format(grid.what)) for n, ids in grid.partners if n != axis]
                rows += _rows(grid, axis)
        if len(left) == len(undecided):
            for grid, axes in zip(undecided, free, strict=True):
                front = np.moveaxis(grid.ids, axes[-1], -1)
                lines = front.reshape(-1, front.shape[-1])
                ties.append(pair(lines[:1], lines))
        undecided = left
        component = find_components(ties, findings.count)
    return Settled(component, tuple(frozen), tuple(rows))


def find_components(ties: Sequence[Tie], count: int) -> Ids:
    """For each of ``count`` ids the number of its connected component under the ties."""
    if not ties:
        return np.arange(count, dtype=np.int64)
    a = np.concatenate([t[0] for t in ties])
    b = np.concatenate([t[1] for t in ties])
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _free_axes(component: Ids) -> list[int]:
    """The axes along which the positions are not all in one component."""
    return [k for k in range(component.ndim) if (component != component.take([0], axis=k)).any()]


def _rows(grid: Grid, axis: int | None) -> list[Row]:
    """The rows of a grid whose ``axis`` may change, if there are several."""
    before = math.prod(grid.ids.shape[:axis]) if axis else 1
    if before <= 1:
        return []
    rows = grid.ids.reshape(before, -1)
    return [(rows[:-1, -1], rows[1:, 0], rows[:-1, 0], f"{grid.what} reads parts of it that cannot be told apart")]


_SHARED = "{} shares it among heads, or other parts of an axis"
