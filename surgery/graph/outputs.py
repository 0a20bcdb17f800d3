"""What a model returns: the tensors in it, whatever holds them, and how a graph makes an object of the same class."""

from __future__ import annotations

import collections
import enum
import types
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

_SKIPPED = (
    *(int, float, complex, str, bytes, bytearray, range, type(None), type, torch.dtype, torch.device, Tensor, fx.Proxy),
    *(nn.Module, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType),
)

Leaf = TypeVar("Leaf")


def tensors_in(value: object) -> list[tuple[str, Tensor]]:
    """Every tensor in a value, with the path that leads to it.

    Looks into tuples, lists, sets and mappings (subclasses too), and into the attributes of dataclasses and of any
    other object, in ``__dict__`` and ``__slots__``. Modules, classes and functions are not outputs: what they hold is
    left out. A cycle is followed once.

    Args:
        value: anything: a tensor, a container, an object.

    Returns:
        (path, tensor) pairs in the order of the containers and attributes. A tensor that stands in several places is
        listed at each of them. The path of ``value`` itself is empty.

    Example:
        >>> [path for path, _ in tensors_in({"logits": torch.ones(1), "states": (torch.ones(1), None)})]
        ["['logits']", "['states'][0]"]
    """
    return leaves_in(value, Tensor)


def leaves_in(value: object, kind: type[Leaf]) -> list[tuple[str, Leaf]]:
    """Every instance of ``kind`` in a value, found as `tensors_in` finds tensors."""
    return list(_walk(value, "", (), kind))


def _walk(value: object, path: str, above: tuple[int, ...], kind: type[Leaf]) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, kind):
        yield path, value
    elif not isinstance(value, _SKIPPED) and id(value) not in above:
        for step, child in _children(value):
            yield from _walk(child, path + step, (*above, id(value)), kind)


def _children(value: object) -> Iterator[tuple[str, object]]:
    """What a container or object holds, each with the text that reaches it."""
    known: Collection[object] = ()
    if isinstance(value, Mapping):
        known = value.keys()
        yield from ((f"[{key!r}]", child) for key, child in value.items())
    elif isinstance(value, (Sequence, Set)):
        names: Sequence[str] = getattr(value, "_fields", ())
        places = (f".{name}" for name in names) if names else (f"[{k}]" for k in range(len(value)))
        known = names
        yield from zip(places, value, strict=True)
    if type(value) not in _BARE:
        yield from ((f".{name}", child) for name, child in _attributes(value) if name not in known)


_BARE = (tuple, list, dict)
"""Containers that have no attributes."""


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    """The attributes that an object stores itself, by name."""
    for cls in reversed(type(value).__mro__):
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = (
                f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            )
            if name not in ("__dict__", "__weakref__") and hasattr(value, private):
                yield private, getattr(value, private)
    yield from getattr(value, "__dict__", {}).items()


@dataclass(frozen=True, eq=False)
class Rebuild:
    """The target of a node that makes an object like the one which the model's Python made while it was traced.

    Constructors are not run: the object gets the class, the items and the attributes that it had in the end.
    """

    cls: Any
    items: tuple[tuple[Any, Any], ...]
    """Keys, or places in a list, with constants; `VARIES` stands for the next value that the node is given."""
    attributes: tuple[tuple[str, Any], ...]

    def __call__(self, values: Sequence[Any]) -> Any:
        given = iter(values)
        result = self.cls.__new__(self.cls)
        if isinstance(result, list):
            list.extend(result, (next(given) if value is VARIES else value for _, value in self.items))
        base: Any = collections.OrderedDict if isinstance(result, collections.OrderedDict) else dict
        for key, value in () if isinstance(result, list) else self.items:
            base.__setitem__(result, key, next(given) if value is VARIES else value)
        for name, value in self.attributes:
            object.__setattr__(result, name, next(given) if value is VARIES else value)
        return result

    @property
    def __name__(self) -> str:
        return str(self.cls.__name__)


class _Entry(enum.Enum):
    VARIES = enum.auto()


VARIES = _Entry.VARIES


def taken_apart(value: object) -> tuple[Rebuild, tuple[Any, ...]] | None:
    """How to make an object that holds proxies, and from what; None for what fx can make itself."""
    if type(value) in _BARE or isinstance(value, (tuple, *_SKIPPED)) or not leaves_in(value, fx.Proxy):
        return None
    values: list[Any] = []

    def constant(child: Any) -> Any:
        if not leaves_in(child, fx.Proxy):
            return child
        values.append(child)
        return VARIES

    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    items = tuple((key, constant(child)) for key, child in entries)
    factory = [("default_factory", value.default_factory)] if isinstance(value, collections.defaultdict) else []
    attributes = tuple((name, constant(child)) for name, child in (*factory, *_attributes(value)))
    return Rebuild(type(value), items, attributes), tuple(values)
