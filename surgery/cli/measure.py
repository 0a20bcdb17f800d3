"""Verbs that export, measure and choose: export, bench (in `surgery.cli.bench`), tradeoff."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from surgery.cli.bench import bench
from surgery.cli.options import (
    AsJson,
    DataRoot,
    Dataset,
    Force,
    ImageSize,
    InputShape,
    Limit,
    Model,
    Seed,
    Threads,
    Trust,
    Weights,
    is_saved,
    numbers,
    open_model,
    per_layer,
    refuse_if_taken,
)
from surgery.cli.output import Bars, emit, table
from surgery.cli.runs import interruptible
from surgery.deploy.curve.points import Tradeoff
from surgery.deploy.curve.teaching import TEACHERS
from surgery.deploy.curve.tradeoff import MARKER
from surgery.deploy.curve.tradeoff import tradeoff as run_tradeoff
from surgery.deploy.onnx.export import export_onnx
from surgery.deploy.onnx.exporters import EXPORTERS
from surgery.folders import refuse_folder
from surgery.models.checkpoint import load
from surgery.models.inputs import is_list_of_images, resolve
from surgery.operations.masks import IMPORTANCE
from surgery.operations.slim import Rate
from surgery.units import counted, mebibytes, quantity


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery export slim/ --out slim.onnx")(export)
    app.command(epilog="Example: surgery bench resnet18 slim/ slim.onnx --batch-size 8")(bench)
    app.command(
        epilog="Example: surgery tradeoff resnet18 --dataset mnist5k --split-rates 1.0,0.75,0.5,0.25 --out runs/demo"
    )(tradeoff)


def export(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The ONNX file to write.")],
    opset: Annotated[int | None, typer.Option(help="ONNX operator set. [default: torch's]")] = None,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Leave height and width open, too.")] = False,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="For the batch of --input-shape alone.")] = False,
    exporter: Annotated[
        str | None, typer.Option(help=f"{' or '.join(EXPORTERS)}. [default: dynamo, and if it fails torchscript]")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(help="The relative error that passes. [default: 1e-4; 1e-3 for detections]")
    ] = None,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a model to ONNX, checked against torch in ONNX Runtime before the file appears.

    A detection model's file takes one image, or as many as --input-shape has.
    """
    refuse_if_taken(out, force)
    module = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    args, named = resolve(module)
    if is_list_of_images(args) and input_shape is None:
        args, named = resolve(module, batch_size=1)
    done = export_onnx(
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


def tradeoff(
    context: typer.Context,
    model: Model,
    dataset: Dataset,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    split_rates: Annotated[
        str | None,
        typer.Option(
            metavar="RATES",
            help="Split rates in (0, 1]; per layer as in 0.5,layer3=0.5;layer4=0.25. [default: "
            "1.0,0.75,0.5,0.25; 1.0 beside candidates and budgets]",
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OPERATIONS",
            help="A further candidate, several times: widen=1.5, deepen:layer3=1, slim:layer4=0.5+deepen:layer3=1.",
        ),
    ] = None,
    latency_budget: Annotated[
        list[str] | None,
        typer.Option(metavar="MS", help="Slim to this latency, measured, as in 5ms; several times."),
    ] = None,
    macs_budget: Annotated[list[str] | None, typer.Option(metavar="N", help="To so many MACs, as in 300M.")] = None,
    params_budget: Annotated[list[str] | None, typer.Option(metavar="N", help="To so many parameters.")] = None,
    bytes_budget: Annotated[list[str] | None, typer.Option(metavar="N", help="To so many bytes, as in 12MB.")] = None,
    importance: Annotated[str, typer.Option(help=f"Which channels are kept: {', '.join(IMPORTANCE)}.")] = "prefix",
    round_to: Annotated[int, typer.Option(help="Round widths up to a multiple of this.")] = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the data for the dense model; 0: take it as is.")] = 5,
    finetune_epochs: Annotated[int, typer.Option(help="Passes over the data for each candidate.")] = 3,
    teach: Annotated[
        str, typer.Option(help=f"What candidates learn from: {', '.join(TEACHERS)}; the dense model teaches.")
    ] = "labels",
    hint_epochs: Annotated[int, typer.Option(help="For hints: passes over the data for stage 1.")] = 1,
    generations: Annotated[int, typer.Option(help="For evolve: how many, of --finetune-epochs each.")] = 3,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.02,
    batch_size: Annotated[int, typer.Option(help="Images of one training step.")] = 64,
    image_size: ImageSize = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    threads: Threads = None,
    weights: Weights = "none",
    seed: Seed = 0,
    reuse: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Take over what another run trained; several times.")
    ] = None,
    trust: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a model, make candidates of it, export and measure each: the speed/accuracy curve.

    Writes tradeoff.png, tradeoff.html, tradeoff.csv, tradeoff.json, report.md, and a folder with the checkpoint and the
    ONNX file of each model. A run that was cut off goes on when the same command is given again; with --force, what
    the last run into the folder trained with the same settings is taken over.
    """
    budgets = {"latency": latency_budget, "macs": macs_budget, "params": params_budget, "bytes": bytes_budget}
    others = [*(candidate or ()), *(f"{what}={text}" for what, texts in budgets.items() for text in texts or ())]
    rates = _rates(("1.0" if others else "1.0,0.75,0.5,0.25") if split_rates is None else split_rates)
    refuse_folder(out, marker=MARKER, force=force)
    source: str | nn.Module = load(model, trust=trust) if is_saved(model) else model
    with interruptible(), Bars() as bars:
        result = run_tradeoff(
            source,
            dataset=dataset,
            split_rates=rates,
            out=out,
            candidates=others,
            importance=importance,
            round_to=round_to,
            epochs=epochs,
            finetune_epochs=finetune_epochs,
            teach=teach,
            hint_epochs=hint_epochs,
            generations=generations,
            lr=lr,
            batch_size=batch_size,
            image_size=image_size,
            weights=weights,
            data_root=data_root,
            limit=limit,
            threads=threads,
            seed=seed,
            reuse=reuse or (),
            trust=trust,
            force=force,
            command=shlex.join(["surgery", *context.obj]),
            progress=bars,
        )
    emit(
        {**result.to_dict(), "out": str(out)},
        as_json,
        _curve_table(result),
        note=(f"the machine was {result.too_noisy}\n" if result.too_noisy else "")
        + f"{result.seconds:.0f} s; written to {out}: tradeoff.png, tradeoff.html, tradeoff.csv, tradeoff.json, "
        f"report.md and {', '.join(point.folder for point in result.points)}"
        + "".join(f"\n{point.name} is above its budget: {point.takes:g}" for point in result.points if point.over)
        + (f"\ntaken over from an earlier run: {', '.join(result.reused)}" if result.reused else ""),
    )


def _rates(text: str) -> list[Rate]:
    """``"1.0,0.5,layer3=0.5;layer4=0.25"`` as rates."""
    found: list[Rate] = []
    for part in text.split(","):
        found += [per_layer("--split-rates", part.split(";"), float)] if "=" in part else numbers("--split-rates", part)
    return found


def _curve_table(result: Tradeoff) -> Any:
    rates = all(point.rate is not None for point in result.points)
    header = [
        "split rate" if rates else "candidate",
        "accuracy",
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
            f"{point.score.accuracy:.1%}",
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
