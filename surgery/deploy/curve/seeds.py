"""A candidate over several seeds of its training: means, and Student's intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from surgery.training.history import History, Score


@dataclass(frozen=True)
class Repeat:
    """A candidate that was trained with a further seed.

    Attributes:
        score: of its ONNX file on the test images.
        training: the records of its training by stage.
        control: the score of its sizes trained from scratch with this seed; None without such a control, of which
            ``control_history`` is the record.
    """

    seed: int
    score: Score
    training: Mapping[str, History]
    control: Score | None = None
    control_history: History | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``low`` and ``high`` are the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of at least two values with Student's interval: it covers what seeds change, and nothing else.

    Example:
        >>> estimate([0.90, 0.92, 0.94]).mean
        0.92
    """
    seeds = len(values)
    mean = math.fsum(values) / seeds
    spread = float(np.std(values, ddof=1)) / math.sqrt(seeds)
    half = float(special.stdtrit(seeds - 1, 0.5 + confidence / 2)) * spread
    return Estimate(mean, mean - half, mean + half)


def paired(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The mean difference ``values - others``, seed by seed, with Student's interval."""
    return estimate([one - other for one, other in zip(values, others, strict=True)])
