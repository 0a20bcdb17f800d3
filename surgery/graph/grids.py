"""Axes that together factor one, as heads and head_dim do, and which of them an edit may change.

After an edit such axes must still fill a rectangle, so only one of them may lose or gain positions. Which one is
decided when everything else that the rules said is known. Where positions are tied along all axes but one already (an
attention chooses whole heads), it is that one. Otherwise it is the last, and channels are chosen alike along the
others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from surgery.graph.labels import Ids

if TYPE_CHECKING:
    from surgery.graph.propagate import Books


@dataclass(frozen=True, eq=False)
class Grid:
    """Axes of which only one may change."""

    ids: Ids
    """Their positions' ids, in the shape of the axes."""
    what: str
    """The op that needs it."""
    partners: tuple[tuple[int, Ids], ...] = ()
    """Axes of other tensors that run along one of these: its number, and their ids. Where it is the one that may
    change they change with it, and otherwise not at all."""


def settle(books: Books) -> Ids:
    """Decide for every grid, add what follows to the books, and number the connected components of all ids."""
    component = components(books)
    undecided = books.grids
    while undecided:
        free = [_free_axes(component[grid.ids]) for grid in undecided]
        left = [grid for grid, axes in zip(undecided, free, strict=True) if len(axes) > 1]
        for grid, axes in zip(undecided, free, strict=True):
            if len(axes) <= 1:
                _fix(books, grid, *axes)
        if len(left) == len(undecided):
            for grid in left:
                rows = grid.ids.reshape(-1, grid.ids.shape[-1])
                _tie(books, rows[:1], rows)
        undecided = left
        component = components(books)
    return component


def components(books: Books) -> Ids:
    """For each id the number of its connected component under the ties."""
    if not books.ties:
        return np.arange(books.count, dtype=np.int64)
    a = np.concatenate([t[0] for t in books.ties])
    b = np.concatenate([t[1] for t in books.ties])
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(books.count, books.count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _free_axes(component: Ids) -> list[int]:
    """The axes along which positions are not all one."""
    return [k for k in range(component.ndim) if (component != component.take([0], axis=k)).any()]


def _fix(books: Books, grid: Grid, axis: int | None = None) -> None:
    for number, ids in grid.partners:
        if number == axis:
            _tie(books, np.moveaxis(grid.ids, axis, -1), ids)
        else:
            books.frozen.append((ids, f"{grid.what} shares it among heads, or other parts of an axis"))
    before = math.prod(grid.ids.shape[:axis]) if axis else 1
    if before > 1:
        rows = grid.ids.reshape(before, -1)
        what = f"{grid.what} reads parts of it that cannot be told apart"
        books.rows.append((rows[:-1, -1], rows[1:, 0], rows[:-1, 0], what))


def _tie(books: Books, a: Ids, b: Ids) -> None:
    x, y = np.broadcast_arrays(a, b)
    books.ties.append((x.ravel(), y.ravel()))
