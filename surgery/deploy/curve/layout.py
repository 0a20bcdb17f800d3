"""Layout of the charts of a curve: ranges of axes, and labels that do not overlap."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LONGEST = 28
"""Number of letters of the longest label."""

_RINGS = 8
"""Number of distances from its point at which a label is tried, a line of text apart."""

_SIDES = ((1, 1), (-1, -1), (1, -1), (-1, 1), (0, 1), (0, -1), (1, 0), (-1, 0))
"""Right or left, below or above; the first two leave a front free that rises to the right."""


@dataclass(frozen=True)
class Box:
    """A rectangle; its sides are in pixels, and y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The common area of two boxes."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, high)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Label:
    """The place of a label.

    Attributes:
        side: 1 if it is to the right of its point, -1 to the left, 0 in the middle.
        tie: end of a line from the point, if the label is far from it; else None.
    """

    box: Box
    side: int
    tie: tuple[float, float] | None


def reach(medians: Sequence[float], highs: Sequence[float]) -> float:
    """The end of an axis from 0: past all medians, and past the upper ends of their bars unless these are far out."""
    return 1.1 * min(max(highs), 1.2 * max(medians)) or 1.0


def short(text: str, most: int = LONGEST) -> str:
    """The text, cut off at ``most`` letters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    *,
    radius: float,
    taken: Sequence[Box] = (),
) -> list[Label]:
    """Find a place for the label of each point, within the area and without overlap with other labels or points.

    Labels are placed one after the other. If no place is free, the one with the least overlap is used. The same points
    give the same places.

    Args:
        points: positions of the points.
        sizes: width and height of each label.
        radius: radius of the dots at the points.
        taken: further boxes to avoid.
    """
    dots = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    found: list[Label] = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        others = [*dots, *taken, *(label.box for label in found)]
        tries = list(_around(x, y, width, height, radius))
        costs = [
            label.box.area - label.box.overlap(area) + sum(label.box.overlap(other) for other in others)
            for label in tries
        ]
        found.append(tries[costs.index(min(costs))])
    return found


def _around(x: float, y: float, width: float, height: float, radius: float) -> Iterator[Label]:
    """Places for the label of the point (x, y), the best first."""
    for ring, (right, below) in itertools.product(range(_RINGS), _SIDES):
        out = ring * height
        aside = 1.4 * radius + (out / 2 if below else out)
        away = (0.5 if right else 1.4) * radius + out
        left = x - width / 2 + right * (aside + width / 2)
        top = y - height / 2 + below * (away + height / 2)
        end = (min(max(x, left), left + width), min(max(y, top), top + height))
        yield Label(Box(left, top, left + width, top + height), right, end if ring else None)
