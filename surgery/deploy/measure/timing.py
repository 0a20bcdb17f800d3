"""Time several candidates so that they can be compared: in sessions, rounds and turns.

A *session* sets up every candidate, in random order, and warms it up. It consists of *rounds*: in each, every candidate
has a *turn*, in an order drawn for the round. For models that answer fast, a turn is several queries in a row, after
one that does not count: the model before has pushed this one's weights out of the caches, which would not happen if it
ran alone.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from surgery.deploy.measure.environment import usable_cores
from surgery.deploy.measure.ratios import Array
from surgery.settings import TimingSettings

Call = Callable[[], object]
"""Answers one query: returns when the outputs are there."""

_WINDOW = 5
_SETTLED = 0.05
_WARM_AGAIN = 3
_TURN_MS = 50.0
_LONGEST_TURN = 5


@dataclass
class Series:
    """The times of one candidate: for each session an array (rounds, queries of a turn) in ms."""

    sessions: list[Array] = field(default_factory=list)
    warmup_runs: int = 0
    settled: bool = False

    @property
    def samples(self) -> Array:
        """All times in order."""
        return np.concatenate([times.ravel() for times in self.sessions])


def take_turns(
    setups: Sequence[Callable[[], Call]], settings: TimingSettings, rng: np.random.Generator
) -> list[Series]:
    """Time candidates until each has ``min_runs`` queries and ``min_seconds`` on average, spread over the sessions.

    The first session warms up each for at most ``warmup`` seconds (see `_warm_up`), the others with a few runs: the
    machine is warm by then, and a runtime does its one-time work at the very first runs.

    Args:
        setups: each sets up a candidate and returns its run.

    Returns:
        the times of each candidate.
    """
    sessions, min_runs, min_seconds = settings.sessions, settings.min_runs, settings.min_seconds
    series = [Series() for _ in setups]
    turn = 1
    with _resting_collector():
        for session in range(sessions):
            runs = _set_up(setups, rng)
            typical = []
            for index in rng.permutation(len(runs)):
                if session == 0:
                    one = series[index]
                    one.warmup_runs, one.settled, milliseconds = _warm_up(runs[index], settings.warmup)
                    typical.append(milliseconds)
                else:
                    for _ in range(_WARM_AGAIN):
                        runs[index]()
            if session == 0:
                turn = max(1, min(_LONGEST_TURN, math.ceil(_TURN_MS / max(min(typical), 1e-6)), min_runs // sessions))
            times = _session(runs, turn, math.ceil(min_runs / sessions), 1e3 * min_seconds / sessions, rng)
            for one, own in zip(series, times, strict=True):
                one.sessions.append(own)
            runs.clear()  # before others take their place, which may then be the same in memory
    return series


@contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...] | None]:
    """Keep this process, with all its threads, on as many cores as it uses threads.

    Gives the numbers of the cores, or None if the system cannot restrict them (only Linux can).
    """
    tasks = Path("/proc/self/task")
    if not hasattr(os, "sched_setaffinity") or not tasks.is_dir():
        yield None
        return
    cores = tuple(sorted(os.sched_getaffinity(0))[-min(threads, usable_cores()) :])
    before = {}
    for task in _numbers(tasks):
        try:
            before[task] = os.sched_getaffinity(task)
            os.sched_setaffinity(task, cores)
        except ProcessLookupError:  # it has ended meanwhile
            continue
    try:
        yield cores
    finally:
        here = before[os.getpid()]
        for task in _numbers(tasks):
            try:
                os.sched_setaffinity(task, before.get(task, here))
            except ProcessLookupError:
                continue


def _numbers(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


@contextmanager
def _resting_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _set_up(setups: Sequence[Callable[[], Call]], rng: np.random.Generator) -> list[Call]:
    """Set up each candidate, in random order, since the first may get the better place in memory."""
    made = {index: setups[index]() for index in rng.permutation(len(setups))}
    return [made[index] for index in range(len(setups))]


def _warm_up(run: Call, seconds: float) -> tuple[int, bool, float]:
    """Run until two windows of five runs in a row have medians within 5% of each other, or the time is up.

    Returns:
        the number of runs (at least 1), whether they settled, and the median of the last window in ms.
    """
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while not times or time.perf_counter() < deadline:
        times.append(_time_ms(run))
        if len(times) % _WINDOW == 0 and len(times) >= 2 * _WINDOW:
            before, after = np.median(times[-2 * _WINDOW : -_WINDOW]), np.median(times[-_WINDOW:])
            if abs(after - before) <= _SETTLED * before:
                return len(times), True, float(after)
    return len(times), False, float(np.median(times[-_WINDOW:]))


def _session(runs: Sequence[Call], turn: int, min_runs: int, min_ms: float, rng: np.random.Generator) -> list[Array]:
    rounds: list[list[list[float]]] = []
    spent_ms = 0.0
    while len(rounds) * turn < min_runs or spent_ms < min_ms * len(runs):
        times: list[list[float]] = [[] for _ in runs]
        for index in rng.permutation(len(runs)):
            if turn > 1:
                runs[index]()
            times[index] = [_time_ms(runs[index]) for _ in range(turn)]
            spent_ms += sum(times[index])
        rounds.append(times)
    return list(np.array(rounds).swapaxes(0, 1))


def _time_ms(run: Call) -> float:
    start = time.perf_counter_ns()
    outputs = run()
    elapsed = time.perf_counter_ns() - start
    del outputs  # freeing them is not part of answering
    return elapsed / 1e6
