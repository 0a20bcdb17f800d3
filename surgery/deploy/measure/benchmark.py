"""Measure what a model costs in practice: latency, throughput, memory and size, with the samples and circumstances.

One query follows another (MLPerf's single stream), and each is timed by itself, since averages over blocks have no
tail. A query starts with its inputs on the device (in numpy arrays for ONNX Runtime on the CPU) and ends when its
outputs are there. Meanwhile Python's garbage collector is off, and the process uses as many cores as it has threads.
Candidates take turns, in an order drawn for each round, so that a machine that slows down slows them all; the result is
their *ratio*. They are set up again several times (`surgery.deploy.measure.timing`), since two sessions of one file
differ. The first is also measured against itself: any difference there is noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from surgery.deploy.measure.environment import Environment, environment, usable_cores
from surgery.deploy.measure.jobs import Job, Measurable, Runner
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
from surgery.errors import UsageError
from surgery.progress import Progress
from surgery.settings import TimingSettings, accepts

__all__ = ["BenchmarkResult", "Comparison", "Ratio", "benchmark", "compare", "ratio_of_medians", "sweep"]

_NOISY = 0.1


@dataclass(frozen=True)
class BenchmarkResult:
    """One model, measured.

    Measured: ``samples_ms``, every timed query in order, and what follows from it; ``peak_memory_bytes`` on the host
    and ``device_peak_memory_bytes`` on the GPU, see `surgery.deploy.measure.memory.peak_memory`; ``file_bytes``,
    external weights included. Derived: ``macs`` of one sample and ``params``, as `surgery.cost` counts them; for an
    ONNX file of other make, ``macs`` is unknown and ``params`` the number of elements of its floating-point
    initialisers. Unmeasured fields are None; see ``notes``.
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
    """Samples of each session."""
    turn: int = 1
    """Queries in a row of one turn; if above 1, after one that does not count."""
    cores: tuple[int, ...] | None = None
    """The cores that the process ran on; None if the system cannot restrict them."""

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
    """The A/A check: the baseline's ratio to itself, from a second session next to each; None if it was not made."""
    check_samples_ms: tuple[float, ...] = ()
    """The latencies of the baseline's second session."""

    @property
    def too_noisy(self) -> str:
        """Say which differences cannot be told apart, if the A/A check shows that the machine was noisy; else empty.

        On a machine without noise this is a false alarm once in 20 times, at a confidence of 95%.
        """
        return noise(self.check, self.baseline or "the model", self.ratios)

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


