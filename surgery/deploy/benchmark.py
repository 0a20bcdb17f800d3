"""What a model costs in practice: latency, throughput, memory and size, measured, with the samples and circumstances.

How it is measured. One query follows another (MLPerf's single stream), each timed by itself, for averages over blocks
have no tail. A query starts with its inputs on the device (in numpy arrays for ONNX Runtime on the CPU) and ends when
its outputs are there. Python's garbage collector rests meanwhile. Candidates that are compared take turns, in an order
drawn anew each round, so that a machine that slows down slows them all; what is said of them is the *ratio*.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from surgery.deploy.environment import Environment, environment, usable_cores
from surgery.deploy.memory import UnmeasuredError
from surgery.deploy.runners import Candidate, Job, Runner, ready
from surgery.errors import UsageError

_WINDOW = 5
_SETTLED = 0.05
_NOISY = 0.1
_RESAMPLES = 2000


@dataclass(frozen=True)
class BenchmarkResult:
    """One model, measured.

    Measured: ``samples_ms``, every timed query in order, and what follows from it; ``peak_memory_bytes``, see
    `surgery.deploy.memory.peak_memory`; ``file_bytes``, external weights included. Derived: ``macs`` of one sample and
    ``params``, as `surgery.cost` counts them; for an ONNX file of other make, ``macs`` is unknown and ``params`` the
    number of elements of its floating-point initialisers. What could not be had is None, and ``notes`` says why.
    """

    runtime: str
    device: str
    threads: int
    batch_size: int
    input_shapes: tuple[tuple[int, ...], ...]
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    iqr_ms: float
    throughput: float
    """Samples per second, one query at a time: batch size over mean latency."""
    peak_memory_bytes: int | None
    file_bytes: int | None
    macs: int | None
    params: int | None
    samples_ms: tuple[float, ...]
    warmup_runs: int
    warmup_settled: bool
    notes: tuple[str, ...]
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        shapes = [list(shape) for shape in self.input_shapes]
        return {**asdict(self), "input_shapes": shapes, "samples_ms": list(self.samples_ms), "notes": list(self.notes)}


@dataclass(frozen=True)
class Ratio:
    """Median latency of one candidate over that of the baseline: below 1 it is faster.

    ``low`` and ``high`` bound it with ``confidence`` as far as it varies from round to round; where 1 lies between
    them, no difference was shown. They do not cover what stays the same all through a run, such as where a model's
    weights came to lie in memory: two sessions of one file were seen to differ by 1 to 2% that way.
    """

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Comparison:
    """Candidates measured in one run, and each one's ratio to the first, the baseline."""

    baseline: str
    results: dict[str, BenchmarkResult]
    ratios: dict[str, Ratio]

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        return {
            "baseline": self.baseline,
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "ratios": {name: asdict(ratio) for name, ratio in self.ratios.items()},
        }


def benchmark(
    candidate: Candidate,
    *,
    runtime: str = "onnxruntime",
    batch_size: int = 1,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    threads: int | None = None,
    warmup: float = 5.0,
    min_runs: int = 100,
    min_seconds: float = 1.0,
    device: str = "cpu",
    memory: bool = True,
) -> BenchmarkResult:
    """Measure a module, or an ONNX file, in eval mode.

    Args:
        candidate: a module, which is not modified (for ONNX Runtime it is exported to a temporary file), or the path
            of an ONNX file.
        runtime: ``"onnxruntime"`` or ``"torch"`` (eager).
        batch_size: samples per query, axis 0 of the inputs.
        example_inputs: a tensor or a tuple of positional inputs, ``kwargs`` the named ones, of any batch size. A traced
            module and an ONNX file with one open axis, the batch, need none.
        threads: intra-op threads; by default, all the cores this process may use.
        warmup: the most seconds to warm up for. Warming up ends as soon as the median of five runs is within 5% of
            the median of the five before; ``warmup_settled`` says whether it came to that.
        min_runs, min_seconds: go on until both are reached: queries, and seconds spent in them.
        device: ``"cpu"`` or ``"cuda"``.
        memory: measure peak memory too, in a process of its own (some seconds).

    Raises:
        UsageError: the runtime or device is unknown or not here, or the inputs do not fit.
        ExportError: the module cannot be exported.
    """
    compared = compare(
        {"": candidate},
        runtime=runtime,
        batch_size=batch_size,
        example_inputs=example_inputs,
        kwargs=kwargs,
        threads=threads,
        warmup=warmup,
        min_runs=min_runs,
        min_seconds=min_seconds,
        device=device,
        memory=memory,
    )
    return compared.results[""]


