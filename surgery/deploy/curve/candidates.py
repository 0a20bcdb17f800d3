"""Candidates of a curve: as text that people write, and as operations on the dense model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from surgery.counting.cost import cost
from surgery.errors import UsageError, unknown_name
from surgery.operations.deepen import deepen
from surgery.operations.importance.registry import How
from surgery.operations.slim import Rate, slim
from surgery.operations.widen import widen
from surgery.units import LIMITS, Amount, parse_amount

KINDS = ("slim", "widen", "deepen")

_FORM = "OPERATION=NUMBER or OPERATION:LAYER=NUMBER;LAYER=NUMBER, several joined by +, as in widen=1.5+deepen:layer3=1"


@dataclass(frozen=True)
class Operation:
    """An operation: ``kind`` is one of `KINDS`, ``amount`` a number, or a number for each of some layers."""

    kind: str
    amount: float | Mapping[str, Any]

    def __str__(self) -> str:
        if isinstance(self.amount, Mapping):
            return f"{self.kind}:{';'.join(f'{name}={_format_number(value)}' for name, value in self.amount.items())}"
        return f"{self.kind}={_format_number(self.amount)}"

    def apply(self, module: nn.Module, *, round_to: int, importance: How, seed: int) -> nn.Module:
        """Apply the operation, and return a new module."""
        amount: Any = self.amount
        if self.kind == "slim":
            return slim(module, amount, round_to=round_to, importance=importance)
        if self.kind == "widen":
            return widen(module, amount, break_symmetry="zero-sum", round_to=round_to, seed=seed)
        return deepen(module, amount, seed=seed)


@dataclass(frozen=True)
class Candidate:
    """A model of a curve: the operations on the dense model."""

    operations: tuple[Operation, ...]

    @property
    def rate(self) -> Rate | None:
        """The split rate of a model that is only slimmed."""
        only = self.operations[0]
        return only.amount if len(self.operations) == 1 and only.kind == "slim" else None

    @property
    def uniform_rate(self) -> float | None:
        """The split rate, if it is one number for the whole model."""
        return None if isinstance(self.rate, Mapping) else self.rate

    @property
    def name(self) -> str:
        """Text that `parse` reads: ``0.5``, ``layer3=0.5;layer4=0.25``, ``widen=1.5+deepen:layer3=1``."""
        text = "+".join(map(str, self.operations))
        return text if self.rate is None else text[len("slim") + 1 :]

    @property
    def folder(self) -> str:
        """A name for its files."""
        return f"rate-{self.name}" if self.uniform_rate is not None else folder_name(self.name)

    def apply(
        self,
        dense: nn.Module,
        *,
        round_to: int = 1,
        importance: How = "prefix",
        seed: int = 0,
        calibration: Any = None,
    ) -> nn.Module:
        """Make the candidate from the dense model, without training; fitted to ``calibration`` if only slimmed."""
        if calibration is not None and self.rate is not None:
            return slim(dense, self.rate, round_to=round_to, importance=importance, calibration=calibration)
        module = dense
        for operation in self.operations:
            module = operation.apply(module, round_to=round_to, importance=importance, seed=seed)
        return module


@dataclass(frozen=True)
class Budget:
    """A model of a curve: the dense model slimmed to a budget (`surgery.slim_to_budget`).

    Attributes:
        what: one of `LIMITS`.
        limit: in ms, or a count; with ``share``, a part of what the dense model takes, until `of` is called.
        text: the limit as it was written, with its unit.
    """

    what: str
    limit: float
    text: str
    share: bool = False
    rate: None = None
    uniform_rate: None = None

    @property
    def name(self) -> str:
        """Text that `parse` reads: ``latency=5ms``."""
        return f"{self.what}={self.text}"

    @property
    def folder(self) -> str:
        """A name for its files."""
        return folder_name(self.name)

    def of(self, dense: nn.Module) -> Budget:
        """Return the same budget with its limit in ms, or as a count."""
        if not self.share:
            return self
        takes = float(getattr(cost(dense), self.what))
        return replace(self, limit=Amount(self.what, self.limit, share=True).of(takes), share=False)


def parse_budget(what: str, text: str) -> Budget:
    """Parse a budget, as in ``5ms``, ``300M``, ``12MB`` and ``0.5``: see `surgery.units.parse_amount`.

    Raises `UsageError` for a share of a latency too: an unfinished run could not be told from one on another machine.
    """
    amount = parse_amount(what, text)
    if amount.share and what == "latency":
        raise UsageError(f"a budget of latency for a curve is a time, as in 5ms, not {text!r}")
    return Budget(what, amount.number, text.strip(), amount.share)


def folder_name(text: str) -> str:
    """``text`` without characters that are special to file systems or shells."""
    return re.sub(r"[^\w.=]+", "-", text.replace("*", "x")).strip("-.")


def of_rate(rate: Rate) -> Candidate:
    """The candidate that is slimmed at a rate. Raises `UsageError` for a rate outside (0, 1]."""
    for value in rate.values() if isinstance(rate, Mapping) else [rate]:
        if not 0 < value <= 1:
            raise UsageError(f"split rate {value:g} is outside (0, 1]")
    return Candidate((Operation("slim", rate),))


def parse(text: str) -> Candidate | Budget:
    """Parse a candidate.

    A number is a split rate, and ``LAYER=RATE;LAYER=RATE`` a rate for each of some layers, containers or globs. Other
    candidates are operations in this order, joined by ``+``: ``OPERATION=NUMBER`` for the whole model, or
    ``OPERATION:LAYER=NUMBER;...`` for some layers: ``widen=1.5``, ``slim:layer4=0.5+deepen:layer3=1``. A budget
    names its kind (`LIMITS`): ``latency=5ms``.

    Raises:
        UsageError: the text has none of these forms.
    """
    what, _, limit = text.partition("=")
    if what.strip() in LIMITS:
        return parse_budget(what.strip(), limit)
    if not re.match(r"\s*\w+\s*:", text) and what.strip() not in KINDS:
        return of_rate(_parse_amount(text, text))
    operations = []
    for part in text.split("+"):
        kind, separator, amount = _split(part)
        if kind not in KINDS:
            raise unknown_name("operation", kind, KINDS)
        value = _parse_amount(amount, text) if separator == ":" else _parse_number(amount, text)
        if isinstance(value, Mapping) != (separator == ":"):
            raise _unreadable(text)
        if kind == "deepen" and not isinstance(value, Mapping):
            raise UsageError(f"candidate {text!r} does not say where to deepen, as in deepen:layer3=1")
        operations.append(
            Operation(kind, float(value) if kind == "widen" and not isinstance(value, Mapping) else value)
        )
    only = operations[0]
    return of_rate(only.amount) if len(operations) == 1 and only.kind == "slim" else Candidate(tuple(operations))


def plan_candidates(rates: Sequence[Rate], candidates: Sequence[str]) -> tuple[Candidate | Budget, ...]:
    """The candidates of a run: rates for the whole model, in falling order, then the others as given.

    Raises:
        UsageError: no candidate, one that cannot be parsed or is given twice, or two for one folder.
    """
    found: list[Candidate | Budget] = [*map(of_rate, rates), *map(parse, candidates)]
    found.sort(key=lambda one: -(one.uniform_rate or 0))
    if not found:
        raise UsageError("no split rates were given: pass at least one in (0, 1]")
    names, folders = Counter(one.name for one in found), Counter(one.folder for one in found)
    for one in found:
        if names[one.name] > 1:
            what = "candidate" if one.uniform_rate is None else "split rate"
            raise UsageError(f"{what} {one.name} is given more than once")
    for one in found:
        if folders[one.folder] > 1:
            raise UsageError(f"two candidates would be written to {one.folder!r}: leave out {one.name!r}")
    return tuple(found)


def _split(part: str) -> tuple[str, str, str]:
    match = re.match(r"\s*(\w+)\s*([:=])(.*)", part, re.DOTALL)
    return (match[1], match[2], match[3]) if match else (part.strip(), "", "")


def _parse_amount(text: str, whole: str) -> Any:
    """Parse a number, or a number for each name."""
    if "=" not in text:
        return _parse_number(text, whole)
    values = {}
    for item in text.split(";"):
        name, _, number = item.rpartition("=")
        if not name.strip() or name.strip() in values:
            raise _unreadable(whole)
        values[name.strip()] = _parse_number(number, whole)
    return values


def _parse_number(text: str, whole: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _unreadable(whole)
    return value


def _unreadable(text: str) -> UsageError:
    return UsageError(f"candidate {text!r} is not of the form RATE, LAYER=RATE;LAYER=RATE, {_FORM}")


def _format_number(value: float) -> str:
    """The shortest text of a number that parses back; a factor stays one: 2.0, not 2 channels."""
    return (
        str(value) if isinstance(value, int) else f"{value:g}" if value != int(value) or value <= 1 else f"{value:.1f}"
    )
