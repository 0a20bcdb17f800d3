"""The verb that says what each part of a model is worth: sensitivity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

import surgery
from surgery.cli.config import write_config
from surgery.cli.fields import takes_fields
from surgery.cli.options import DataOptions, Model, RunOptions, Weights, load_if_saved, refuse_untrained
from surgery.cli.output import Bars, emit, table
from surgery.settings import IMPORTANCE, KEEPS, TimingSettings, TrainSettings, option
from surgery.storage.folders import refuse_folder, staged_folder

if TYPE_CHECKING:
    from surgery import Sensitivity

MARKER = "sensitivity.json"
"""The file by which a folder is known as a result of ``sensitivity``."""


def register(app: typer.Typer) -> None:
    """Add the verb of this file to ``app``."""
    app.command(
        epilog="Example: surgery sensitivity runs/demo/rate-1 --dataset mnist5k --out runs/sensitivity",
    )(sensitivity)


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(TrainSettings):
    """Which parts are slimmed, how far, and how the model is trained before."""

    split_rate: float = option(0.5, "Split rate in (0, 1] of the part that is slimmed.", name="--split-rate/--rate")
    by: str = option("group", "What is slimmed alone: group or stage.")
    importance: str = option("prefix", KEEPS, choices=IMPORTANCE)
    round_to: int = option(1, "Round widths up to a multiple of this.")
    epochs: int = option(0, "Train the model first, so many epochs; 0: take it as is.", least=0)
    weights: Weights = "none"


@takes_fields("batch_size", "checkpoint_every", "device", "memory", "confidence")
def sensitivity(
    context: typer.Context,
    model: Model,
    data: DataOptions,
    options: SensitivityOptions,
    settings: TimingSettings,
    run: RunOptions,
) -> None:
    """Slim each part of a trained model alone: how much accuracy that loses, and how much time it saves.

    Writes sensitivity.png, sensitivity.csv and sensitivity.json, and history.csv if it trains the model.
    """
    refuse_folder(run.out, marker=MARKER, force=run.force)
    epochs = options.epochs
    if not epochs:
        worthless = "none of which is worth more than another"
        refuse_untrained("model", model, options.weights, epochs="--epochs 5", because=worthless)
    source = load_if_saved(model, run)
    images = surgery.data_for({"the model": source}, **vars(data))
    module = surgery.classifier(source, images, weights=options.weights, trust=run.trust, seed=settings.seed)
    slimming: dict[str, Any] = {name: getattr(options, name) for name in ("by", "importance", "round_to")}
    history = None
    with Bars() as bars:
        if epochs:
            history = surgery.train(module, images, options.training(), progress=bars)
            module = history.module
        result = surgery.sensitivity(
            module, images, rate=options.split_rate, **slimming, settings=settings, progress=bars
        )
    with staged_folder(run.out, marker=MARKER, force=run.force) as folder:
        surgery.write_sensitivity(result, folder)
        surgery.write_history({"train": history}, folder)
        write_config(context, folder)
    written = f"written to {run.out}: sensitivity.png, sensitivity.csv and sensitivity.json"
    content = {**result.to_dict(), "out": str(run.out)}
    emit(content, run.as_json, _table(result), note="\n".join([*result.doubts, written]))


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
