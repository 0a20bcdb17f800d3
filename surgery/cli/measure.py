"""Verbs that export, measure and choose: export, bench (in `surgery.cli.bench`), tradeoff."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import surgery
from surgery.cli.bench import bench
from surgery.cli.config import write_config
from surgery.cli.fields import takes_fields
from surgery.cli.options import (
    AsJson,
    Dataset,
    Model,
    Opening,
    RunOptions,
    load_if_saved,
    parse_numbers,
    parse_per_layer,
    refuse_if_taken,
)
from surgery.cli.output import Bars, emit, table
from surgery.errors import UsageError
from surgery.settings import TradeoffSettings, option
from surgery.storage.folders import refuse_folder
from surgery.units import counted, mebibytes, quantity

if TYPE_CHECKING:
    from surgery import Tradeoff

MARKER = "tradeoff.json"
"""The file that marks a folder as a result of ``tradeoff``."""


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery export slim/ --out slim.onnx")(export)
    app.command(epilog="Example: surgery bench resnet18 slim/ slim.onnx --batch-size 8")(bench)
    app.command(
        epilog="Example: surgery tradeoff resnet18 --dataset mnist5k --split-rates 1.0,0.75,0.5,0.25 --out runs/demo"
    )(tradeoff)


@takes_fields()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The ONNX file to write.")],
    opset: Annotated[int | None, typer.Option(help="ONNX operator set. [default: torch's]")] = None,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Leave height and width open, too.")] = False,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="For the batch of --input-shape alone.")] = False,
    exporter: Annotated[
        str | None, typer.Option(help="dynamo or torchscript. [default: dynamo, and if it fails torchscript]")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="The relative error that passes. [default: 1e-4; 1e-3 for detections]")
    ] = None,
    *,
    opening: Opening,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a model to ONNX, checked against torch in ONNX Runtime before the file appears.

    A detection model's file takes one image, or as many as --input-shape has.
    """
    refuse_if_taken(out, force)
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the name of an ONNX file ends in .onnx")
    module = opening.open(model)
    args, named = surgery.example_inputs(module)
    if opening.input_shape is None and isinstance(args[0], list):
        args = (args[0][:1], *args[1:])
    done = surgery.export_onnx(
        module,
        out,
        example_inputs=args,
        kwargs=named,
        opset=opset,
        dynamic_batch=False if fixed_batch else None,
        dynamic_size=dynamic_size,
        exporter=exporter,
        rtol=rtol,
        force=force,
    )
    checked = [f"batch {', '.join(map(str, done.batches))}"] if done.batches else []
    checked += [f"{height} x {width} pixels" for height, width in done.image_sizes]
    found = "" if done.detections is None else f" of {counted(done.detections, 'detection')}"
    emit(
        done.to_dict(),
        as_json,
        note=f"{out}: {mebibytes(done.bytes)}, opset {done.opset}, by {done.exporter}; open axes: "
        f"{', '.join(done.open_axes) or 'none'}; relative difference to torch{found} {done.max_rel:.1e} at "
        f"{' and '.join(checked)}",
    )


@dataclass(frozen=True, kw_only=True)
class CandidateOptions:
    """The candidates to make from the trained dense model."""

    split_rates: str | None = option(
        None,
        "Split rates in (0, 1]; per layer as in 0.5,layer3=0.5;layer4=0.25. [default: 1.0,0.75,0.5,0.25; 1.0 with "
        "candidates and budgets]",
        metavar="RATES",
    )
    candidate: list[str] | None = option(
        None,
        "A further candidate, several times: widen=1.5, deepen:layer3=1, slim:layer4=0.5+deepen:layer3=1.",
        metavar="OPERATIONS",
    )
    latency_budget: list[str] | None = option(
        None, "Slim to this latency, measured, as in 5ms; several times.", metavar="MS"
    )
    macs_budget: list[str] | None = option(
        None, "To so many MACs, as in 300M, or a share of the model's, as in 0.5.", metavar="N"
    )
    params_budget: list[str] | None = option(None, "To so many parameters.", metavar="N")
    bytes_budget: list[str] | None = option(None, "To so many bytes, as in 12MB.", metavar="N")
    reuse: list[Path] | None = option(None, "Take over what another run trained; several times.", metavar="DIR")

    def plan(self) -> tuple[list[Any], list[str]]:
        """Return the split rates, and further candidates and budgets as text."""
        budgets = {
            "latency": self.latency_budget,
            "macs": self.macs_budget,
            "params": self.params_budget,
            "bytes": self.bytes_budget,
        }
        others = [
            *(self.candidate or ()),
            *(f"{what}={text}" for what, texts in budgets.items() for text in texts or ()),
        ]
        text = self.split_rates or ("1.0" if others else "1.0,0.75,0.5,0.25")
        return _rates(text if self.split_rates is None else self.split_rates), others


