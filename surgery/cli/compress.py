"""The verb that makes a student of a trained model, for a budget: compress."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

import surgery
from surgery.cli.config import write_config
from surgery.cli.fields import takes_fields
from surgery.cli.options import (
    DataOptions,
    Model,
    RunOptions,
    Weights,
    find_budget,
    load_if_saved,
    parse_device,
    refuse_untrained,
)
from surgery.cli.output import Bars, emit, table
from surgery.errors import UsageError
from surgery.settings import CompressSettings, Settings, option
from surgery.storage.folders import refuse_folder
from surgery.units import amount_text, counted, mebibytes, parse_amount, quantity

if TYPE_CHECKING:
    from surgery import Compressed, CompressStep, Cost, Score

MARKER = "results.json"
"""The file that marks a folder as a result of ``compress``."""


def register(app: typer.Typer) -> None:
    """Add the verb of this file to ``app``."""
    app.command(
        epilog="Example: surgery compress resnet18 --weights best.pth --dataset mnist5k --macs 0.3 --out runs/student"
    )(compress)


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Settings):
    """The model's weights, and the budget: one of four."""

    weights: Weights = "none"
    macs: str | None = option(
        None, "The budget: so many MACs an input, as in 300M, or a share of the model's own, as in 0.5.", metavar="N"
    )
    params: str | None = option(None, "Or so many parameters, or a share.", metavar="N")
    bytes: str | None = option(None, "Or so many bytes of parameters and buffers, as in 12MB, or a share.", metavar="N")
    latency: str | None = option(
        None, "Or this median latency of one query, as in 5ms or 50%, measured on this machine.", metavar="TIME"
    )

    def find(self) -> dict[str, str]:
        """Return the one budget that is given, by its name.

        Raises:
            UsageError: there is none, or there are several, or it is no amount.
        """
        found = find_budget(self)
        if found is None:
            raise UsageError(
                "Missing option '--macs': say what the student may cost, by one budget (--macs 0.5, --params 3M, "
                "--bytes 12MB, --latency 5ms)"
            )
        parse_amount(*found)
        return dict([found])


@takes_fields("test_each_epoch")
def compress(
    context: typer.Context,
    model: Model,
    data: DataOptions,
    options: CompressOptions,
    settings: CompressSettings,
    run: RunOptions,
) -> None:
    """Make a student of a trained model: carve it to a budget, compensate, and let it learn from the model.

    Writes student/, results.json, report.md and history.csv; with --onnx both models as ONNX files, which are timed. A
    part of the training images decides; the test images are scored once, at the end. An interrupted run resumes when
    the same command is given again.
    """
    budget: dict[str, Any] = options.find()
    refuse_folder(run.out, marker=MARKER, force=run.force)
    refuse_untrained(
        "model", model, options.weights, epochs="surgery tradeoff --epochs 10", because="of which nothing can be kept"
    )
    device = parse_device(run.device)
    opened = load_if_saved(model, run)
    images = surgery.data_for({"the model": opened}, **vars(data))
    network = surgery.classifier(opened, images, weights=options.weights, trust=run.trust, seed=settings.seed)
    with Bars() as bars:
        found = surgery.compress(
            network.to(device),
            images,
            settings,
            **budget,
            out=run.out,
            force=run.force,
            command=shlex.join(["surgery", *context.obj]),
            progress=bars,
        )
    write_config(context, run.out)
    content = {**found.to_dict(), "out": str(run.out)}
    emit(content, run.as_json, _models(found), _steps(found), note=_notes(found, run))


def _models(found: Compressed) -> Any:
    rows = [
        _row("dense", found.dense_score, found.dense_cost),
        _row("student", found.score, found.cost),
    ]
    header = ["", "accuracy", "95 % interval", "parameters", "MACs", "size"]
    if found.timing is not None:
        header += ["p50 ms"]
        for row in rows:
            row.append(f"{found.timing.results[row[0]].p50_ms:.3g}")
    return table("on the test images", header, rows)


def _row(name: str, score: Score, cost: Cost) -> list[str]:
    low, high = score.interval()
    interval = f"{100 * low:.1f}-{100 * high:.1f}"
    return [
        name, f"{score.accuracy:.1%}", interval, quantity(cost.params), quantity(cost.macs), mebibytes(cost.bytes),
    ]  # fmt: skip


def _steps(found: Compressed) -> Any:
    rows = [
        [
            str(number),
            amount_text(step.measured, found.kind),
            *(f"{score.accuracy:.1%}" for score in (step.carved, step.compensated, step.recovered)),
            _epochs(step),
            "" if step.lr is None else f"{step.lr:.2g}",
        ]
        for number, step in enumerate(found.steps, 1)
    ]
    header = ["step", "takes", "carved", "compensated", "recovered", "epochs", "rate"]
    return table("on the validation images", header, rows)


def _epochs(step: CompressStep) -> str:
    """Number of epochs, and the one that was kept where it is not the last."""
    if step.history is None:
        return "0"
    return str(step.epochs) if step.kept == step.epochs else f"{step.epochs}, kept {step.kept or 'none'}"


def _notes(found: Compressed, run: RunOptions) -> str:
    lines = [
        f"takes {amount_text(found.measured, found.kind)} of a budget of {amount_text(found.limit, found.kind)}",
        f"{counted(found.validation.total, 'image')} decided, on which the dense model has "
        f"{found.validation.accuracy:.1%}",
        *found.doubts,
    ]
    if found.timing is not None:
        ratio = found.timing.ratios["student"].inverse
        lines.append(f"{ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})")
    files = ["student/", *(["dense.onnx", "student.onnx"] if found.timing else []), "report.md"]
    files += ["history.csv"] if any(step.history for step in found.steps) else []
    return "\n".join([*lines, f"{found.seconds:.0f} s; written to {run.out}: {', '.join(files)} and {MARKER}"])
