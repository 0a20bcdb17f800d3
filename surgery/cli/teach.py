"""The verb by which a model learns from another: distill."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from surgery import models as catalogue
from surgery.cli.lessons import LOSSES, objectives
from surgery.cli.options import (
    AsJson,
    DataRoot,
    Dataset,
    Device,
    Force,
    ImageSize,
    Limit,
    Seed,
    Trust,
    Weights,
    is_saved,
    parse_device,
)
from surgery.cli.output import emit, table
from surgery.cli.runs import (
    Augment,
    BatchSize,
    CheckpointEvery,
    LabelSmoothing,
    Optimizer,
    Precision,
    Schedule,
    Workers,
    chosen,
    one_after_the_other,
    under_way,
)
from surgery.counting.cost import Cost, cost
from surgery.deploy.classifiers import classifier, data_for
from surgery.deploy.curve.points import DataSummary
from surgery.deploy.measure.environment import environment
from surgery.errors import UsageError, whole_number
from surgery.folders import refuse_folder, staged_folder
from surgery.graph.traced import info
from surgery.models.checkpoint import load, save
from surgery.progress import Progress
from surgery.taps.hints import attach_hint
from surgery.training.data.cache import cache_bytes
from surgery.training.data.data import Data
from surgery.training.descent import check_numbers, check_settings
from surgery.training.distilling.distill import Distillation
from surgery.training.distilling.distill import distill as run_distill
from surgery.training.distilling.objectives import Hint, Objective
from surgery.training.distilling.observed import observe
from surgery.training.engine import Engine
from surgery.training.history import History, Score
from surgery.training.loop import train
from surgery.units import mebibytes, quantity

MARKER = "distill.json"
"""The file by which a folder is known as a result of ``distill``."""


def register(app: typer.Typer) -> None:
    """Add the verb of this file to ``app``."""
    app.command(
        epilog="Example: surgery distill resnet18 resnet34 --dataset mnist5k --teacher-epochs 5 --out runs/student"
    )(distill)


def distill(
    context: typer.Context,
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="The model that learns; named like any MODEL.")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The model that it learns from.")],
    dataset: Dataset,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    guided: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Layer of the student that learns a hint; several times. [default: middle]"),
    ] = None,
    hint: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="Layer of the teacher that is the hint; as often. [default: the middle]"),
    ] = None,
    regressor: Annotated[str, typer.Option(help="From guided layer to hint: auto, conv, fc or none.")] = "auto",
    hint_epochs: Annotated[
        int | None, typer.Option(help="Passes over the data in stage 1, hints; 0: leave it out. [default: 5]")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data in stage 2, labels and losses.")] = 10,
    joint: Annotated[bool, typer.Option("--joint", help="Learn hints in stage 2, without a stage 1.")] = False,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOSS",
            help=f"What is learned beside labels: {', '.join(LOSSES)} or none; several times. [default: kd]",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOSS=W", help="Weight of a loss, of labels or hint; kd=4,1 decays. [default: the papers']"
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of kd, kd-divergence and dkd.")] = None,
    standardise: Annotated[bool, typer.Option("--standardise", help="Standardise the logits of kd.")] = False,
    warmup_epochs: Annotated[
        float | None, typer.Option(help="Epochs in which the weights of dkd and review rise. [default: 20]")
    ] = None,
    tap: Annotated[
        list[str] | None,
        typer.Option(metavar="GUIDED=HINT", help="Layers that at and review compare. [default: the stages' ends]"),
    ] = None,
    label_smoothing: LabelSmoothing = 0.0,
    teacher_epochs: Annotated[int, typer.Option(help="Train the teacher first; 0: take it as it is.")] = 0,
    optimizer: Optimizer = "adamw",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [default: usual with the optimizer]")] = None,
    hint_lr: Annotated[float | None, typer.Option(help="The same in stage 1. [default: --lr]")] = None,
    teacher_lr: Annotated[float | None, typer.Option(help="The same of the teacher. [default: usual]")] = None,
    schedule: Schedule = "one-cycle",
    batch_size: BatchSize = 64,
    augment: Augment = "none",
    cache: Annotated[
        str, typer.Option(metavar="WHERE", help="Keep the teacher's outputs: auto, memory, none or a folder.")
    ] = "auto",
    image_size: ImageSize = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    weights: Weights = "none",
    teacher_weights: Annotated[str, typer.Option(metavar="NAME", help="The same for the teacher.")] = "none",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Keep channels innermost in memory: often faster for convolutions.")
    ] = False,
    precision: Precision = None,
    device: Device = "auto",
    workers: Workers = 0,
    checkpoint_every: CheckpointEvery = None,
    seed: Seed = 0,
    trust: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Let a student learn from a teacher: hints from its middle first, then its outputs and the labels (FitNets).

    Writes the student, distill.json, and the teacher where it was trained. A run that was cut off goes on when the same
    command is given again. Runs in several processes as well: accelerate launch -m surgery distill ...
    """
    hint_epochs = (0 if joint else 5) if hint_epochs is None else hint_epochs
    if (guided or hint) and not (hint_epochs or joint):
        raise UsageError("--guided and --hint are of stage 1 and of --joint, and --hint-epochs 0 leaves both out")
    hints: dict[str, Any] = {"guided": guided or None, "hint": hint or None, "regressor": regressor}
    learned, label_weight = objectives(
        loss or ["kd"],
        weights=weight or [],
        temperature=temperature,
        standardise=standardise,
        warmup_epochs=warmup_epochs,
        taps=tap or [],
        hint=Hint(**hints) if joint else None,
    )
    check_numbers(0.0, None, label_smoothing, seed, workers)
    for name, value in {"teacher-epochs": teacher_epochs, "hint-epochs": hint_epochs, "epochs": epochs}.items():
        whole_number(f"--{name}", value, 0)
    if hint_epochs == epochs == 0:
        raise UsageError("--hint-epochs and --epochs are 0: the student has nothing to learn")
    whole_number("--image-size", image_size if image_size is not None else 1, 1)
    refuse_folder(out, marker=MARKER, force=force)
    _refuse_untrained(teacher, teacher_weights, teacher_epochs)
    engine = Engine(parse_device(device), precision)
    sources = {"student": student, "teacher": teacher}
    opened = {w: load(s, trust=trust) if is_saved(s) else s for w, s in sources.items()}
    with one_after_the_other(engine):  # the first may have to fetch what the others then read
        data = data_for(opened, dataset, data_root=data_root, image_size=image_size, limit=limit, augment=augment)
        build: dict[str, Any] = {"trust": trust, "seed": seed}
        pupil = classifier(opened["student"], data, what="the student", weights=weights, **build)
        master = classifier(opened["teacher"], data, what="the teacher", weights=teacher_weights, **build)
    for rate in (lr, hint_lr, teacher_lr):
        check_settings(data, 1, optimizer, rate, batch_size, schedule, checkpoint_every)
    if teacher_epochs:  # what is refused is refused before the teacher is trained, and not after it
        _rehearse(pupil, master, data, hints if hint_epochs else None, learned if epochs else (), cache)
    costs = {"teacher": cost(master), "student": cost(pupil)}
    shares = _shares(costs, teacher_epochs, hint_epochs, epochs)
    settings = chosen(context)
    common: dict[str, Any] = {
        "optimizer": optimizer,
        "schedule": schedule,
        "batch_size": batch_size,
        "label_smoothing": label_smoothing,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "test_each_epoch": True,
        "seed": seed,
        "workers": workers,
    }

    def run(folder: Path, progress: Progress | None) -> tuple[History | None, Distillation]:
        taught = None
        for module in (pupil, master):
            module.to(engine.device)
        if teacher_epochs:
            options = {**common, "epochs": teacher_epochs, "lr": teacher_lr, "task": "teacher"}
            taught = train(master, data, checkpoint=folder / "teacher.pt", progress=progress, **options)
        return taught, run_distill(
            pupil,
            master,
            data,
            **hints,
            hint_epochs=hint_epochs,
            epochs=epochs,
            objectives=learned,
            label_weight=label_weight,
            lr=lr,
            hint_lr=hint_lr,
            cache=cache,
            channels_last=channels_last,
            checkpoint=folder,
            progress=progress,
            **common,
        )

    with under_way(engine, out, settings, shares, force=force) as (folder, progress):
        taught, found = run(folder, progress)
        if not engine.main:
            return
        content = {
            "schema": 1,
            "command": shlex.join(["surgery", *context.obj]),
            "student": {"source": info(pupil).source or student, **costs["student"].to_dict()},
            "teacher": {"source": info(master).source or teacher, **costs["teacher"].to_dict()},
            "data": asdict(DataSummary.of(data)),
            "settings": settings,
            **found.to_dict(),
            "teacher_history": taught and taught.to_dict(),
            "environment": environment().to_dict(),
        }
        written = {"student": found.student, **({"teacher": master} if taught else {})}
        with staged_folder(out, marker=MARKER, force=force) as staging:
            for name, module in written.items():
                save(module, staging / name)
            (staging / MARKER).write_text(json.dumps(content, indent=1) + "\n")
    emit(
        {**content, "out": str(out)},
        as_json,
        _scores(f"{student} taught by {teacher} on {dataset}", found, costs),
        note=_notes(found, taught, data, out, written),
    )


