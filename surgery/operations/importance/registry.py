"""The registry of importance criteria: each is a function that scores the units of a dimension group."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from surgery.errors import UsageError, unknown_name, whole_number
from surgery.settings import IMPORTANCE

Scores = NDArray[np.float64]
"""A score for each unit of a group, (units,): the larger, the more the unit is worth keeping."""

Criterion = Callable[[Any], Any]
"""Scores the units of one group, of which a `surgery.Scored` tells: (units,)."""

ACROSS: Mapping[str, str] = {
    "mean": "in units of their mean over the group",
    "raw": "as they are",
    "never": "not at all",
}
"""How the scores of different groups compare."""

_BUILT_IN = ("surgery.operations.importance.criteria", "surgery.operations.importance.criteria_on_data")


@dataclass(frozen=True)
class Entry:
    """A row of the registry."""

    name: str
    function: Criterion
    across: str


_ENTRIES: dict[str, Entry] = {}
_STATE = {"loaded": False}

Function = TypeVar("Function", bound=Criterion)


def importance(
    name: str, *, words: str = "", across: str = "mean", replace: bool = False
) -> Callable[[Function], Function]:
    """Register the decorated function as an importance criterion.

    Its name is then taken wherever an ``importance`` is: `surgery.slim`, `surgery.split_masks`, `surgery.plan`,
    `surgery.slim_to_budget`, `surgery.sensitivity` and `surgery.tradeoff`. The function is called once for each group
    with a `surgery.Scored` and returns a score for each unit, (units,), the larger the more it is worth keeping. Of
    equal scores the first is kept.

    Args:
        name: of the criterion.
        words: which channels it keeps, in words, for reports and help; by default its name.
        across: how scores of different groups compare when groups are ranked together: ``"mean"``, in units of their
            mean over the group; ``"raw"``, as they are; ``"never"``, not at all, so that other rankings than the local
            one are refused. (An isomorphic ranking compares scores as they are.)
        replace: whether a criterion of that name gives way.

    Returns:
        a decorator that gives back the function it decorates.

    Raises:
        UsageError: the name is taken, or ``across`` is unknown.

    Example::

        @surgery.importance("bias", words="those with the largest biases")
        def bias(scored):
            found = [one for one in scored.slices if one.member.name.endswith(".bias")]
            if not found:
                return scored.instead("magnitude", "no layer of it has a bias")
            return sum(one.sum(abs(one.weight[:, 0])) for one in found)
    """
    if across not in ACROSS:
        raise unknown_name("comparison across groups", across, ACROSS)
    if not isinstance(name, str) or not name:
        raise UsageError(f"a criterion has a name, not {name!r}: @surgery.importance('mine')")

    def register(function: Function) -> Function:
        if not str(getattr(function, "__module__", "")).startswith(__package__):
            _load()
        if name in _ENTRIES and not replace:
            raise UsageError(f"importance {name!r} exists: choose another name, or pass replace=True")
        _ENTRIES[name] = Entry(name, function, across)
        if words or name not in IMPORTANCE or replace:
            IMPORTANCE[name] = words or name
        return function

    return register


@contextmanager
def restore_importance() -> Iterator[None]:
    """Undo on exit what `surgery.importance` registers inside the ``with`` block.

    Returns:
        a context manager.

    Example:
        >>> with surgery.restore_importance():
        ...     surgery.importance("mine")(lambda scored: -scored.slices[0].sum(scored.slices[0].squares))
    """
    _load()
    entries, words = dict(_ENTRIES), dict(IMPORTANCE)
    try:
        yield
    finally:
        for table, before in ((_ENTRIES, entries), (IMPORTANCE, words)):
            table.clear()
            table.update(before)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Importance:
    """A criterion with what it needs besides the weights. Taken wherever the name of a criterion is.

    Attributes:
        criterion: the name of a criterion, or a function as `surgery.importance` registers it.
        data: what a criterion on data looks at, in the forms that `surgery.slim` takes for ``calibration``; of a data
            set 512 training images. Labels are what a batch holds behind the model's inputs.
        seed: of what is random.
        loss: called with what the module returns and the batch as the data give it, on the module's device; returns
            the scalar whose gradients count. By default the cross-entropy of the logits and the labels.

    Raises:
        UsageError: an unknown criterion, or a seed below 0.

    Example:
        >>> surgery.slim(traced, 0.5, importance=surgery.Importance("taylor", data))
        >>> surgery.slim(traced, 0.5, importance=surgery.Importance("random", seed=1))
    """

    criterion: str | Criterion
    data: Any = None
    seed: int = 0
    loss: Callable[[Any, Any], Any] | None = None

    def __post_init__(self) -> None:
        find_entry(self.criterion)
        whole_number("seed", self.seed, 0)

    def __str__(self) -> str:
        return find_entry(self.criterion).name


class UnitScores(Mapping[str, Scores]):
    """Scores by the name of a group. `surgery.unit_scores` makes them; taken wherever an ``importance`` is.

    Attributes:
        name: of the criterion.
        across: how scores of different groups compare (`surgery.importance`).
        instead: groups that the criterion could not score, and by which other criterion they are and why.
        on_data: whether the criterion looked at data.

    Example:
        >>> scores = surgery.unit_scores(traced, "magnitude")
        >>> scores["layer1.0.conv1"].shape
        (64,)
    """

    def __init__(
        self,
        values: Mapping[str, Scores],
        name: str,
        across: str = "raw",
        instead: Mapping[str, str] | None = None,
        *,
        on_data: bool = False,
    ) -> None:
        self._values, self.name, self.across, self.on_data = dict(values), name, across, on_data
        self.instead = dict(instead or {})

    def __getitem__(self, name: str) -> Scores:
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


How = str | Criterion | Importance | Mapping[str, Any]
"""What is taken as an ``importance``: a criterion's name, a function, a criterion with data, or scores by group."""


def find_entry(criterion: str | Criterion) -> Entry:
    """The row of a criterion; a function that is not registered gets one of its own.

    Raises:
        UsageError: an unknown name, or what is neither a name nor a function.
    """
    _load()
    if isinstance(criterion, str):
        if criterion not in _ENTRIES:
            raise unknown_name("importance", criterion, _ENTRIES)
        return _ENTRIES[criterion]
    if not callable(criterion):
        raise UsageError(
            f"importance is the name of a criterion, a function, a surgery.Importance or scores by group, not "
            f"{criterion!r}"
        )
    known = next((entry for entry in _ENTRIES.values() if entry.function is criterion), None)
    return known or Entry(getattr(criterion, "__name__", type(criterion).__name__), criterion, "mean")


def importance_name(how: How) -> str:
    """The name of a criterion, for reports.

    Raises:
        UsageError: as `find_entry`.
    """
    if isinstance(how, Mapping):
        return how.name if isinstance(how, UnitScores) else "scores"
    return find_entry(how.criterion if isinstance(how, Importance) else how).name


def rank_on(how: How, data: Any) -> How:
    """The same importance, on ``data`` where it has none of its own."""
    if data is None or isinstance(how, Mapping):
        return how
    if isinstance(how, Importance):
        return how if how.data is not None else replace(how, data=data)
    return Importance(how, data)


def _load() -> None:
    """Register the criteria that the package has, once."""
    if not _STATE["loaded"]:
        _STATE["loaded"] = True
        for module in _BUILT_IN:
            importlib.import_module(module)
