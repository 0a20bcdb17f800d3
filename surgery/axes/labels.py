"""Positions as arrays: which channel each position of a tensor's axis holds.

A `Field` labels one axis of a tensor, or several that together factor one (heads x head_dim), with a channel id per
position. The functions here run an op's data movement on those ids; they know nothing of graphs or layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Shape = tuple[int, ...]
Pairing = tuple[Shape, Shape]


@dataclass(frozen=True, eq=False)
class Field:
    """Channel ids over ``dims`` of a tensor; ``ids`` has the sizes of those dims as its shape."""

    dims: tuple[int, ...]
    ids: Ids
    key: Any = None
    """Where the field stands, for explanations: ``("param", name, axis)`` or ``("node", scope, name)``."""
    repeats: bool = False
    """Whether every position holds the same numbers, as where an op expands an axis."""


Fields = tuple[Field, ...]


@dataclass(frozen=True, eq=False)
class Labelled:
    """A tensor as the analysis sees it: a meta tensor for its shape, and its labelled axes."""

    value: torch.Tensor
    fields: Fields = ()
    constant: torch.Tensor | None = None
    """The real tensor, where it is a parameter or buffer of the module."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def at(self, dim: int) -> Field | None:
        """The field that includes ``dim``."""
        dim %= max(self.ndim, 1)
        return next((f for f in self.fields if dim in f.dims), None)


def move_field(field: Field, dims: tuple[int, ...], ids: Ids | None = None) -> Field:
    """The field with new dims (ascending after transposition) and, where given, new ids."""
    ids = field.ids if ids is None else ids
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    if order != list(range(len(dims))):
        ids = ids.transpose(order)
    return Field(tuple(dims[i] for i in order), ids, field.key, field.repeats)


def permute_fields(fields: Fields, order: tuple[int, ...]) -> Fields:
    """Fields after ``tensor.permute(order)``."""
    place = {old: new for new, old in enumerate(order)}
    return tuple(move_field(f, tuple(place[d] for d in f.dims)) for f in fields)


def reshape_fields(
    fields: Fields, old: Shape, new: Shape, *, pairing: Pairing | None = None, whole: bool = False, places: bool = False
) -> tuple[Fields, list[Field]]:
    """Fields after a row-major reshape, and the fields that cannot be followed because two of them merge.

    Args:
        pairing: shapes to tell from which dims become which, where sizes of 1 leave that open.
        whole: keep the dims along which a field's ids do not vary.
        places: number the positions of the other dims that a field is merged with, so that all ids stay different.
    """
    blocks = _reshape_blocks(*(pairing or (old, new)))
    result: list[Field] = []
    lost: list[Field] = []
    for f in fields:
        touched = [b for b in blocks if set(b[0]) & set(f.dims)]
        ins = [d for b in touched for d in b[0]]
        outs = [d for b in touched for d in b[1]]
        merged = [g for g in fields if g is not f and set(g.dims) & set(ins)]
        if any(_varies_inside(b, g) for g in merged for b in touched) or (merged and f.ids.size == 1):
            lost.append(f)
            continue
        spread = np.ones(len(ins), dtype=np.int64)
        spread[[ins.index(d) for d in f.dims]] = f.ids.shape
        full = np.broadcast_to(f.ids.reshape(tuple(spread)), tuple(old[d] for d in ins))
        if places:
            others = tuple(1 if d in f.dims else old[d] for d in ins)
            full = full * math.prod(others) + np.arange(math.prod(others)).reshape(others)
        full = full.reshape(tuple(new[d] for d in outs))
        result.append(Field(tuple(outs), full, f.key) if whole else _drop_constant_dims(full, tuple(outs), f))
    return tuple(result), lost


def slice_fields(fields: Fields, index: tuple[Any, ...], rank: int) -> tuple[Fields, list[Field]]:
    """Fields after basic indexing with ints, slices, None and Ellipsis; and those where it picks one position."""
    index = full_index(index, rank)
    result: list[Field] = []
    picked: list[Field] = []
    place: dict[int, int | None] = {}
    take: dict[int, Any] = {}
    source = out = 0
    for item in index:
        if item is None:
            out += 1
            continue
        take[source] = item
        place[source] = None if isinstance(item, int) else out
        out += not isinstance(item, int)
        source += 1
    for f in fields:
        ids = f.ids[tuple(take[d] for d in f.dims)]
        dims = tuple(d for d in (place[d] for d in f.dims) if d is not None)
        if dims:
            result.append(move_field(f, dims, ids))
        else:
            picked.append(Field((), ids, f.key))
    return tuple(result), picked


def runs(ids: Ids, fence: NDArray[np.bool_]) -> tuple[Ids, Ids]:
    """Split a sequence of unit labels into runs of consecutive units.

    Args:
        ids: unit labels, in which unit ``u + 1`` is the next unit of ``u``'s group unless ``fence[u + 1]``.
        fence: for each unit, whether a run must not pass from the unit before it to it.

    Returns:
        ``(start, run)``: the first position of each stretch of equal labels, and the number of the run it belongs to.
    """
    change = np.flatnonzero(np.diff(ids)) + 1
    start = np.concatenate(([0], change)).astype(np.int64)
    length = np.diff(np.concatenate((start, [len(ids)])))
    unit = ids[start]
    breaks = (unit[1:] != unit[:-1] + 1) | (length[1:] != length[:-1]) | fence[unit[1:]]
    return start, np.concatenate(([0], np.cumsum(breaks))).astype(np.int64)


def full_index(index: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """The index with a slice for each dim that it leaves out or that its ellipsis stands for."""
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    if not any(i is Ellipsis for i in index):
        index = (*index, Ellipsis)
    at = next(k for k, i in enumerate(index) if i is Ellipsis)
    return (*index[:at], *[slice(None)] * (rank - used), *index[at + 1 :])


def _reshape_blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Pair runs of old dims with runs of new dims of equal product, as short as possible."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        ins, outs = [], []
        a = b = 1
        if i < len(old):
            a, ins, i = old[i], [i], i + 1
        if j < len(new):
            b, outs, j = new[j], [j], j + 1
        while a != b:
            if (a < b or j >= len(new)) and i < len(old):
                a, ins, i = a * old[i], [*ins, i], i + 1
            else:
                b, outs, j = b * new[j], [*outs, j], j + 1
        blocks.append((ins, outs))
    return _attach_empty_sides(blocks)


def _attach_empty_sides(blocks: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Leftover dims of size 1 stand alone on one side: let them join the block before them."""
    result: list[tuple[list[int], list[int]]] = []
    for ins, outs in blocks:
        if result and (not ins or not outs):
            result[-1] = (result[-1][0] + ins, result[-1][1] + outs)
        else:
            result.append((ins, outs))
    return result


def _varies_inside(block: tuple[list[int], list[int]], other: Field) -> bool:
    return bool(set(block[0]) & set(other.dims)) and other.ids.size > 1


def _drop_constant_dims(full: Ids, dims: tuple[int, ...], source: Field) -> Field:
    """Keep the dims along which the ids vary; where none does, the first of the largest."""
    varying = [
        k
        for k in range(full.ndim)
        if full.shape[k] > 1 and not np.array_equal(full, np.broadcast_to(full.take([0], axis=k), full.shape))
    ]
    if not varying and full.ndim:
        varying = [int(np.argmax(full.shape))] if source.ids.size == full.size else [0]
    index = tuple(slice(None) if k in varying else 0 for k in range(full.ndim))
    return Field(tuple(dims[k] for k in varying), np.ascontiguousarray(full[index]), source.key)
