"""What a model costs in practice: latency, throughput, memory and size, measured, with the samples and circumstances.

How it is measured. One query follows another (MLPerf's single stream), each timed by itself, for averages over blocks
have no tail. A query starts with its inputs on the device (in numpy arrays for ONNX Runtime on the CPU) and ends when
its outputs are there. Python's garbage collector rests meanwhile, and the process keeps to as many cores as it has
threads. Candidates that are compared take turns, in an order drawn anew each round, so that a machine that slows down
slows them all; what is said of them is the *ratio*. They are set up afresh several times
(`surgery.deploy.measure.timing`), for two sessions of one file differ. And the first is measured against itself: what
that shows is noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from surgery.deploy.measure.environment import Environment, environment, usable_cores
from surgery.deploy.measure.jobs import Candidate, Job, Runner
from surgery.deploy.measure.memory import UnmeasuredError
from surgery.deploy.measure.ratios import (
    Ratio,
    early_stopping_estimate,
    noise,
    ratio_of_medians,
    ratio_over_sessions,
    refuse_few_sessions,
)
from surgery.deploy.measure.runners import ready
from surgery.deploy.measure.timing import Series, pinned, take_turns
from surgery.errors import UsageError, whole_number
from surgery.progress import Progress

__all__ = ["BenchmarkResult", "Comparison", "Ratio", "benchmark", "compare", "ratio_of_medians", "sweep"]

_NOISY = 0.1


@dataclass(frozen=True)
class BenchmarkResult:
    """One model, measured.

    Measured: ``samples_ms``, every timed query in order, and what follows from it; ``peak_memory_bytes`` on the host
    and ``device_peak_memory_bytes`` on the GPU, see `surgery.deploy.measure.memory.peak_memory`; ``file_bytes``,
    external weights included. Derived: ``macs`` of one sample and ``params``, as `surgery.cost` counts them; for an
    ONNX file of other make, ``macs`` is unknown and ``params`` the number of elements of its floating-point
    initialisers. What could not be had is None, and ``notes`` says why.
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
    early_stopping_ms: Mapping[str, float | None] = field(default_factory=dict)
    """MLPerf's estimates of p90, p95 and p99, which lie above them with 99% confidence; None for too few queries."""
    device_peak_memory_bytes: int | None = None
    session_runs: tuple[int, ...] = ()
    """How many of the samples each session has."""
    turn: int = 1
    """How many queries in a row a turn had; above 1, after one that does not count."""
    cores: tuple[int, ...] | None = None
    """The cores the process was kept on; None where the system does not let them be chosen."""

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        shapes = [list(shape) for shape in self.input_shapes]
        return {**asdict(self), "input_shapes": shapes, "samples_ms": list(self.samples_ms), "notes": list(self.notes)}