def _refuse_untrained(teacher: str, weights: str, epochs: int) -> None:
    """A model that is built anew has random weights, unless it is the user's own, which may load its weights."""
    if epochs or is_saved(teacher):
        return
    parsed = catalogue.parse(teacher, weights=weights)
    if parsed.entry is not None and parsed.weights is None:
        raise UsageError(
            f"the teacher {teacher!r} has random weights, from which nothing can be learned: train it first "
            "(--teacher-epochs 10), take published weights (--teacher-weights DEFAULT), or pass a saved folder"
        )


def _rehearse(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    hints: Mapping[str, Any] | None,
    learned: Sequence[Objective],
    cache: str,
) -> None:
    """Raise what `surgery.distill` would."""
    if hints is not None:
        attach_hint(student, teacher, **hints)
    if learned:
        observe(student, teacher, learned, epochs=1)
    if cache not in ("auto", "none"):
        cache_bytes(teacher, data.train)


def _shares(costs: Mapping[str, Cost], teacher_epochs: int, hint_epochs: int, epochs: int) -> dict[str, float]:
    """The part of the time that each task is likely to take: a backward pass costs twice what a forward pass does, and
    stage 1 runs half of each network."""
    student, teacher = costs["student"].macs, costs["teacher"].macs
    shares = {
        "teacher": 3 * teacher_epochs * teacher,
        "hints: cache": teacher / 2 if hint_epochs else 0,
        "hints": 1.5 * hint_epochs * student,
        "distill: cache": teacher if epochs else 0,
        "distill": 3 * epochs * student,
    }
    return {task: share for task, share in shares.items() if share}


