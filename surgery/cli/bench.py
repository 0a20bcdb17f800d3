"""The verb that measures: bench."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import surgery
from surgery.cli.fields import takes_fields
from surgery.cli.options import AsJson, ChangedWeights, InputShape, Opening, Trust, Weights
from surgery.cli.output import emit, table
from surgery.errors import UsageError
from surgery.settings import TimingSettings
from surgery.units import counted, mebibytes, quantity

if TYPE_CHECKING:
    from surgery import BenchmarkResult, Comparison, Ratio


@takes_fields("batch_size", "warmup", "confidence", "memory")
def bench(
    candidates: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Models, as elsewhere, or ONNX files; at least one.")
    ],
    settings: TimingSettings,
    batch_size: Annotated[str, typer.Option(metavar="N,...", help="Samples of one query; several: 1,8,32.")] = "1",
    input_shape: InputShape = None,
    weights: Weights = "none",
    trust: Trust = False,
    allow_changed_weights: ChangedWeights = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency, throughput, memory and size; several models take turns and are compared with the first.

    The first is measured against itself as well (A/A): where that shows a difference, smaller ones cannot be told
    apart.
    """
    if len(set(candidates)) < len(candidates):
        raise UsageError("a model is given more than once")
    sizes = _parse_sizes(batch_size)
    opening = Opening(input_shape, weights, settings.seed, trust, allow_changed_weights)
    opened: Mapping[str, Any] = {name: _find_file(name) or None for name in candidates}
    opened = {**opened, **opening.open_all([name for name, file in opened.items() if file is None])}
    measured = surgery.sweep(opened, sizes, settings=settings)
    plain = {size: compared.to_dict() for size, compared in measured.items()}
    emit(
        plain[sizes[0]] if len(sizes) == 1 else {"batch_sizes": plain},
        as_json,
        *map(_comparison_table, measured.values()),
        note="\n".join(_notes(measured)),
    )


def _parse_sizes(text: str) -> list[int]:
    """Parse ``"1,8,32"`` to batch sizes, each once."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers.", param_hint="'--batch-size'") from None


def _notes(measured: Mapping[int, Comparison]) -> Iterator[str]:
    for size, compared in measured.items():
        batch = f" at batch {size}" if len(measured) > 1 else ""
        for name, result in compared.results.items():
            yield from (f"{name}{batch}: {note}" for note in result.notes)
        if len({result.input_shapes for result in compared.results.values()}) > 1:
            shapes = ", ".join(f"{name} {_shapes(result)}" for name, result in compared.results.items())
            yield f"note: the models were measured on inputs of different shapes{batch}: {shapes}"
        if compared.too_noisy:
            yield f"{batch.strip()}{batch and ': '}{compared.too_noisy}"


def _shapes(result: BenchmarkResult) -> str:
    return " and ".join(" x ".join(map(str, shape)) for shape in result.input_shapes)


def _find_file(name: str) -> Path | None:
    """Return the path of an ONNX file; None for any other model."""
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
                _ratio(ratio) if ratio else "1",
                _memory(result),
                mebibytes(result.file_bytes),
                quantity(result.params),
                quantity(result.macs),
            ]
        )
    first = next(iter(measured.results.values()))
    title = f"{first.runtime} on {first.device}, batch {first.batch_size}, {counted(first.threads, 'thread')}"
    if measured.check is not None and not measured.too_noisy:  # else a line below says what it shows
        title += f"; A/A {_ratio(measured.check)}"
    return table(title, header, rows)


def _memory(result: BenchmarkResult) -> str:
    """Write the peak memory on the host and, if there is one, on the GPU."""
    device = result.device_peak_memory_bytes
    return mebibytes(result.peak_memory_bytes) + ("" if device is None else f" + {mebibytes(device)} on the GPU")


def _ratio(ratio: Ratio) -> str:
    return f"{ratio.value:.3f} ({ratio.low:.3f}-{ratio.high:.3f})"
