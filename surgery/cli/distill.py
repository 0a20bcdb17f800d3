"""The verb by which a model learns from another: distill."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import surgery
from surgery.cli.config import write_config
from surgery.cli.fields import is_given, settings_of, takes_fields
from surgery.cli.losses import LossOptions, objectives
from surgery.cli.options import DataOptions, RunOptions, Weights, load_if_saved, parse_device, refuse_untrained
from surgery.cli.output import emit, table
from surgery.cli.runs import one_after_the_other, under_way
from surgery.errors import UsageError
from surgery.settings import DistillSettings, Settings, TrainSettings, option
from surgery.storage.folders import refuse_folder, staged_folder
from surgery.units import mebibytes, quantity

if TYPE_CHECKING:
    from torch import nn

    from surgery import Cost, Data, Distillation, History, Objective, Score

MARKER = "distill.json"
"""The file that marks a folder as a result of ``distill``."""


def register(app: typer.Typer) -> None:
    """Add the verb of this file to ``app``."""
    app.command(
        epilog="Example: surgery distill resnet18 resnet34 --dataset mnist5k --teacher-epochs 5 --out runs/student"
    )(distill)


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers learn hints, and when."""

    guided: list[str] | None = option(
        None, "Layer of the student that learns a hint; several times. [default: middle]", metavar="LAYER"
    )
    hint: list[str] | None = option(
        None, "Layer of the teacher that is the hint; as often. [default: the middle]", metavar="LAYER"
    )
    joint: bool = option(False, "Learn hints in stage 2, without a stage 1.")


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Settings):
    """How the networks are built, and the teacher is trained."""

    weights: Weights = "none"
    teacher_weights: str = option("none", "The same for the teacher.", metavar="NAME")
    teacher_epochs: int = option(0, "Train the teacher first; 0: take it as it is.", least=0)
    teacher_lr: float | None = option(None, "Peak learning rate of the teacher. [default: usual with the optimizer]")


@takes_fields("label_weight", "test_each_epoch")
def distill(
    context: typer.Context,
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="The model that learns; named like any MODEL.")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The model that it learns from.")],
    data: DataOptions,
    layers: LayerOptions,
    losses: LossOptions,
    settings: DistillSettings,
    teaching: TeacherOptions,
    run: RunOptions,
) -> None:
    """Let a student learn from a teacher: hints from its middle first, then its outputs and the labels (FitNets).

    Writes the student, distill.json, history.csv, and the teacher where it was trained. An interrupted run resumes when
    the same command is given again. Runs in several processes as well: accelerate launch -m surgery distill ...
    """
    if layers.joint and not is_given(context, "hint_epochs"):
        settings = replace(settings, hint_epochs=0)
    if (layers.guided or layers.hint) and not (settings.hint_epochs or layers.joint):
        raise UsageError("--guided and --hint are of stage 1 and of --joint, and --hint-epochs 0 leaves both out")
    hints: dict[str, Any] = {"guided": layers.guided or None, "hint": layers.hint or None}
    joint = surgery.Hint(**hints, regressor=settings.regressor) if layers.joint else None
    learned, label_weight = objectives(losses, joint)
    settings = settings if label_weight is None else replace(settings, label_weight=label_weight)
    settings = replace(settings, test_each_epoch=True)
    settings.refuse_mixed(learned)
    teacher_settings = _teacher_settings(teaching, settings)
    refuse_folder(run.out, marker=MARKER, force=run.force)
    if not teaching.teacher_epochs:
        nothing = "from which nothing can be learned"
        refuse_untrained("teacher", teacher, teaching.teacher_weights, epochs="--teacher-epochs 10", because=nothing)
    engine = surgery.Engine(parse_device(run.device), settings.precision)
    with one_after_the_other(engine):  # the first may have to fetch what the others then read
        images, pupil, master = _open(student, teacher, data, teaching, run, settings.seed)
    if teacher_settings is not None:  # what is refused is refused before the teacher is trained, and not after it
        _rehearse(pupil, master, images, settings, hints, learned)
    costs = {"teacher": surgery.cost(master), "student": surgery.cost(pupil)}
    shares = _shares(costs, teaching.teacher_epochs, settings)
    with under_way(engine, run.out, settings_of(context), shares, settings, force=run.force) as (folder, progress):
        pupil, master = pupil.to(engine.device), master.to(engine.device)
        taught = None
        if teacher_settings is not None:
            file = folder / "teacher.pt"
            taught = surgery.train(master, images, teacher_settings, checkpoint=file, progress=progress, task="teacher")
            master = taught.module
        found = surgery.distill(
            pupil, master, images, settings, **hints, objectives=learned, checkpoint=folder, progress=progress
        )
        if not engine.main:
            return
        content = {
            "schema": 1,
            "command": shlex.join(["surgery", *context.obj]),
            "student": {"source": surgery.recipe(pupil).source or student, **costs["student"].to_dict()},
            "teacher": {"source": surgery.recipe(master).source or teacher, **costs["teacher"].to_dict()},
            "data": asdict(surgery.DataSummary.of(images)),
            "settings": settings_of(context),
            **found.to_dict(),
            "teacher_history": taught and taught.to_dict(),
            "environment": surgery.environment().to_dict(),
        }
        written = {"student": found.module, **({"teacher": master} if taught else {})}
        with staged_folder(run.out, marker=MARKER, force=run.force) as staging:
            for name, module in written.items():
                surgery.save(module, staging / name)
            (staging / MARKER).write_text(json.dumps(content, indent=1) + "\n")
            surgery.write_history({"teacher": taught, "hints": found.hints, "distill": found.history}, staging)
            write_config(context, staging)
    emit(
        {**content, "out": str(run.out)},
        run.as_json,
        _scores(f"{student} taught by {teacher} on {data.dataset}", found, costs),
        note=_notes(found, taught, images, run.out, written),
    )