def compare(
    candidates: Mapping[str, Candidate],
    *,
    runtime: str = "onnxruntime",
    batch_size: int = 1,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    threads: int | None = None,
    warmup: float = 5.0,
    min_runs: int = 100,
    min_seconds: float = 1.0,
    device: str = "cpu",
    memory: bool = True,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Measure several models in one run, taking turns, and each one's latency relative to the first.

    The interval of a ratio is a bootstrap over rounds, in blocks: a round holds one query of every candidate, so that
    what disturbed a round counts for all of them, and neighbouring rounds stay together, for disturbances last.

    Takes what `benchmark` takes. Each candidate answers the same number of queries, at least ``min_runs``, and on
    average they spend at least ``min_seconds`` on them. ``seed`` draws the order within rounds and the resamples.
    """
    threads = usable_cores() if threads is None else threads
    _refuse(candidates, batch_size=batch_size, threads=threads, min_runs=min_runs, confidence=confidence)
    here = environment()
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        stack.enter_context(torch.random.fork_rng(devices=[] if device == "cpu" else None))
        runners = {
            name: stack.enter_context(
                ready(runtime, Job(candidate, example_inputs, kwargs, batch_size, threads, device))
            )
            for name, candidate in candidates.items()
        }
        with _resting_collector():
            warmups = {name: _warm_up(runner.run, warmup) for name, runner in runners.items()}
            samples = _take_turns([runner.run for runner in runners.values()], min_runs, min_seconds, rng)
        results = {}
        for (name, runner), times in zip(runners.items(), samples, strict=True):
            warmup_runs, settled = warmups[name]
            peak, missing = _peak_memory(runner) if memory else (None, ())
            results[name] = BenchmarkResult(
                runtime=runtime,
                device=device,
                threads=threads,
                batch_size=batch_size,
                input_shapes=runner.input_shapes,
                **_statistics(times, batch_size),
                peak_memory_bytes=peak,
                file_bytes=runner.file_bytes,
                macs=runner.macs,
                params=runner.params,
                samples_ms=tuple(times.tolist()),
                warmup_runs=warmup_runs,
                warmup_settled=settled,
                notes=(*missing, *_doubts(times, settled)),
                environment=here,
            )
    baseline, *others = candidates
    ratios = {
        name: ratio_of_medians(times, samples[0], confidence, rng)
        for name, times in zip(others, samples[1:], strict=True)
    }
    return Comparison(baseline, results, ratios)


def _refuse(
    candidates: Mapping[str, Candidate], *, batch_size: int, threads: int, min_runs: int, confidence: float
) -> None:
    if not candidates:
        raise UsageError("nothing to measure: no candidates were given")
    for name, value in {"batch_size": batch_size, "threads": threads, "min_runs": min_runs}.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, not {confidence}")


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _warm_up(run: Callable[[], object], seconds: float) -> tuple[int, bool]:
    """Run until two windows in a row have the same median, or the time is up: how many runs, and whether it settled."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        times.append(_timed_ms(run))
        if len(times) % _WINDOW == 0 and len(times) >= 2 * _WINDOW:
            before, after = np.median(times[-2 * _WINDOW : -_WINDOW]), np.median(times[-_WINDOW:])
            if abs(after - before) <= _SETTLED * before:
                return len(times), True
    return len(times), False


def _take_turns(
    runs: Sequence[Callable[[], object]], min_runs: int, min_seconds: float, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Latencies in ms, candidates x rounds."""
    rounds: list[list[float]] = []
    spent_ms = 0.0
    while len(rounds) < min_runs or spent_ms < 1e3 * min_seconds * len(runs):
        times = [0.0] * len(runs)
        for index in rng.permutation(len(runs)):
            times[index] = _timed_ms(runs[index])
        rounds.append(times)
        spent_ms += sum(times)
    return np.array(rounds).T


def _timed_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    outputs = run()
    elapsed = time.perf_counter_ns() - start
    del outputs  # freeing them is not part of answering
    return elapsed / 1e6


def _peak_memory(runner: Runner) -> tuple[int | None, tuple[str, ...]]:
    try:
        return runner.peak_memory(), ()
    except UnmeasuredError as reason:
        return None, (str(reason),)


def _statistics(times: np.ndarray[Any, Any], batch_size: int) -> dict[str, float]:
    p25, p50, p75, p90, p95, p99 = np.percentile(times, [25, 50, 75, 90, 95, 99]).tolist()
    mean = float(times.mean())
    return {
        "p50_ms": p50,
        "p90_ms": p90,
        "p95_ms": p95,
        "p99_ms": p99,
        "mean_ms": mean,
        "min_ms": float(times.min()),
        "iqr_ms": p75 - p25,
        "throughput": 1e3 * batch_size / mean,
    }


def _doubts(times: np.ndarray[Any, Any], settled: bool) -> Iterator[str]:
    """What a reader of the figures should know. The bound on the spread is that of `torch.utils.benchmark`."""
    if not settled:
        yield "still settling: the warm-up ended before two windows in a row had about the same median"
    p25, p50, p75 = np.percentile(times, [25, 50, 75])
    if p75 - p25 > _NOISY * p50:
        yield f"noisy: the interquartile range is {(p75 - p25) / p50:.0%} of the median"


def ratio_of_medians(
    times: np.ndarray[Any, Any], baseline: np.ndarray[Any, Any], confidence: float, rng: np.random.Generator
) -> Ratio:
    """Ratio of the medians of two candidates that took turns, one time of each for every round, with the percentile
    interval of a paired, circular block bootstrap (Politis, Romano 1992)."""
    count = len(times)
    length = round(count ** (1 / 3))
    starts = rng.integers(count, size=(_RESAMPLES, -(-count // length), 1))
    ratios = np.empty(_RESAMPLES)
    for index, start in enumerate(starts):  # one resample at a time: all at once would fill memory
        rounds = ((start + np.arange(length)) % count).ravel()[:count]
        ratios[index] = np.median(times[rounds]) / np.median(baseline[rounds])
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
    return Ratio(float(np.median(times) / np.median(baseline)), low, high, confidence)
