"""Write figures as people read them."""

from __future__ import annotations


def quantity(count: float | None) -> str:
    """Write a count with three or more digits, in thousands, millions or billions; ``?`` if unknown."""
    if count is None:
        return "?"
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return f"{count:g}"


def counted(count: int, noun: str) -> str:
    """Write a count of things: ``1 epoch``, ``2 epochs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def mebibytes(count: float | None) -> str:
    """Write a number of bytes in MiB; ``?`` if unknown."""
    if count is None:
        return "?"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**20:.3f} MiB"