def _scores(title: str, found: Distillation, costs: Mapping[str, Cost]) -> Any:
    rows = [
        _row("teacher", found.teacher_score, costs["teacher"]),
        _row("student before", found.before, costs["student"]),
        _row("student after", found.score, costs["student"]),
    ]
    return table(title, ["", "accuracy", "95 % interval", "parameters", "MACs", "size"], rows)


def _row(name: str, score: Score, figures: Cost) -> list[str]:
    low, high = score.interval()
    interval = f"{100 * low:.1f}-{100 * high:.1f}"
    return [
        name, f"{score.accuracy:.1%}", interval, quantity(figures.params), quantity(figures.macs),
        mebibytes(figures.bytes),
    ]  # fmt: skip


def _notes(found: Distillation, taught: History | None, data: Data, out: Path, written: Mapping[str, nn.Module]) -> str:
    train, test = data.counts
    lines = [f"{train} training and {test} test images of {data.image_size} x {data.image_size}"]
    lines += [f"hint: {guided} learned {hint}" for guided, hint in found.names]
    if found.teacher_score.guessed(len(data.classes)):
        lines.append("the teacher is no better than guessing: train it (--teacher-epochs)")
    seconds = found.seconds + (taught.seconds if taught else 0)
    folders = ", ".join(f"{name}/" for name in written)
    return "\n".join([*lines, f"{seconds:.0f} s; written to {out}: {folders} and {MARKER}"])
