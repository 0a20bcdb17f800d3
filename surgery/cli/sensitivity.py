"""The verb that says what each part of a model is worth: sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery import models as catalogue
from surgery.cli.options import (
    AsJson,
    DataRoot,
    Dataset,
    Force,
    ImageSize,
    Limit,
    Model,
    Seed,
    Trust,
    Weights,
    is_saved,
)
from surgery.cli.output import Bars, emit, table
from surgery.deploy.budget.sensitivity import Sensitivity, write_sensitivity
from surgery.deploy.budget.sensitivity import sensitivity as run_sensitivity
from surgery.deploy.classifiers import classifier, data_for
from surgery.errors import UsageError, whole_number
from surgery.folders import refuse_folder, staged_folder
from surgery.models.checkpoint import load
from surgery.operations.masks import IMPORTANCE
from surgery.training.loop import train

MARKER = "sensitivity.json"
"""The file by which a folder is known as a result of ``sensitivity``."""


def register(app: typer.Typer) -> None:
    """Add the verb of this file to ``app``."""
    app.command(
        epilog="Example: surgery sensitivity runs/demo/rate-1 --dataset mnist5k --out runs/sensitivity",
    )(sensitivity)


def sensitivity(
    model: Model,
    dataset: Dataset,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    rate: Annotated[float, typer.Option(help="Split rate in (0, 1] of the part that is slimmed.")] = 0.5,
    by: Annotated[str, typer.Option(help="What is slimmed alone: group or stage.")] = "group",
    importance: Annotated[str, typer.Option(help=f"Which channels are kept: {', '.join(IMPORTANCE)}.")] = "prefix",
    round_to: Annotated[int, typer.Option(help="Round widths up to a multiple of this.")] = 1,
    epochs: Annotated[int, typer.Option(help="Train the model first, so many epochs; 0: take it as is.")] = 0,
    runtime: Annotated[str, typer.Option(help="What models are timed in: onnxruntime or torch.")] = "onnxruntime",
    threads: Annotated[int | None, typer.Option(help="Threads of one query. [default: all usable cores]")] = None,
    min_seconds: Annotated[float, typer.Option(help="Seconds spent on timing each model, at the least.")] = 1.0,
    image_size: ImageSize = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Slim each part of a trained model alone: how much accuracy that loses, and how much time it saves.

    Writes sensitivity.png, sensitivity.csv and sensitivity.json.
    """
    refuse_folder(out, marker=MARKER, force=force)
    if image_size is not None:
        whole_number("--image-size", image_size, 1)
    saved = is_saved(model)
    if not saved and not epochs:
        parsed = catalogue.parse(model, weights=weights)
        if parsed.entry is not None and parsed.weights is None:
            raise UsageError(
                f"the model {model!r} has random weights, of which none is worth more than another: train it first "
                "(--epochs 5), take published weights (--weights DEFAULT), or pass a saved folder"
            )
    source = load(model, trust=trust) if saved else model
    data = data_for({"the model": source}, dataset, data_root=data_root, image_size=image_size, limit=limit)
    module = classifier(source, data, weights=weights, trust=trust, seed=seed)
    with Bars() as bars:
        if epochs:
            train(module, data, epochs=epochs, seed=seed, progress=bars)
        result = run_sensitivity(
            module,
            data,
            rate=rate,
            by=by,
            importance=importance,
            round_to=round_to,
            runtime=runtime,
            threads=threads,
            min_seconds=min_seconds,
            seed=seed,
            progress=bars,
        )
    with staged_folder(out, marker=MARKER, force=force) as folder:
        write_sensitivity(result, folder)
    written = f"written to {out}: sensitivity.png, sensitivity.csv and sensitivity.json"
    emit({**result.to_dict(), "out": str(out)}, as_json, _table(result), note="\n".join([*result.doubts, written]))


def _table(result: Sensitivity) -> Any:
    rows = [["nothing", f"{result.dense.judged.score.accuracy:.1%}", "", f"{result.dense.latency_ms:.3f}", "", "", ""]]
    for row, told in zip(result.rows, result.to_rows(), strict=True):
        low, high = told["time_saved_low"], told["time_saved_high"]
        rows.append(
            [
                row.name,
                f"{told['accuracy']:.1%}",
                f"{100 * told['accuracy_drop']:.1f}",
                f"{row.latency_ms:.3f}",
                f"{told['time_saved']:.1%}" + (f" ({low:.1%} – {high:.1%})" if low is not None else ""),
                f"{told['macs_saved']:.1%}",
                f"{told['params_saved']:.1%}",
            ]
        )
    header = ["slimmed", "accuracy", "points lost", "p50 ms", "time saved", "MACs saved", "parameters saved"]
    return table(f"{result.name} on {result.data}, each {result.by} alone at {result.rate:g}", header, rows)
