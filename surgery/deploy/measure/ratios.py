"""Statistics of a measurement: how much faster one model is than another, with an interval."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy import special

from surgery.errors import UsageError

Array = np.ndarray[Any, np.dtype[np.float64]]

_RESAMPLES = 2000

_WIDE = 1.25
"""The ratio of an interval's ends above which a machine is too noisy, even if the interval holds 1."""


@dataclass(frozen=True)
class Ratio:
    """Latency of one candidate over that of the baseline: below 1 it is faster.

    ``low`` and ``high`` bound it with ``confidence``; where 1 lies between them, no difference was shown. Over several
    ``sessions`` they cover what is drawn for each, such as where a model's weights come to lie in memory, by
    which two sessions of one file differ by 1 to 2%; within one session, what varies from round to round alone.
    """

    value: float
    low: float
    high: float
    confidence: float
    sessions: int = 1

    @property
    def contains_1(self) -> bool:
        """Whether the interval shows no difference."""
        return self.low <= 1 <= self.high

    @property
    def reach(self) -> float:
        """How far its interval reaches from 1: of an A/A check, the least difference that can be told, as a share."""
        return max(1 - self.low, self.high - 1)

    @property
    def inverse(self) -> Ratio:
        """The baseline's latency over the candidate's: how many times as fast it is."""
        return replace(self, value=1 / self.value, low=1 / self.high, high=1 / self.low)


def noise(check: Ratio | None, what: str, others: Mapping[str, Ratio] = MappingProxyType({})) -> str:
    """Say which differences a noisy run cannot tell apart; empty if ``check`` shows that it was not noisy.

    Args:
        check: the A/A check, the ratio of ``what`` to itself. It shows noise if it misses 1 or is too uncertain.
        others: ratios of the same run to ``what``: the sentence ends with those of them that cannot be told from 1.
    """
    if check is None or (check.contains_1 and check.high <= _WIDE * check.low):
        return ""
    within = [name for name, ratio in others.items() if abs(ratio.value - 1) <= check.reach]
    told = f"that holds for {', '.join(within)}" if within else "all others differ by more"
    return (
        f"differences below {_words(check.reach)} cannot be told apart in this run: measured against itself, {what} "
        f"took {check.low:.2f} to {check.high:.2f} times as long{f'; {told}' if others else ''}"
    )


def _words(share: float) -> str:
    """A difference in words: in percent, or beyond the double as a factor."""
    if share >= 1:
        return f"a factor of {1 + share:.1f}"
    return f"±{100 * share:.0f} %" if share >= 0.1 else f"±{100 * share:.2g} %"


def ratio_of_medians(times: Array, baseline: Array, confidence: float, rng: np.random.Generator) -> Ratio:
    """Compute the ratio of the medians of two candidates that took turns, with one time of each in every round.

    Its interval is the percentile interval of a paired, circular block bootstrap (Politis, Romano 1992).
    """
    ratios = np.array([np.median(times[r]) / np.median(baseline[r]) for r in _rounds_in_blocks(len(times), rng)])
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Ratio(float(np.median(times) / np.median(baseline)), low, high, confidence)


def ratio_over_sessions(
    times: Sequence[Array], baseline: Sequence[Array], confidence: float, rng: np.random.Generator
) -> Ratio:
    """Compute the ratio of two candidates that took turns in each of several sessions; each session set up both.

    Each session gives one number: the median over its rounds of the logarithm of the candidates' ratio, where each is
    the median of its turn. A disturbance of a round affects both, and cancels out. The ratio is the geometric mean over
    sessions. Its interval is the symmetric bootstrap-t interval (Hall 1988, On Symmetric Bootstrap Confidence
    Intervals) over sessions, since only sessions are independent of each other.

    Args:
        times: of each session an array (rounds, queries of a turn) of latencies in ms; ``baseline`` likewise, with as
            many sessions and rounds. For one session the interval covers the variation over its rounds.

    Raises:
        UsageError: there are too few sessions for this confidence, see `fewest_sessions`.
    """
    sessions = len(times)
    refuse_few_sessions(sessions, confidence)
    by_round = [_log_turns(a) - _log_turns(b) for a, b in zip(times, baseline, strict=True)]
    said = np.array([np.median(logarithms) for logarithms in by_round])
    if sessions == 1:
        medians = [np.median(by_round[0][rounds]) for rounds in _rounds_in_blocks(len(by_round[0]), rng)]
        ends = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
        value, low, high = np.exp([said[0], *ends]).tolist()
        return Ratio(value, low, high, confidence)
    mean, error = _mean_and_error(said)
    means, errors = _mean_and_error(said[rng.integers(sessions, size=(_RESAMPLES, sessions))])
    with np.errstate(divide="ignore", invalid="ignore"):  # where a resample holds one session only
        away = np.where(means == mean, 0.0, np.abs(means - mean) / errors)
    reach = np.quantile(away, confidence) * error
    value, low, high = np.exp([mean, mean - reach, mean + reach]).tolist()
    return Ratio(value, low, high, confidence, sessions)


def _rounds_in_blocks(count: int, rng: np.random.Generator) -> Iterator[Array]:
    """Yield resamples of so many rounds, in circular blocks, since a disturbance affects neighbouring rounds."""
    length = round(count ** (1 / 3))
    for start in rng.integers(count, size=(_RESAMPLES, -(-count // length), 1)):
        yield ((start + np.arange(length)) % count).ravel()[:count]


def fewest_sessions(confidence: float) -> int:
    """Return the fewest sessions that can bound a ratio: the range over fewer would not cover it.

    The range of n independent draws misses their median once in 2^(n-1) times; of 2, half of the resamples are useless.
    """
    return max(3, math.ceil(1 - math.log2(1 - confidence)))


def refuse_few_sessions(sessions: int, confidence: float) -> None:
    """Raise `UsageError` if so many sessions cannot bound a ratio with this confidence."""
    fewest = fewest_sessions(confidence)
    if 1 < sessions < fewest:
        raise UsageError(
            f"{sessions} sessions cannot bound a ratio with {confidence:.0%} confidence: take {fewest} or more, or 1, "
            "whose interval covers the variation from round to round alone"
        )


def early_stopping_estimate(times: Array, percentile: float, confidence: float = 0.99) -> float | None:
    """Estimate an upper bound of a percentile (between 0 and 1) of latency; None if the queries are too few.

    MLPerf Inference's early stopping for a single stream (inference rules, appendix "Early stopping criterion"; its
    LoadGen, ``early_stopping.cc`` and ``results.cc``): with t the most queries that may have been slower than the
    percentile, so that n queries have h = n - t others, h being large enough that the regularised incomplete beta
    function I_percentile(h, t + 1) <= 1 - confidence, the t - 1 slowest are left out and the slowest of the rest is
    the estimate. Of 99% confidence: at least 64 queries for p90, 130 for p95, 662 for p99.
    """
    count = len(times)

    def fits(over: int) -> bool:
        rest = count - over
        return rest > 0 and bool(special.betainc(rest, over + 1, percentile) <= 1 - confidence)

    if not fits(1):
        return None
    low, high = 1, count  # fits(low), not fits(high): what fits with more over the percentile fits with fewer
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return float(np.sort(times)[count - low])


def _mean_and_error(said: Array) -> tuple[Any, Any]:
    """Return the mean along the last axis, and its standard error."""
    return said.mean(axis=-1), said.std(axis=-1, ddof=1) / math.sqrt(said.shape[-1])


def _log_turns(times: Array) -> Array:
    """Return the logarithm of the median of each turn."""
    logarithms: Array = np.log(np.median(times, axis=1))
    return logarithms