@accepts(TimingSettings)
def benchmark(
    candidate: Measurable,
    settings: TimingSettings = TimingSettings(),
    *,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> BenchmarkResult:
    """Measure a module, or an ONNX file, in eval mode.

    Args:
        candidate: a module, which is not modified (for ONNX Runtime it is exported to a temporary file), or the path
            of an ONNX file.
        settings: see `surgery.TimingSettings`; its fields may be given as keywords. ``runtime`` is ``"onnxruntime"``,
            ``"torch"`` (eager) or ``"torch-compile"``; on a GPU also ``"onnxruntime-tensorrt"``,
            ``"onnxruntime-cuda-graphs"`` and ``"torch-cuda-graphs"``. Measuring goes on until ``min_runs`` and
            ``min_seconds`` are both reached, in ``sessions``, so that no one place in memory decides.
        example_inputs: a tensor or a tuple of positional inputs, ``kwargs`` the named ones, of any batch size. A traced
            module and an ONNX file with one open axis, the batch, need none.

    Returns:
        Latencies in ms, throughput in samples/s, memory and file size in bytes, and the raw samples.

    Raises:
        UsageError: the runtime or device is unknown or not here, or the inputs do not fit.
        ExportError: the module cannot be exported.

    Example:
        >>> surgery.benchmark(traced, batch_size=8, threads=2).p50_ms
    """
    return compare({"": candidate}, settings, example_inputs=example_inputs, kwargs=kwargs, check=False).results[""]


@accepts(TimingSettings)
def compare(
    candidates: Mapping[str, Measurable | Runner],
    settings: TimingSettings = TimingSettings(),
    *,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Measure several models in one run, taking turns, and each one's latency relative to the first.

    The interval of a ratio is a bootstrap over sessions, see `surgery.deploy.measure.ratios.ratio_over_sessions`. Each
    candidate answers the same number of queries.

    Args:
        candidates: by name, as in `benchmark`; one that is measured again and again may be what
            `surgery.deploy.measure.runners.ready` made of it for the same batch size, threads and device.
        settings, example_inputs, kwargs: as in `benchmark`.
        check: measure the first against itself as well, which takes as long as one candidate more.
        progress: told of each candidate that is ready to be timed (``"prepare"``), since an export takes seconds.

    Returns:
        Each candidate's result, and its ratio to the first, the baseline.

    Raises:
        UsageError: as `benchmark` does; or the sessions are too few for the ``confidence`` (1 is allowed: its interval
            covers one session's rounds alone).

    Example:
        >>> surgery.compare({"dense": traced, "slim": slim}, min_seconds=2.0).ratios["slim"].value
    """
    if not candidates:
        raise UsageError("nothing to measure: no candidates were given")
    threads = usable_cores() if settings.threads is None else settings.threads
    if check or len(candidates) > 1:
        refuse_few_sessions(settings.sessions, settings.confidence)
    here = environment()
    rng = np.random.default_rng(settings.seed)
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(threads))
        cores = stack.enter_context(pinned(threads))
        stack.enter_context(torch.random.fork_rng(devices=[] if settings.device == "cpu" else None))
        job = Job("", example_inputs, kwargs, settings.batch_size, threads, settings.device)
        runners = {}
        for name, candidate in candidates.items():
            runners[name] = (
                candidate
                if isinstance(candidate, Runner)
                else stack.enter_context(ready(settings.runtime, replace(job, candidate=candidate)))
            )
            if progress is not None:
                progress("prepare", len(runners), len(candidates))
        setups = [runner.start for runner in runners.values()]
        series = take_turns([*setups, *setups[:check]], settings, rng)
        results = {
            name: _result(runner, own, settings, threads=threads, cores=cores, environment=here)
            for (name, runner), own in zip(runners.items(), series[: len(runners)], strict=True)
        }

    def ratio(own: Series) -> Ratio:
        return ratio_over_sessions(own.sessions, series[0].sessions, settings.confidence, rng)

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


def sweep(candidates: Mapping[str, Measurable], batch_sizes: Sequence[int], **options: Any) -> dict[int, Comparison]:
    """Run `compare` at several batch sizes, one after the other.

    Args:
        candidates: as in `compare`.
        batch_sizes: samples of one query.
        options: other keywords of `compare`.

    Returns:
        The comparison at each batch size.

    Raises:
        UsageError, ExportError: as in `compare`.

    Example:
        >>> surgery.sweep({"dense": traced, "slim": slim}, [1, 8], min_seconds=2.0)[8].ratios["slim"].value
    """
    return {size: compare(candidates, batch_size=size, **options) for size in batch_sizes}


def _result(runner: Runner, own: Series, settings: TimingSettings, **circumstances: Any) -> BenchmarkResult:
    """Put together what was timed of a model, with its memory."""
    peak, device_peak, missing = _peak_memory(runner) if settings.memory else (None, None, ())
    return BenchmarkResult(
        runtime=settings.runtime,
        device=settings.device,
        batch_size=settings.batch_size,
        input_shapes=runner.input_shapes,
        **_statistics(own, settings.batch_size),
        peak_memory_bytes=peak,
        device_peak_memory_bytes=device_peak,
        file_bytes=runner.file_bytes,
        macs=runner.macs,
        params=runner.params,
        warmup_runs=own.warmup_runs,
        warmup_settled=own.settled,
        notes=(*missing, *_doubts(own)),
        **circumstances,
    )


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
    """Yield what a reader of the figures should know."""
    if not series.settled:
        yield "still settling: the warm-up ended before two windows in a row had about the same median"
    p25, p50, p75 = np.percentile(series.samples, [25, 50, 75])
    if p75 - p25 > _NOISY * p50:
        yield f"noisy: the interquartile range is {(p75 - p25) / p50:.0%} of the median"
