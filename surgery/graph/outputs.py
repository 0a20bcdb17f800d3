"""The tensors in what a model returns, whatever holds them."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from typing import Any

from torch import Tensor, nn

_SKIPPED = (str, bytes, bytearray, range, type, nn.Module, types.ModuleType, types.FunctionType, types.MethodType)


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
    return list(_walk(value, "", ()))


def _walk(value: object, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif value is not None and not isinstance(value, _SKIPPED) and id(value) not in above:
        for step, child in _children(value):
            yield from _walk(child, path + step, (*above, id(value)))


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
    for name, child in _attributes(value):
        if name not in known:
            yield f".{name}", child


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
