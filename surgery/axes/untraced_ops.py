"""What calls of torch in untraced Python can be relied on for after an edit: its constants stay as they are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from surgery.axes.labels import Field, Ids, Labelled
from surgery.axes.ops import Op
from surgery.graph.rule_table import Rule


class WatchedSize(int):
    """The size of an axis that holds channels, as Python sees it. Using it as anything but a size is reported."""

    used: Callable[[str], Any]
    ids: Ids

    @classmethod
    def of(cls, size: int, used: Callable[[str], Any], ids: Ids) -> WatchedSize:
        result = cls(size)
        result.used, result.ids = used, ids
        return result

    def plain(self) -> int:
        """The number, without a report."""
        return int.__int__(self)

    __hash__ = int.__hash__


def _watch(name: str) -> None:
    plain = getattr(int, name)

    def method(self: WatchedSize, *others: Any) -> Any:
        if not (name in _COMPARISONS and _is_settled(self, others[0])):
            self.used(f"its size in {name.strip('_')}")
        return plain(self, *others)

    setattr(WatchedSize, name, method)


def _is_settled(size: WatchedSize, other: Any) -> bool:
    """Whether a comparison comes out the same after any edit: an axis is never empty, and equals itself."""
    if isinstance(other, WatchedSize):
        return size.ids.size > 0 and np.array_equal(size.ids, other.ids)
    return not isinstance(other, (int, float)) or other == 0


_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_ARITHMETIC = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod"),
    *("pow", "rpow", "neg", "abs", "divmod", "rdivmod", "lshift", "rshift", "and", "or", "xor"),
    *("int", "float", "round", "floor", "ceil", "trunc"),
)
for _name in (*_COMPARISONS, *(f"__{n}__" for n in _ARITHMETIC)):
    _watch(_name)


NUMBERS = frozenset({"shape", "size", "numel", "nelement", "__len__"})
"""What gives sizes."""

HARMLESS = frozenset({
    *("dim", "ndim", "dtype", "device", "layout", "names", "requires_grad", "grad", "grad_fn", "_version", "itemsize"),
    *("is_cuda", "is_cpu", "is_mps", "is_meta", "is_xla", "is_sparse", "is_quantized", "is_nested", "is_signed"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_tensor", "is_leaf", "is_inference", "retains_grad"),
    *("element_size", "get_device", "_assert", "__hash__", "__repr__"),
})  # fmt: skip
"""What does not look at channels and gives no tensor."""


def _leading(args: Any, kwargs: Any, first: int) -> Any:
    given = args[first:] or (kwargs.get("size", ()),)
    return given[0] if isinstance(given[0], (tuple, list)) else given


FACTORIES: dict[str, Callable[[torch.Tensor, Any, Any], Any]] = {
    **dict.fromkeys(("zeros", "ones", "empty"), lambda _, args, kwargs: _leading(args, kwargs, 0)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty"), lambda _, args, kwargs: _leading(args, kwargs, 1)),
    "full": lambda _, args, kwargs: _leading(args[:1], kwargs, 0),
    "new_full": lambda _, args, kwargs: _leading(args[:2], kwargs, 1),
}
"""What makes a tensor that holds one number everywhere, and the sizes that it is given."""

_PROPERTIES = {"T": "t", "data": "detach"}


def name_call(func: Any) -> tuple[str, Any]:
    """Kind and target of the graph node that a call of ``func`` would be."""
    name = func.__name__
    if name in ("__get__", "__set__"):
        attribute = func.__self__.__name__
        harmless = name == "__get__" or attribute in HARMLESS
        return "call_method", _PROPERTIES.get(attribute, attribute) if harmless else "__set__"
    if not torch.overrides.is_tensor_method_or_property(func):
        return "call_function", func
    if name.startswith("__") and name not in ("__setitem__", "__rmatmul__"):
        bare = name.strip("_")
        for candidate in (bare, f"{bare}_", bare[1:]):
            if hasattr(operator, candidate) and candidate not in ("index", "length_hint"):
                return "call_function", getattr(operator, candidate)
    return "call_method", name


def count_axes(index: Any) -> int | None:
    """How many leading axes an index works on, all others being taken whole; None where that cannot be said."""
    items = list(index) if isinstance(index, tuple) else [index]
    while items and (items[-1] is Ellipsis or (isinstance(items[-1], slice) and items[-1] == slice(None))):
        items.pop()
    total = 0
    for item in items:
        if isinstance(item, torch.Tensor):
            total += item.ndim if item.dtype in (torch.bool, torch.uint8) else 1
        elif isinstance(item, (int, slice, list)):
            total += 1
        else:
            return None
    return total


def written_dims(target: torch.Tensor, index: Any, value: Any) -> dict[int, int]:
    """Of ``target[index] = value``: for each axis of ``value`` the axis of ``target`` that it runs along, where both
    are taken whole."""
    leading = count_axes(index)
    if leading is None or not isinstance(value, torch.Tensor):
        return {}
    shared = min(target.ndim - leading, value.ndim)
    return {
        value.ndim - r: target.ndim - r
        for r in range(1, shared + 1)
        if value.shape[value.ndim - r] == target.shape[target.ndim - r]
    }


def select_fields(index: Any, given: Labelled, rank: int) -> tuple[Field, ...] | None:
    """Fields of ``given[index]`` with ``rank`` axes, where tensors pick positions of leading axes that hold none."""
    leading = count_axes(index)
    if leading is None or not any(isinstance(i, torch.Tensor) for i in pytree.tree_leaves(index)):
        return None
    if any(d < leading for f in given.fields for d in f.dims):
        return None
    return tuple(Field(tuple(d + rank - given.ndim for d in f.dims), f.ids, f.key) for f in given.fields)


def find_unfollowed(op: Op, rule: Rule, given: Any, out: Any) -> Iterator[Field]:
    """Fields that the op would not follow an edit of as it is written in Python."""
    args, kwargs = given
    labels = [v for v in pytree.tree_leaves(given) if isinstance(v, Labelled)]
    results = [v for v in pytree.tree_leaves(out) if isinstance(v, Labelled)]
    inputs = [f for label in labels for f in label.fields]
    accepted: list[WatchedSize] = []
    follows = rule.python or ("always" if rule.rewrite is None else "never")
    if follows == "sizes":
        yield from _constant_sizes(args, kwargs, results[0], accepted)
    elif follows == "never" or (callable(follows) and not follows(rule.bound(args, kwargs))):
        yield from inputs
    for size in pytree.tree_leaves(given):
        if isinstance(size, WatchedSize) and not any(size is a for a in accepted):
            size.used(op.name)
    if rule.kind == "concatenation":
        for f in inputs:
            op.cut(f)
        return
    for f in (f for result in results for f in result.fields):
        if not any(_whole(f, g) for g in inputs):
            yield f
            yield from (g for g in inputs if np.isin(g.ids, f.ids).any())


def find_pinned(call: Callable[..., Any], given: Any, labels: Any, out: Any, numbers: Iterable[Any]) -> Iterator[Field]:
    """Fields that a movement hands on whole at their present size, and would not at another.

    ``x[:, :6]``, a roll by 6 or a shuffle of 6 groups change nothing where there are 6 channels. So the call is
    repeated on positions along an axis that is longer than any number it is given.

    Args:
        call: what moves.
        given: its positional and keyword arguments.
        labels: the same with `Labelled` tensors.
        out: its labelled result.
        numbers: further numbers that it depends on.
    """
    leaves = pytree.tree_leaves(given)
    longest = max([abs(n) for v in (*leaves, *numbers) for n in _whole_numbers(v) if abs(n) <= _LONGEST], default=0)
    if not longest:
        return
    results = [v for v in pytree.tree_leaves(out) if isinstance(v, Labelled)]
    for tensor, label in zip(leaves, pytree.tree_leaves(labels), strict=True):
        for f in label.fields if isinstance(label, Labelled) else ():
            places = [
                (k, g.dims[0])
                for k, result in enumerate(results)
                for g in result.fields
                if len(f.dims) == len(g.dims) == 1 and g.ids.size == f.ids.size and _whole(g, f)
            ]
            size = 1 + max(f.ids.size, longest)
            if places and not _keeps_positions(call, _resize(given, f, size), tensor, f.dims[0], size, places):
                yield f


_LONGEST = 2**16
"""Numbers above this do not count as positions along an axis of channels; ``x[:sys.maxsize]`` takes all there are."""


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, slice):
        for part in (value.start, value.stop, value.step):
            yield from _whole_numbers(part)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield int.__int__(value)


def _resize(given: Any, f: Field, size: int) -> Any:
    """The arguments as Python would give them if the axes of a field were so long."""

    def change(value: Any) -> Any:
        if isinstance(value, slice):
            return slice(change(value.start), change(value.stop), change(value.step))
        if isinstance(value, WatchedSize):
            return size if np.array_equal(value.ids, f.ids) else value.plain()
        return value

    return pytree.tree_map(change, given)


def _keeps_positions(
    call: Callable[..., Any], given: Any, tensor: torch.Tensor, dim: int, size: int, places: list[tuple[int, int]]
) -> bool:
    """Whether a call hands on an axis of another size, too, in its order, to these axes of its results."""
    shape = [size if d == dim else n for d, n in enumerate(tensor.shape)]
    positions = torch.arange(size)
    probe = positions.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: probe if t is tensor else t, given)
    try:
        found = [t for t in pytree.tree_leaves(call(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        moved = [found[k].movedim(d, -1) for k, d in places]
    except (RuntimeError, IndexError, ValueError, TypeError):  # a number that does not fit any longer
        return False
    return all(t.shape[-1] == size and bool((t == positions).all()) for t in moved)


def _constant_sizes(args: Any, kwargs: Any, out: Labelled, accepted: list[WatchedSize]) -> Iterator[Field]:
    sizes = next((kwargs[k] for k in ("shape", "size") if k in kwargs), args[1:])
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = sizes[0]
    if sizes and isinstance(sizes[0], Labelled):
        return  # as another tensor
    for f in out.fields:
        for d in f.dims:
            size = sizes[d]
            if isinstance(size, WatchedSize) and np.array_equal(size.ids, f.ids):
                accepted.append(size)
            elif int.__ne__(size, -1):
                yield f


def _whole(f: Field, g: Field) -> bool:
    """Whether ``f`` holds what ``g`` holds in its order, each channel as often as any other."""
    times = f.ids.size // max(g.ids.size, 1)
    return f.ids.size == times * g.ids.size and np.array_equal(f.ids.ravel(), np.repeat(g.ids.ravel(), times))
