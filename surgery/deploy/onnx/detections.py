"""Whether two sets of detections are the same, in whatever order.

Detections come sorted by score, and scores tie: then rounding decides their order, and which of them is the last to be
kept. So detections are paired, not read side by side.
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

_NEEDED = ("boxes", "scores", "labels")


def are_detections(outputs: Any) -> bool:
    """Whether a module's outputs are, for each image, what torchvision's detection models return."""
    return isinstance(outputs, list) and bool(outputs) and all(map(_is_of_an_image, outputs))


def _is_of_an_image(one: Any) -> bool:
    return isinstance(one, dict) and all(hasattr(one.get(key), "shape") for key in _NEEDED)


def paired(found: Detections, expected: Detections, tolerance: float) -> tuple[Array, Array]:
    """Which detection of ``found`` is which of ``expected``: two arrays of indices, of one length.

    As many as can be are paired of the same label, scores that differ by at most ``tolerance``, and boxes whose sides
    differ by at most ``tolerance`` of the largest coordinate.
    """
    extent = max((float(np.abs(boxes["boxes"]).max(initial=0)) for boxes in (found, expected)), default=0.0)
    apart = cdist(found["boxes"], expected["boxes"], "chebyshev") / (extent or 1.0)
    apart = np.maximum(apart, cdist(found["scores"][:, None], expected["scores"][:, None], "chebyshev"))
    alike = (apart <= tolerance) & (found["labels"][:, None] == expected["labels"])
    rows, columns = linear_sum_assignment(np.where(alike, apart / (tolerance or 1), 1 + len(apart)))
    kept = alike[rows, columns]
    return rows[kept], columns[kept]


def unpaired(scores: Array, kept: Array, tolerance: float) -> Array:
    """The scores without a partner that are no tie with the lowest: of tied ones, rounding chooses which are kept."""
    alone = np.delete(scores, kept)
    notable: Array = alone[alone > scores.min(initial=np.inf) + tolerance]
    return notable
