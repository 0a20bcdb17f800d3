"""What a chain of ops that move data selects from a value: found by running the chain on numbers.

Only the old graph is read here; `rewire` writes what is found into the new one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from surgery.axes.labels import Field, Ids, Labelled, full_index
from surgery.edit.sites import compute


@dataclass(frozen=True)
class Selection:
    """Positions of one axis of a value, taken after its axes were put in another order."""

    held: Field
    """The axis that is selected from."""
    order: tuple[int, ...]
    places: Ids
    then: tuple[Any, ...] | None
    """An index that leaves the axis whole, to be taken last."""


def find_selection(
    module: nn.Module, record: Callable[[fx.Node], Any], chain: list[fx.Node], start: Labelled, asked: Field
) -> Selection | None:
    """What the ops of ``chain``, the last first, select from ``start`` along the axis that is asked for.

    ``module`` owns their graph, and ``record`` gives the value of any other node that they read. None where they do
    anything else than select.
    """
    numbers = torch.arange(start.value.numel()).reshape(start.shape)
    for whole, at, rest in _replay(module, record, chain, numbers, asked.dims[0]):
        result, dim, then = _without_new_dims(whole, at, rest, numbers.ndim)
        along = result[tuple(slice(None) if d == dim else 0 for d in range(result.ndim))]
        for held in start.fields:
            if len(held.dims) > 1:
                continue
            axis = held.dims[0]
            places = (along // numbers.stride(axis)) % start.shape[axis]
            for order in _orders(numbers, result, axis, dim):
                expected = numbers.permute(order).index_select(dim, places)
                if result.shape == expected.shape and torch.equal(result, expected):
                    return Selection(held, order, np.asarray(places.numpy(), dtype=np.int64), then)
    return None


def _replay(
    module: nn.Module, record: Callable[[fx.Node], Any], chain: list[fx.Node], numbers: torch.Tensor, dim: int
) -> Iterator[tuple[torch.Tensor, int, tuple[Any, ...] | None]]:
    """What the ops make of ``numbers``, and the dim of it that is meant; also up to the last op's index if it has
    one that does more than to select along ``dim``, and the rest of that index."""
    env: dict[fx.Node, Any] = {first_input(chain[-1]): numbers}
    for node in reversed(chain):
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else _plain(record(n)))
        env[node] = compute(module, node, args, kwargs)
    yield env[chain[0]], dim, None
    parts = _split_index(chain[0], args, dim)
    if parts is not None:
        index, rest, axis = parts
        yield args[0][index], axis, rest


def _without_new_dims(
    result: torch.Tensor, dim: int, then: tuple[Any, ...] | None, rank: int
) -> tuple[torch.Tensor, int, tuple[Any, ...] | None]:
    """The result, the dim that is meant and the last index, with as many dims of size 1 left to that index as the
    result has more than ``rank``: the innermost ones, for the batch leads."""
    ones = [d for d, size in enumerate(result.shape) if size == 1 and d != dim]
    new = ones[len(ones) - (result.ndim - rank) :] if rank < result.ndim <= rank + len(ones) and then is None else []
    if not new:
        return result, dim, then
    index = tuple(None if d in new else slice(None) for d in range(result.ndim))
    return result.squeeze(new), dim - sum(d < dim for d in new), index


def first_input(node: fx.Node) -> Any:
    """What a node reads first, also where it is named."""
    return node.args[0] if node.args else next((node.kwargs[k] for k in ("input", "tensor") if k in node.kwargs), None)


def _split_index(node: fx.Node, args: Any, dim: int) -> tuple[tuple[Any, ...], tuple[Any, ...], int] | None:
    """Indexing in two steps: the axis that becomes ``dim`` of the result first, the rest then; and that axis. None
    where there is no rest, or the node does anything else."""
    if node.target is not operator.getitem or not isinstance(args[0], torch.Tensor):
        return None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(i is None or i is Ellipsis or isinstance(i, (int, slice)) for i in index):
        return None
    index = full_index(index, args[0].ndim)
    at = [k for k, i in enumerate(index) if not isinstance(i, int)][dim]
    then = tuple(slice(None) if k == at else i for k, i in enumerate(index))
    if index[at] is None or all(i == slice(None) for i in then):
        return None
    axis = sum(i is not None for i in index[:at])
    return tuple(index[at] if d == axis else slice(None) for d in range(args[0].ndim)), then, axis


def _orders(numbers: torch.Tensor, result: torch.Tensor, held: int, dim: int) -> Iterator[tuple[int, ...]]:
    """Orders of dims in which a selection from ``numbers`` along ``held`` may give ``result``, where it is ``dim``.

    As they are or, where no two dims of size 1 could be mistaken for each other, such that numbers are as far apart.
    """
    if numbers.ndim != result.ndim:
        return
    if held == dim:
        yield tuple(range(numbers.ndim))
    origin = {dim: held}
    for d in range(result.ndim):
        if d != dim and result.shape[d] > 1:
            ends = result.select(d, 1).flatten()[0] - result.flatten()[0]
            near = (s for s in range(numbers.ndim) if numbers.shape[s] > 1 and numbers.stride(s) == int(ends))
            origin[d] = next(near, -1)
    rest = [d for d in range(result.ndim) if d not in origin]
    if len(rest) == 1:
        origin[rest[0]] = next((s for s in range(numbers.ndim) if s not in origin.values()), -1)
    if set(origin.values()) == set(range(numbers.ndim)):
        yield tuple(origin[d] for d in range(numbers.ndim))


def _plain(value: Any) -> Any:
    return value.constant if isinstance(value, Labelled) and value.constant is not None else value
