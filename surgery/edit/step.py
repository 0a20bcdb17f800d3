"""The base class of all steps: one edit as data, which carries itself out and can be stored as JSON.

A new step is one file: a frozen dataclass that inherits `Step` and says what it does (`Step.apply`), where the tensors
of its result come from (`Step.origins`), what it inserts (`Step.inserted`) and how it reads (`Step.describe`). Its
fields are strings, numbers, flags, tuples, mappings with string keys, and frozen dataclasses of those; this file turns
them into JSON and back. Bounds of a number are part of its type: ``Annotated[int, msgspec.Meta(ge=1)]``.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from surgery.errors import CheckpointError, UsageError
from surgery.storage.documents import check_type

MEAN = -1
"""The entry of an index that stands for the mean of all units of its group (`surgery.edit.means`)."""


@dataclass(frozen=True, eq=False)
class AxisOrigin:
    """An axis that was gathered.

    Attributes:
        old: for each position the old one that it copies, or `MEAN` for the mean of all; int64, shape (n,).
        new: for each position whether an edit made it: a further copy of what another position holds too, or a mean;
            bool, shape (n,).
    """

    old: Tensor
    new: Tensor


@dataclass(frozen=True, eq=False)
class Origin:
    """The tensor, by its qualified name, that an edited one was gathered from; for each axis how, or None as it was."""

    name: str
    axes: tuple[AxisOrigin | None, ...]


@dataclass(frozen=True)
class Inserted:
    """A container that a step inserts.

    Attributes:
        name: its qualified name.
        after: qualified name of the layer or container behind whose output it stands.
        like: qualified name of the container that it copies; empty for none.
        norms: qualified names of BatchNorms in it that compute the identity, whatever statistics they are given.
    """

    name: str
    after: str
    like: str = ""
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step(ABC):
    """One edit of a traced module. Subclasses are frozen dataclasses; defining one registers it.

    Example:
        >>> @dataclass(frozen=True)
        ... class Negate(Step):
        ...     layer: str
        ...     def apply(self, module):
        ...         result = copy.deepcopy(module)
        ...         result.get_parameter(f"{self.layer}.weight").data.neg_()
        ...         return result
        >>> surgery.apply(traced, Negate("fc"))
    """

    known: ClassVar[dict[str, type[Step]]] = {}
    """All steps that are defined, by class name."""

    def __init_subclass__(cls) -> None:
        other = Step.known.setdefault(cls.__name__, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UsageError(f"a step {cls.__name__!r} is defined in {other.__module__} too: rename one of them")
        Step.known[cls.__name__] = cls

    @abstractmethod
    def apply(self, module: nn.Module) -> nn.Module:
        """Carry the step out on a traced module, which is not changed.

        Call `surgery.apply` instead, which records the step too.

        Returns:
            a new module that shares no storage with ``module``.

        Raises:
            EditError: the step would not be exact here.
            UsageError: the step names what is not there.
        """

    def apply_in_place(self, module: nn.Module) -> nn.Module:
        """Carry the step out on a module that nobody else holds, and that may be changed. By default this is `apply`.

        A step that changes little is faster so: a recipe of many such steps copies the model once.
        """
        return self.apply(module)

    def origins(self, module: nn.Module) -> Mapping[str, Origin]:
        """Where the tensors of the result come from, for those that ``module`` does not hold by the same name and in
        the same shape; tied ones under their first name. By default there are none."""
        return {}

    def inserted(self) -> tuple[Inserted, ...]:
        """The containers that the step inserts. By default there are none."""
        return ()

    def describe(self) -> str:
        """The step in one line of text."""
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{type(self).__name__}: {values if len(values) <= 100 else f'{values[:99]}…'}"

    def __str__(self) -> str:
        return self.describe()

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data; empty fields that are empty by default are left out."""
        return {"step": type(self).__name__, **_encode_fields(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Step:
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: an unknown step, a field that the step does not have or lacks, a value of another type.
        """
        name = data.get("step")
        cls = Step.known.get(str(name))
        if cls is None:
            raise CheckpointError(f"unknown step {name!r}: import the module that defines it first")
        step = _decode_fields(cls, {key: value for key, value in data.items() if key != "step"}, f"step {name}")
        assert isinstance(step, Step)
        return step


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _encode_fields(value: Any) -> dict[str, Any]:
    held = {f.name: (f, getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {name: _encode(item) for name, (f, item) in held.items() if not (_is_optional(f) and _is_empty(item))}


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _encode_fields(value)
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return _runs(value) if all(type(item) is int for item in value) else [_encode(item) for item in value]
    return value


def _is_optional(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (tuple, Mapping)) and not value)


def _decode_fields(cls: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where} is {short(data)}, not an object with fields")
    held = {f.name: f for f in dataclasses.fields(cls)}
    for name in data:
        if name not in held:
            raise CheckpointError(f"{where} has no field {short(name)}: its fields are {', '.join(held)}")
    for name, field in held.items():
        if name not in data and not _is_optional(field):
            raise CheckpointError(f"{where} lacks the field {name!r}")
    kinds = typing.get_type_hints(cls, include_extras=True)
    fields = {name: _decode(kinds[name], value, f"{name!r} of {where}") for name, value in data.items()}
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:  # what the class itself refuses
        raise CheckpointError(f"{where}: {error}") from error


def _decode(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``kind``; the runs of an index are expanded first."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union) and value is not None:
        others = [k for k in inner if k is not type(None)]
        if len(others) == 1:
            return _decode(others[0], value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {name: _decode(inner[1], item, f"{short(name)} in {where}") for name, item in value.items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, where)
    if origin is tuple and inner[0] is int and isinstance(value, list):
        value = list(_expand_runs(value, where))
        if any(type(item) is int and not -_WHOLE <= item < _WHOLE for item in value):
            raise CheckpointError(f"{where} holds a number beyond 64 bits")
    return check_type(value, kind, where)


_WHOLE = 2**63


def short(value: object) -> str:
    """The value as text that fits into a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _runs(index: Sequence[int]) -> list[int | str]:
    """``[0, 1, 2, 3, 7]`` as ``["0:4", 7]``."""
    result: list[int | str] = []
    start = 0
    for end in range(1, len(index) + 1):
        if end < len(index) and index[end] == index[end - 1] + 1:
            continue
        result.append(f"{index[start]}:{index[end - 1] + 1}" if end - start > 2 else index[start])
        if end - start == 2:
            result.append(index[start + 1])
        start = end
    return result


def count_units(data: Any) -> int:
    """The most entries that the indices in JSON data can have once their runs are expanded."""
    total, rest = 0, [data]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(item for item in value if isinstance(item, (list, Mapping)))
            total += sum(_length(item) if isinstance(item, str) else 1 for item in value)
    return total


def _length(run: str) -> int:
    """The number of entries of a run; 1 for other text."""
    first, _, last = run.partition(":")
    if not (_is_number(first) and _is_number(last)):
        return 1
    return max(int(last) - int(first), 0)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 19


def _expand_runs(runs: Iterable[Any], where: str) -> Iterator[Any]:
    for run in runs:
        if isinstance(run, str):
            first, _, last = run.partition(":")
            if not (_is_number(first) and _is_number(last)):
                raise CheckpointError(f"{where} cannot hold {short(run)}: a run is written 'first:last+1'")
            yield from range(int(first), int(last))
        else:
            yield run
