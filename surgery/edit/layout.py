"""Where everything goes: from an index over units to the new layout of every axis that holds them.

An axis is a sequence of runs of consecutive units (`surgery.axes.labels.runs`). In its new layout each run is replaced
by the new units that copy its members, in the order of the index. The rule is the same for every axis, so axes that
were tied before an edit are laid out alike after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.axes.labels import Field, Ids, Labelled, runs
from surgery.edit.step import MEAN


@dataclass(frozen=True, eq=False)
class Layout:
    """The new layout of an axis, or of several that factor one (then flattened, row-major)."""

    old: Ids
    """For each new position, the old position that it copies."""
    unit: Ids
    """For each new position, the new unit that it holds."""
    shape: tuple[int, ...] | None
    """New sizes of the axes; None where the new units do not fill a rectangle."""

    @property
    def units(self) -> Ids:
        """`unit` in the shape of the axes."""
        assert self.shape is not None
        return self.unit.reshape(self.shape)


class Layouts:
    """New layouts under an index for each of some groups."""

    def __init__(
        self,
        analysis: Analysis,
        indices: Mapping[DimensionGroup, Sequence[int]],
        shares: Mapping[DimensionGroup, Sequence[float]],
    ) -> None:
        self.fence, self.unit_of = analysis.fence, analysis.unit_of
        self.changed: NDArray[np.bool_] = np.zeros(analysis.count, dtype=bool)
        parts: list[Ids] = []
        means: list[Ids] = []
        first: dict[DimensionGroup, int] = {}
        at = 0
        for group in sorted(indices, key=lambda g: g.start):
            parts.append(np.arange(at, group.start))
            first[group] = sum(map(len, parts))
            index = np.asarray(indices[group], dtype=np.int64)
            means.append(first[group] + np.flatnonzero(index == MEAN))
            parts.append(np.where(index == MEAN, group.units - 1, index) + group.start)
            at = group.start + group.units
            self.changed[group.start : at] = True
        self.source: Ids = np.concatenate([*parts, np.arange(at, analysis.count)])
        """For each new unit, the old unit that it copies; a mean stands behind the copies of its group's last."""
        self.is_mean: NDArray[np.bool_] = np.zeros(len(self.source), dtype=bool)
        """For each new unit, whether it is the mean of its group."""
        if means:
            self.is_mean[np.concatenate(means)] = True
        self.copies: Ids = np.bincount(self.source[~self.is_mean], minlength=analysis.count)
        self.share: NDArray[np.float64] = np.where(self.is_mean, 0.0, 1.0 / np.maximum(self.copies[self.source], 1))
        """For each new unit, the factor of the layers that contract over it."""
        for group, values in shares.items():
            self.share[first[group] : first[group] + len(values)] = values
        self._by_source = np.argsort(self.source, kind="stable")
        self._count: Ids = np.bincount(self.source, minlength=analysis.count)
        self._begin = np.cumsum(self._count) - self._count
        self.further: NDArray[np.bool_] = self.is_mean | (
            np.arange(len(self.source)) != self._by_source[self._begin[self.source]]
        )
        """For each new unit, whether it is a mean or a copy of a unit that one before it copies."""
        self._cache: dict[tuple[bytes, tuple[int, ...]], Layout | None] = {}

    def of(self, units: Ids) -> Layout | None:
        """The new layout of an axis, given its units; None where nothing in it changes."""
        key = (units.tobytes(), units.shape)
        if key not in self._cache:
            self._cache[key] = self._layout(units) if self.changed[units].any() else None
        return self._cache[key]

    def along(self, field: Field) -> Layout | None:
        """The new layout of the axes of a field; None where nothing in it changes."""
        return self.of(self.unit_of[field.ids])

    def changes(self, value: Labelled) -> bool:
        """Whether any axis of a value changes."""
        return any(self.along(f) is not None for f in value.fields)

    def shape(self, value: Labelled) -> tuple[int, ...]:
        """The shape that the edit gives a value, with the old sizes of axes that do not fill a rectangle."""
        shape = list(value.shape)
        for f in value.fields:
            layout = self.along(f)
            if layout is not None and layout.shape is not None:
                for dim, size in zip(f.dims, layout.shape, strict=True):
                    shape[dim] = size
        return tuple(shape)

    def renumber(self, units: Ids) -> Ids:
        """Units that do not change, by their new numbers."""
        return np.asarray(self._by_source[self._begin[units]], dtype=np.int64)

    def _layout(self, units: Ids) -> Layout:
        flat = np.ascontiguousarray(units).ravel()
        start, run = runs(flat, self.fence)
        length = np.diff(np.concatenate((start, [len(flat)])))
        held = flat[start]
        stretch = np.repeat(np.arange(len(start)), self._count[held])
        new = self._by_source[_ragged(self._begin[held], self._count[held])]
        order = np.lexsort((new, run[stretch]))
        stretch, new = stretch[order], new[order]
        old = _ragged(start[stretch], length[stretch])
        unit = np.repeat(new, length[stretch])
        return Layout(old, unit, _rectangle(old, units.shape))


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """Channels last, where a tensor is laid out so and not otherwise."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if channels_last and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def _ragged(first: Ids, count: Ids) -> Ids:
    """``first[0], first[0] + 1, … (count[0] of them), first[1], …``"""
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - count, count) + np.repeat(first, count)


def _rectangle(old: Ids, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The sizes that the new positions fill when one of the old sizes changes; None where there are none."""
    if len(shape) == 1:
        return (len(old),)
    place = np.unravel_index(old, shape)
    for changing in reversed(range(len(shape))):
        rest = int(np.prod([s for k, s in enumerate(shape) if k != changing]))
        if len(old) % rest:
            continue
        sizes = tuple(len(old) // rest if k == changing else s for k, s in enumerate(shape))
        grid = np.indices(sizes, sparse=True)
        if all(np.array_equal(place[k].reshape(sizes), np.broadcast_to(grid[k], sizes))
               for k in range(len(shape)) if k != changing):  # fmt: skip
            return sizes
    return None
