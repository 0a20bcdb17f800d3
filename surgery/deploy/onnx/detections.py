"""Compare two sets of detections in any order.

Detections come sorted by score, and scores tie: then rounding decides their order, and which of them is the last to be
kept. So detections are paired first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

Array = np.ndarray[Any, Any]
Detections = Mapping[str, Array]
"""Of one image: ``boxes`` (N, 4), ``scores`` (N,) and ``labels`` (N,); other arrays, such as ``masks``, have an entry
for each of the N, too."""

_NEEDED = {"boxes": 2, "scores": 1, "labels": 1}
"""How many axes each has."""


def are_detections(outputs: Any) -> bool:
    """Tell whether a module's outputs are those of torchvision's detection models, one dict for each image."""
    if not isinstance(outputs, list) or not outputs or not all(map(_is_of_an_image, outputs)):
        return False
    return len({tuple(one) for one in outputs}) == 1


def _is_of_an_image(one: Any) -> bool:
    if not isinstance(one, dict) or not one.keys() >= _NEEDED.keys():
        return False
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in one.items()}
    return len({shape[:1] for shape in shapes.values()}) == 1 and all(
        len(shapes[key]) == _NEEDED[key] for key in _NEEDED
    )


def pair(found: Detections, expected: Detections, tolerance: float) -> tuple[Array, Array]:
    """Pair the detections of ``found`` and ``expected``; return two index arrays of the same length.

    As many as possible are paired that have the same label, scores that differ by at most ``tolerance`` of the highest,
    and boxes whose sides differ by at most ``tolerance`` of the largest coordinate.
    """
    apart = cdist(found["boxes"], expected["boxes"], "chebyshev") / (_largest("boxes", found, expected) or 1.0)
    scores = cdist(found["scores"][:, None], expected["scores"][:, None], "chebyshev")
    apart = np.maximum(apart, scores / (_largest("scores", found, expected) or 1.0))
    alike = (apart <= tolerance) & (found["labels"][:, None] == expected["labels"])
    rows, columns = linear_sum_assignment(np.where(alike, apart / (tolerance or 1), 1 + len(apart)))
    kept = alike[rows, columns]
    return rows[kept], columns[kept]


def find_unpaired(found: Detections, expected: Detections, rows: Array, columns: Array, tolerance: float) -> Array:
    """Return the scores of detections without a partner that should have one.

    Rounding may drop detections whose scores exceed the lowest of both sides by at most ``tolerance`` of the highest:
    those need no partner, unless more than half of all detections have none.
    """
    scores = np.concatenate([found["scores"], expected["scores"]])
    alone = np.concatenate([np.delete(found["scores"], rows), np.delete(expected["scores"], columns)])
    if 2 * len(alone) > len(scores):
        return alone
    tie = scores.min(initial=np.inf) + tolerance * _largest("scores", found, expected)
    notable: Array = alone[~(alone <= tie)]
    return notable


def _largest(key: str, *detections: Detections) -> float:
    return max(float(np.abs(one[key]).max(initial=0)) for one in detections)