def _teacher_settings(teaching: TeacherOptions, settings: DistillSettings) -> TrainSettings | None:
    """Return the settings of the teacher's training; None if it is not trained."""
    epochs, lr = teaching.teacher_epochs, teaching.teacher_lr
    return settings.training(epochs=epochs, lr=lr) if epochs else None


def _open(
    student: str, teacher: str, data: DataOptions, teaching: TeacherOptions, run: RunOptions, seed: int
) -> tuple[Data, nn.Module, nn.Module]:
    """Load the data, and both networks for it."""
    sources = {"student": student, "teacher": teacher}
    opened = {w: load_if_saved(s, run) for w, s in sources.items()}
    images = surgery.data_for(opened, **vars(data))
    build: dict[str, Any] = {"trust": run.trust, "seed": seed}
    pupil = surgery.classifier(opened["student"], images, what="the student", weights=teaching.weights, **build)
    master = surgery.classifier(
        opened["teacher"], images, what="the teacher", weights=teaching.teacher_weights, **build
    )
    return images, pupil, master


def _rehearse(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    settings: DistillSettings,
    hints: Mapping[str, Any],
    learned: Sequence[Objective],
) -> None:
    """Raise the errors of `surgery.distill` before the teacher is trained."""
    if settings.hint_epochs:
        surgery.attach_hint(student, teacher, **hints, regressor=settings.regressor)
    if settings.epochs and learned:
        surgery.observe(student, teacher, learned, epochs=1)
    if settings.cache not in ("auto", "none"):
        surgery.cache_bytes(teacher, data.train)


def _shares(costs: Mapping[str, Cost], teacher_epochs: int, settings: DistillSettings) -> dict[str, float]:
    """Estimate the share of the time that each task takes.

    A backward pass costs twice what a forward pass does, and stage 1 runs half of each network.
    """
    student, teacher = costs["student"].macs, costs["teacher"].macs
    shares = {
        "teacher": 3 * teacher_epochs * teacher,
        "hints: cache": teacher / 2 if settings.hint_epochs else 0,
        "hints": 1.5 * settings.hint_epochs * student,
        "distill: cache": teacher if settings.epochs else 0,
        "distill": 3 * settings.epochs * student,
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
    return "\n".join([*lines, f"{seconds:.0f} s; written to {out}: {folders}, history.csv and {MARKER}"])