@dataclass(frozen=True)
class Comparison:
    """Candidates measured in one run, and each one's ratio to the first, the baseline."""

    baseline: str
    results: dict[str, BenchmarkResult]
    ratios: dict[str, Ratio]
    check: Ratio | None = None
    """The A/A check: the baseline's ratio to itself, from a second session beside each; None if it was not made."""
    check_samples_ms: tuple[float, ...] = ()
    """What was timed for it."""

    @property
    def too_noisy(self) -> str:
        """That the machine was too noisy for these ratios, if the A/A check shows it; else empty.

        Also on a machine without noise it does, by its confidence: once in 20 times where that is 95%.
        """
        return noise(self.check, self.baseline or "the model")

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        return {
            "baseline": self.baseline,
            "results": {name: result.to_dict() for name, result in self.results.items()},
            "ratios": {name: asdict(ratio) for name, ratio in self.ratios.items()},
            "check": self.check and asdict(self.check),
            "check_samples_ms": list(self.check_samples_ms),
            "too_noisy": self.too_noisy or None,
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
    sessions: int = 10,
    device: str = "cpu",
    memory: bool = True,
) -> BenchmarkResult:
    """Measure a module, or an ONNX file, in eval mode.

    Args:
        candidate: a module, which is not modified (for ONNX Runtime it is exported to a temporary file), or the path
            of an ONNX file.
        runtime: ``"onnxruntime"``, ``"torch"`` (eager), ``"torch-compile"``; on a GPU also
            ``"onnxruntime-tensorrt"``, ``"onnxruntime-cuda-graphs"`` and ``"torch-cuda-graphs"``.
        batch_size: samples per query, axis 0 of the inputs.
        example_inputs: a tensor or a tuple of positional inputs, ``kwargs`` the named ones, of any batch size. A traced
            module and an ONNX file with one open axis, the batch, need none.
        threads: intra-op threads, on as many cores; by default, all the cores this process may use.
        warmup: the most seconds to warm up for. Warming up ends as soon as the median of five runs is within 5% of
            the median of the five before; ``warmup_settled`` says whether it came to that.
        min_runs, min_seconds: go on until both are reached: queries, and seconds spent in them.
        sessions: how often to set the model up afresh, so that no one place in memory decides.
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
        sessions=sessions,
        device=device,
        memory=memory,
        check=False,
    )
    return compared.results[""]


def compare(
    candidates: Mapping[str, Candidate | Runner],
    *,
    runtime: str = "onnxruntime",
    batch_size: int = 1,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    threads: int | None = None,
    warmup: float = 5.0,
    min_runs: int = 100,
    min_seconds: float = 1.0,
    sessions: int = 10,
    device: str = "cpu",
    memory: bool = True,
    check: bool = True,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Measure several models in one run, taking turns, and each one's latency relative to the first.

    The interval of a ratio is a bootstrap over sessions, see `surgery.deploy.measure.ratios.ratio_over_sessions`.

    Takes what `benchmark` takes, and, for a candidate that is measured again and again, what
    `surgery.deploy.measure.runners.ready` made of it for the same batch size, threads and device. Each candidate
    answers the same number of queries, at least ``min_runs``, and on average they spend at least ``min_seconds`` on
    them. ``check`` measures the first against itself as well, which takes as long as one candidate more. ``seed`` draws
    the orders and the resamples. ``progress`` is told of each candidate that is ready to be timed (``"prepare"``),
    since an export takes seconds.

    Raises:
        UsageError: as `benchmark` does; or the sessions are too few for the ``confidence`` (1 is allowed: its interval
            covers one session's rounds alone).
    """
    threads = usable_cores() if threads is None else threads
    numbers = {"batch_size": batch_size, "threads": threads, "min_runs": min_runs, "sessions": sessions}
    _refuse(candidates, numbers, min_seconds, confidence)
    whole_number("seed", seed, 0)
    if check or len(candidates) > 1:
        refuse_few_sessions(sessions, confidence)
    here = environment()
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        cores = stack.enter_context(pinned(threads))
        stack.enter_context(torch.random.fork_rng(devices=[] if device == "cpu" else None))
        job = Job("", example_inputs, kwargs, batch_size, threads, device)
        runners = {}
        for name, candidate in candidates.items():
            runners[name] = (
                candidate
                if isinstance(candidate, Runner)
                else stack.enter_context(ready(runtime, replace(job, candidate=candidate)))
            )
            if progress is not None:
                progress("prepare", len(runners), len(candidates))
        setups = [runner.start for runner in runners.values()]
        series = take_turns(
            [*setups, *setups[:check]],
            sessions=sessions,
            warmup=warmup,
            min_runs=min_runs,
            min_seconds=min_seconds,
            rng=rng,
        )
        results = {}
        for (name, runner), own in zip(runners.items(), series[: len(runners)], strict=True):
            peak, device_peak, missing = _peak_memory(runner) if memory else (None, None, ())
            results[name] = BenchmarkResult(
                runtime=runtime,
                device=device,
                threads=threads,
                batch_size=batch_size,
                input_shapes=runner.input_shapes,
                **_statistics(own, batch_size),
                peak_memory_bytes=peak,
                device_peak_memory_bytes=device_peak,
                file_bytes=runner.file_bytes,
                macs=runner.macs,
                params=runner.params,
                warmup_runs=own.warmup_runs,
                warmup_settled=own.settled,
                notes=(*missing, *_doubts(own)),
                environment=here,
                cores=cores,
            )

    def ratio(own: Series) -> Ratio:
        return ratio_over_sessions(own.sessions, series[0].sessions, confidence, rng)

    names = list(runners)
    ratios = {name: ratio(own) for name, own in zip(names[1:], series[1 : len(names)], strict=True)}
    twin = series[-1] if check else None
    return Comparison(
        baseline=names[0],
        results=results,
        ratios=ratios,
        check=ratio(twin) if twin else None,
        check_samples_ms=tuple(twin.samples.tolist()) if twin else (),
    )


def sweep(candidates: Mapping[str, Candidate], batch_sizes: Sequence[int], **options: Any) -> dict[int, Comparison]:
    """`compare`, with its other ``options``, at several batch sizes, one after the other."""
    return {size: compare(candidates, batch_size=size, **options) for size in batch_sizes}


def _refuse(candidates: Mapping[str, Any], numbers: Mapping[str, int], min_seconds: float, confidence: float) -> None:
    if not candidates:
        raise UsageError("nothing to measure: no candidates were given")
    for name, value in numbers.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if not 0 <= min_seconds < math.inf:
        raise UsageError(f"min_seconds must be at least 0, not {min_seconds}")
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


def _peak_memory(runner: Runner) -> tuple[int | None, int | None, tuple[str, ...]]:
    try:
        peak = runner.peak_memory()
    except UnmeasuredError as reason:
        return None, None, (str(reason),)
    return peak.host, peak.device, ()


def _statistics(series: Series, batch_size: int) -> dict[str, Any]:
    times = series.samples
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
        "samples_ms": tuple(times.tolist()),
        "session_runs": tuple(own.size for own in series.sessions),
        "turn": series.sessions[0].shape[1],
        "early_stopping_ms": {f"p{p}": early_stopping_estimate(times, p / 100) for p in (90, 95, 99)},
    }


def _doubts(series: Series) -> Iterator[str]:
    """What a reader of the figures should know."""
    if not series.settled:
        yield "still settling: the warm-up ended before two windows in a row had about the same median"
    p25, p50, p75 = np.percentile(series.samples, [25, 50, 75])
    if p75 - p25 > _NOISY * p50:
        yield f"noisy: the interquartile range is {(p75 - p25) / p50:.0%} of the median"
