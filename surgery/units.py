"""Figures as people read them, and budgets as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.errors import UsageError

LIMITS: Mapping[str, str] = {"latency": "latency_ms", "macs": "macs", "params": "params", "bytes": "bytes"}
"""Kinds of budgets in text, and the keyword of `surgery.slim_to_budget` for each."""

_COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "latency": {"": 1.0, "ms": 1.0, "s": 1e3, "us": 1e-3},
    "macs": _COUNTS,
    "params": _COUNTS,
    "bytes": {**_COUNTS, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}


def quantity(count: float | None) -> str:
    """Write a count with three or more digits, in thousands, millions or billions; ``?`` if unknown."""
    if count is None:
        return "?"
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return f"{count:g}"


def amount_text(value: float, kind: str) -> str:
    """Write what a budget of a kind, a keyword of `surgery.slim_to_budget`, measures: ``4.2 ms``, ``300.00 M MACs``."""
    if kind == "latency_ms":
        return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
    return mebibytes(value) if kind == "bytes" else f"{quantity(value)} {'MACs' if kind == 'macs' else 'parameters'}"


def counted(count: int, noun: str) -> str:
    """Write a count of things: ``1 epoch``, ``2 epochs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def mebibytes(count: float | None) -> str:
    """Write a number of bytes in MiB; ``?`` if unknown."""
    if count is None:
        return "?"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**20:.3f} MiB"


def sentence(text: str) -> str:
    """Write a text that begins with a small letter and has no full stop as a sentence; an empty one stays."""
    return text and f"{text[0].upper()}{text[1:]}."


@dataclass(frozen=True)
class Amount:
    """The amount of a budget.

    Attributes:
        what: one of `LIMITS`.
        number: in ms, or a count; with ``share``, a part of what the dense model takes, at most 1.
    """

    what: str
    number: float
    share: bool = False

    def of(self, dense: float) -> float:
        """Return the amount in ms, or as a count, for a dense model that takes ``dense``."""
        return self.number * dense if self.share else self.number


def parse_amount(what: str, text: str) -> Amount:
    """Parse the amount of a budget: a number with a unit, or a share.

    A percentage (``50%``) is a share of what the dense model takes, and so is a count of at most 1 (``0.5``); a latency
    without a unit is in ms.

    Args:
        what: one of `LIMITS`.

    Raises:
        UsageError: text that is not a number above 0 with a fitting unit, or a share above 100 %.

    Example:
        >>> parse_amount("macs", "300M").number, parse_amount("params", "40%").share
        (300000000.0, True)
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(%|[A-Za-z]*)\s*", text)
    counted = what != "latency"
    try:
        number = float(match[1]) if match else 0.0
        percent = bool(match and match[2] == "%")
        share = percent or bool(match and match[2] == "" and counted and number <= 1)
        limit = number / 100 if percent else number * _UNITS[what][match[2]] if match else 0.0
    except (KeyError, ValueError):
        limit, share = 0.0, False
    if limit <= 0 or (share and limit > 1):
        units = ", ".join(unit for unit in _UNITS[what] if unit)
        most = "1 or 100%" if counted else "100%"
        allowed = f"a number above 0 with an optional unit ({units}), or a share of the model's own, up to {most}"
        raise UsageError(f"a budget of {what} is {allowed}, not {text!r}")
    return Amount(what, limit, share)