@takes_fields()
def tradeoff(
    context: typer.Context,
    model: Model,
    dataset: Dataset,
    options: CandidateOptions,
    settings: TradeoffSettings,
    run: RunOptions,
) -> None:
    """Train a model, make candidates of it, export and measure each: the speed/accuracy curve.

    Writes tradeoff.png, tradeoff.html, tradeoff.csv, tradeoff.json, report.md, history.csv, and a folder with the
    checkpoint and the ONNX file of each model. An interrupted run resumes when the same command is given again; with
    --force, what the last run into the folder trained with the same settings is taken over.
    """
    rates, others = options.plan()
    refuse_folder(run.out, marker=MARKER, force=run.force)
    source = load_if_saved(model, run)
    with Bars() as bars:
        result = surgery.tradeoff(
            source,
            dataset=dataset,
            rates=rates,
            directory=run.out,
            candidates=others,
            settings=settings,
            reuse=options.reuse or (),
            trust=run.trust,
            force=run.force,
            command=shlex.join(["surgery", *context.obj]),
            progress=bars,
        )
    write_config(context, run.out)
    written = [name for name in _FILES if (run.out / name).exists()] + [point.folder for point in result.points]
    if result.seeded:
        written.append("a folder of each for every further seed")
    emit(
        {**result.to_dict(), "out": str(run.out)},
        run.as_json,
        _curve_table(result),
        note="".join(f"{doubt}\n" for doubt in result.doubts)
        + f"{result.seconds:.0f} s; written to {run.out}: {', '.join(written)}"
        + "".join(f"\n{point.name} is above its budget: {point.takes:g}" for point in result.points if point.over)
        + (f"\ntaken over from an earlier run: {'; '.join(result.reused)}" if result.reused else ""),
    )


_FILES = ("tradeoff.png", "tradeoff.html", "tradeoff.csv", "tradeoff.json", "report.md", "history.csv")
"""What a run may write besides the folders of its models."""


def _rates(text: str) -> list[Any]:
    """Parse ``"1.0,0.5,layer3=0.5;layer4=0.25"`` to rates."""
    option = "--split-rates"
    found: list[Any] = []
    for part in text.split(","):
        found += [parse_per_layer(option, part.split(";"), float)] if "=" in part else parse_numbers(option, part)
    return found


def _curve_table(result: Tradeoff) -> Any:
    rates = all(point.rate is not None for point in result.points)
    header = [
        "split rate" if rates else "candidate",
        "accuracy",
        *([f"over {result.settings.seeds} seeds"] if result.seeded else []),
        *(["from scratch"] if result.controlled else []),
        "p50 ms",
        "p90 ms",
        "speed-up",
        "parameters",
        "MACs",
        "ONNX file",
        "Pareto",
    ]
    rows = [
        [
            point.name,
            f"{point.accuracy:.1%}",
            *(["{:.1%} – {:.1%}".format(*point.interval)] if result.seeded else []),
            *([f"{point.control_accuracy:.1%}" if point.control else ""] if result.controlled else []),
            f"{point.latency.p50_ms:.3f}",
            f"{point.latency.p90_ms:.3f}",
            f"{point.speedup.value:.2f}" if point.speedup else "1",
            quantity(point.params),
            quantity(point.macs),
            mebibytes(point.latency.file_bytes),
            "yes" if point in result.front else "",
        ]
        for point in result.points
    ]
    return table(f"{result.name} on {result.data.source}, measured on its ONNX files", header, rows)
