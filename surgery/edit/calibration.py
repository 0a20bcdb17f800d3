"""Inputs to calibrate a network on, from what people have: tensors, batches, data sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate

from surgery.errors import UsageError
from surgery.graph.traced import info

IMAGES = 512
"""The most items of a data set that are read."""
_BATCH = 32
"""The most inputs that run at once, where they can be split."""
_FEW = 2
"""Of how many inputs a network is told to have what kinds of calls."""
_KEPT = 2**26
"""The most bytes of a data set that are kept from one reading to the next."""
_HELD_OUT = 4
"""Of so many batches the last is held out."""

_ROUNDING = 1e-3
"""Relative difference up to which outputs are the same."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named inputs of one call."""


class Calibration:
    """Inputs of a traced module that can be read again and again, in the same order.

    Args:
        module: it says how many inputs there are, of which dtype and on which device.
        given: a tensor, or a tuple of positional inputs, or a mapping of named ones: one batch; an iterable of
            batches; a data set of (image, label), a loader of one or `surgery.Data`, of whose training images 512 are
            taken, evenly. What a batch holds behind the model's inputs (labels) is left out.
        what: what the inputs are for, in errors.

    Raises:
        UsageError: there are no inputs.
    """

    def __init__(self, module: nn.Module, given: Any, *, what: str = "calibration") -> None:
        self._known = info(module)
        self._like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
        self._given = _open(given, what)
        self._size: int | None = None
        self._counts = [_count(inputs) for inputs in self._read()]
        if not self._counts:
            raise UsageError(f"{what} has no inputs: pass a batch of them, batches or a data set")

    @property
    def count(self) -> int:
        """The number of batches."""
        return sum(1 if self._size is None else -(-n // self._size) for n in self._counts)

    def few(self) -> tuple[Inputs, int]:
        """The first inputs, few if they can be split, and their number; 1 where it is not known."""
        _, first = next(self.batches())
        (few, *_) = _split(first, None if self._size is None else _FEW)
        return few, _count(few)

    def split_if_alike(self, run: Callable[..., Any]) -> None:
        """Split batches where a network gives for two inputs what it gives for each of them.

        Args:
            run: the network; it may write to what it is given.
        """
        _, first = next(self.batches())
        if _count(first) < 2:
            return
        parts = [
            pytree.tree_map_only(Tensor, partial(_rows, first=k, count=n), first) for k, n in ((0, 2), (0, 1), (1, 1))
        ]
        found = []
        try:
            for args, kwargs in pytree.tree_map_only(Tensor, torch.clone, parts):
                torch.manual_seed(0)
                found.append([leaf for leaf in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(leaf, Tensor)])
        except Exception:  # the model's own Python, which may raise anything: another batch than it was made for
            return
        both, *each = found
        if all(len(one) == len(both) for one in each) and all(map(_are_parts, both, *each)):
            self._split()

    def limit(self, size: int) -> None:
        """Run no more than so many inputs at once, if they can be split."""
        if self._size is not None:
            self._size = max(1, min(self._size, size))

    def _split(self) -> None:
        self._size = _BATCH
        if self.count < _HELD_OUT:
            self._size = max(1, math.ceil(max(self._counts) / math.ceil(_HELD_OUT / len(self._counts))))

    def batch(self, number: int) -> Inputs:
        """The batch of that number."""
        return next(inputs for at, inputs in self.batches() if at == number)

    def batches(self) -> Iterator[tuple[int, Inputs]]:
        """The batches with their numbers."""
        parts = (part for inputs in self._read() for part in _split(inputs, self._size))
        yield from enumerate(parts)

    @property
    def given(self) -> int:
        """The number of batches as they are given, none of them split."""
        return len(self._counts)

    def whole_batches(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
        """The batches as they are given: positional and named inputs, and all that a batch holds, on the device."""
        for batch in self._given:
            args, kwargs = pytree.tree_map_only(Tensor, self._place, self._inputs(batch))
            if all(leaf.numel() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
                yield args, kwargs, pytree.tree_map_only(Tensor, self._place, batch)

    @staticmethod
    def held_out(number: int) -> bool:
        """Whether the batch of that number is held out."""
        return number % _HELD_OUT == _HELD_OUT - 1

    def _read(self) -> Iterator[Inputs]:
        for batch in self._given:
            inputs = self._inputs(batch)
            if all(leaf.numel() for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)):
                yield pytree.tree_map_only(Tensor, self._place, inputs)

    def _inputs(self, batch: Any) -> Inputs:
        if isinstance(batch, Mapping):
            return (), dict(batch)
        if isinstance(batch, (tuple, list)):
            return tuple(batch[: max(len(self._known.args), 1)]), {}
        return (batch,), {}

    def _place(self, tensor: Tensor) -> Tensor:
        """The tensor on the model's device, a floating one in its dtype."""
        if self._like is None:
            return tensor
        return tensor.to(self._like.device, self._like.dtype if tensor.is_floating_point() else None)


def _open(given: Any, what: str) -> Iterable[Any]:
    """Batches that can be read again."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, DataLoader) and hasattr(given.dataset, "__len__"):
        return _Items(given.dataset, given.collate_fn)
    if isinstance(given, Mapping):
        return _open(given["train"], what) if "train" in given else [given]
    if isinstance(given, tuple) and given:
        return _open(given[0], what) if _is_data_set(given[0]) else [given]
    if hasattr(given, "train") and hasattr(given, "collate"):  # `surgery.Data`
        return _Items(given.train, given.collate or default_collate)
    if _is_data_set(given):
        return _Items(given, default_collate)
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
        raise UsageError(f"{what} takes inputs, batches of them or a data set, not {type(given).__name__}")
    return list(given) if iter(given) is given else given


def _is_data_set(given: Any) -> bool:
    known = hasattr(given, "__len__") and hasattr(given, "__getitem__")
    return known and not isinstance(given, (Tensor, Sequence, Mapping))


class _Items:
    """Batches of a data set, evenly from all of it; as many as there is room for are read once."""

    def __init__(self, data: Any, collate: Any) -> None:
        count = len(data)
        self.data, self.collate = data, collate
        self.places = [k * count // min(count, IMAGES) for k in range(min(count, IMAGES))]
        self.kept: dict[int, Any] = {}
        self.room = _KEPT

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self.places), _BATCH):
            batch = self.kept.get(first)
            if batch is None:
                batch = self.collate([self.data[k] for k in self.places[first : first + _BATCH]])
                size = sum(t.nbytes for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))
                if size <= self.room:
                    self.kept[first], self.room = batch, self.room - size
            yield batch


def _count(inputs: Inputs) -> int:
    """The size of a batch; 1 where it cannot be split."""
    leaves = pytree.tree_leaves(inputs)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    return sizes.pop() if len(sizes) == 1 and all(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves) else 1


def _are_parts(both: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether two outputs make up that of both inputs, to rounding."""
    if both.shape[:1] != (2,) or one.shape[:1] != (1,) or other.shape[:1] != (1,):
        return False
    if any(part.shape[1:] != both.shape[1:] for part in (one, other)):
        return False
    apart = (both - torch.cat([one, other])).abs().double()
    return bool(apart.max() <= _ROUNDING * both.abs().max()) if both.numel() else True


def _split(inputs: Inputs, size: int | None) -> Iterator[Inputs]:
    count = _count(inputs)
    if size is None or count <= size:
        yield inputs
        return
    for first in range(0, count, size):
        yield pytree.tree_map_only(Tensor, partial(_rows, first=first, count=size), inputs)


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    return tensor[first : first + count]
