"""The verb that measures: bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli.options import AsJson, InputShape, Seed, Threads, Trust, Weights, open_model
from surgery.cli.output import emit, table
from surgery.deploy.benchmark import Comparison, compare
from surgery.deploy.units import mebibytes, quantity
from surgery.errors import UsageError


def bench(
    candidates: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models, as elsewhere, or ONNX files; at least one.")
    ],
    runtime: Annotated[str, typer.Option(help="onnxruntime or torch.")] = "onnxruntime",
    batch_size: Annotated[int, typer.Option(help="Samples of one query.")] = 1,
    threads: Threads = None,
    min_runs: Annotated[int, typer.Option(help="Queries of each model, at the least.")] = 100,
    min_seconds: Annotated[float, typer.Option(help="Seconds spent on each model, at the least.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput, memory and size; several models take turns and are compared with the first."""
    if len(set(candidates)) < len(candidates):
        raise UsageError("a model is given more than once")
    opened: Mapping[str, Any] = {
        name: _file(name) or open_model(name, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
        for name in candidates
    }
    measured = compare(
        opened,
        runtime=runtime,
        batch_size=batch_size,
        threads=threads,
        min_runs=min_runs,
        min_seconds=min_seconds,
        device=device,
        seed=seed,
    )
    notes = [f"{name}: {note}" for name, result in measured.results.items() for note in result.notes]
    emit(measured.to_dict(), as_json, _comparison_table(measured), note="\n".join(notes))


def _file(name: str) -> Path | None:
    """The ONNX file that ``name`` is, if it is one."""
    path = Path(name)
    if path.suffix != ".onnx":
        return None
    if not path.is_file():
        raise UsageError(f"there is no file {name}")
    return path


def _comparison_table(measured: Comparison) -> Any:
    header = ["model", "p50 ms", "p90 ms", "p99 ms", "samples/s", "relative", "memory", "file", "parameters", "MACs"]
    rows = []
    for name, result in measured.results.items():
        ratio = measured.ratios.get(name)
        rows.append(
            [
                name,
                *(f"{value:.3f}" for value in (result.p50_ms, result.p90_ms, result.p99_ms)),
                f"{result.throughput:,.1f}",
                f"{ratio.value:.3f} ({ratio.low:.3f}-{ratio.high:.3f})" if ratio else "1",
                mebibytes(result.peak_memory_bytes),
                mebibytes(result.file_bytes),
                quantity(result.params),
                quantity(result.macs),
            ]
        )
    first = next(iter(measured.results.values()))
    return table(f"{first.runtime} on {first.device}, batch {first.batch_size}, {first.threads} threads", header, rows)
