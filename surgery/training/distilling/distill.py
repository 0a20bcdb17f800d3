"""Distillation: a student learns from a teacher, first by hints from its middle, then from its outputs (FitNets)."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.errors import UsageError, whole_number
from surgery.progress import Progress
from surgery.selectors import Where
from surgery.taps.hints import attach_hint, hint_loss
from surgery.taps.pairing import Guided
from surgery.training.data.cache import cache_bytes, cached_outputs, open_cache
from surgery.training.data.data import Data, Derived
from surgery.training.data.fingerprint import is_deterministic, module_digest
from surgery.training.descent import check_numbers, check_settings, check_trainable
from surgery.training.distilling.objectives import KD, Objective
from surgery.training.distilling.observed import Observed, observe
from surgery.training.engine import Engine, plain_modes
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.loop import classification_loss, label_loss, train
from surgery.training.resume import is_finished
from surgery.training.run import Batch, LossFn

MEMORY_LIMIT = 2 * 2**30
"""Bytes that a teacher's outputs may take where ``cache`` is ``"auto"``."""


@dataclass(frozen=True)
class Distillation:
    """What a distillation gave.

    Attributes:
        student: a copy of the student that was given, trained; without regressors, heads and taps.
        names: the guided layers and hints of stage 1.
        hints: how stage 1 went: its losses are hint losses.
        history: how stage 2 went.
        teacher_score: of the teacher, on the test images.
        before: of the student as it was given.
        score: of the student that came out.
    """

    student: nn.Module = field(repr=False, compare=False)
    names: tuple[tuple[str, str], ...]
    hints: History | None
    history: History | None
    teacher_score: Score
    before: Score
    score: Score

    @property
    def seconds(self) -> float:
        """What both stages took."""
        return sum(stage.seconds for stage in (self.hints, self.history) if stage is not None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the student."""
        return {
            "names": [list(pair) for pair in self.names],
            "hints": self.hints and self.hints.to_dict(),
            "history": self.history and self.history.to_dict(),
            "teacher_score": asdict(self.teacher_score),
            "before": asdict(self.before),
            "score": asdict(self.score),
            "seconds": self.seconds,
        }


@plain_modes()
def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    guided: Guided = None,
    hint: Where | None = None,
    regressor: str = "auto",
    hint_epochs: int = 5,
    epochs: int = 10,
    objectives: Objective | Sequence[Objective] = (KD(),),
    label_weight: float = 1.0,
    label_smoothing: float = 0.0,
    optimizer: str = "adamw",
    lr: float | None = None,
    hint_lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    schedule: str = "one-cycle",
    batch_size: int = 64,
    cache: str | os.PathLike[str] = "auto",
    channels_last: bool = False,
    precision: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    test_each_epoch: bool = False,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
) -> Distillation:
    """Teach a student what a teacher knows, in the two stages of FitNets (Romero et al., ICLR 2015, section 2.4).

    In stage 1 the student learns, as far as its guided layer and through a regressor, to predict the teacher's hint
    (`surgery.attach_hint`, equation 3). In stage 2 the whole student learns labels and the teacher's softened outputs
    (`KD`, equation 2), its weight lambda going from 4 to 1. In both the teacher is frozen, in ``eval()``.

    Other losses take the place of `KD`, or come beside it, by ``objectives``. The joint variant, hints and labels at
    once, as later toolkits have it, is ``hint_epochs=0, objectives=(KD(), Hint())``.

    Args:
        student, teacher: traced modules that take the same images, with as many classes. Neither is changed. The
            student is trained where it is, or under ``accelerate launch`` in all processes (`surgery.train`).
        guided, hint, regressor: as in `surgery.attach_hint`; by default the middle layers.
        hint_epochs: passes over the training images in stage 1; 0 leaves it out.
        epochs: and in stage 2; 0 leaves it out.
        objectives: what the student learns in stage 2 besides labels
            (`surgery.training.distilling.objectives`), one or several; with none it learns labels alone.
        label_weight: of the labels' cross-entropy beside them.
        lr, hint_lr: the peak learning rates of stages 2 and 1; by default the optimiser's, and that of stage 2. The
            settings that are not named here are those of `surgery.train`, and alike for both stages.
        cache: whether the teacher's outputs for the training images are computed once. ``"memory"`` keeps them there, a
            path in folders at it (reused by later runs with this teacher), ``"none"`` computes them in each step.
            ``"auto"`` is ``"memory"`` where the images are the same each time they are read (not augmented), and the
            outputs take up to 2 GiB; otherwise ``"none"``.
        channels_last: whether both networks keep the channels of maps innermost in memory while they teach and learn,
            which is often faster for convolutions. The student that comes out has the memory format of the one given.
        checkpoint: a folder from which a run that was cut off goes on, to the same weights (`surgery.train`).

    Raises:
        UsageError: a setting out of range, networks that do not go together, a cache of images that change, another
            run's checkpoint.
        EditError: layers that cannot be guided or give a hint.
        FloatingPointError: a loss stops being a number.
    """
    objectives = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
    for name, value in {"hint_epochs": hint_epochs, "epochs": epochs}.items():
        whole_number(name, value, 0)
    if hint_epochs == epochs == 0:
        raise UsageError("hint_epochs and epochs are 0: there is nothing to train")
    if not os.fspath(cache):
        raise UsageError('cache is empty: pass "auto", "memory", "none" or a folder')
    if not (isinstance(label_weight, Real) and label_weight >= 0):
        raise UsageError(f"label_weight is {label_weight!r}: it must be at least 0")
    if epochs and not objectives and not label_weight:
        raise UsageError("no objectives, and label_weight is 0: there is nothing to learn in stage 2")
    for rate in (lr, hint_lr):
        check_settings(data, max(epochs, hint_epochs), optimizer, rate, batch_size, schedule, checkpoint_every)
    check_numbers(momentum, weight_decay, label_smoothing, seed, workers)
    check_trainable(student)
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "batch_size": batch_size,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "workers": workers,
        "progress": progress,
    }
    engine = Engine(next(student.parameters()).device, precision)
    pairs = replace(data, train=_Pairs(data.train))
    lessons = _Lessons(pairs, cache, batch_size, workers, progress if engine.main else None, engine)
    pair = attach_hint(student, teacher, guided, hint, regressor=regressor, seed=seed) if hint_epochs else None
    observed = observe(student, teacher, objectives, epochs=epochs, seed=seed) if epochs and objectives else None
    if channels_last:
        learning: list[nn.Module] = [pair] if pair is not None else []
        learning += [observed.student, observed.teacher] if observed is not None else []
        for module in learning:
            cast(Any, module).to(memory_format=torch.channels_last)
    identity = {"teacher": module_digest(teacher), "regressor": regressor, "channels_last": channels_last}
    before, teacher_score = (evaluate(module, data.test, workers=workers) for module in (student, teacher))
    hints = history = None
    learned = copy.deepcopy(student)
    if pair is not None:
        file = None if checkpoint is None else Path(checkpoint) / "hints.pt"
        hints = train(
            pair.student,
            lessons.by(pair.teacher, "hints", file),
            epochs=hint_epochs,
            lr=lr if hint_lr is None else hint_lr,
            loss_fn=_hint_objective(pair.teacher),
            checkpoint=file,
            identity={**identity, "names": [list(names) for names in pair.names]},
            task="hints",
            **settings,
        )
        learned = pair.restore(student)
    if epochs:
        file = None if checkpoint is None else Path(checkpoint) / "student.pt"
        if observed is not None:
            observed.take(learned)
        history = train(
            learned if observed is None else observed.student,
            data if observed is None else lessons.by(observed.teacher, "distill", file),
            epochs=epochs,
            lr=lr,
            label_smoothing=label_smoothing,
            loss_fn=_objective(observed, label_weight, label_smoothing),
            test_each_epoch=test_each_epoch,
            checkpoint=file,
            identity={**identity, "label_weight": label_weight, "objectives": [repr(o) for o in objectives]},
            task="distill",
            **settings,
        )
        learned = learned if observed is None else observed.restore(learned)
    return Distillation(
        student=learned,
        names=pair.names if pair is not None else (),
        hints=hints,
        history=history,
        teacher_score=teacher_score,
        before=before,
        score=evaluate(learned, data.test, workers=workers),
    )


class _Pairs(Derived):
    """Images and labels alone: what else items have would be taken for the teacher's outputs."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.images[index][:2]


@dataclass(frozen=True)
class _Lessons:
    """Training images, with a teacher's outputs beside them where these are cached."""

    data: Data
    cache: str | os.PathLike[str]
    batch_size: int
    workers: int
    progress: Progress | None
    engine: Engine

    def by(self, teacher: nn.Module, task: str, checkpoint: Path | None) -> Data:
        """The data of a stage; without outputs, too, where the checkpoint says that it is over."""
        teacher.to(self.engine.device)
        where = self._where(teacher, task)
        if where is None or (checkpoint is not None and is_finished(checkpoint)):
            return self.data
        if where == "memory" or self.engine.main:
            images = cached_outputs(
                teacher,
                self.data.train,
                where=where,
                batch_size=self.batch_size,
                workers=self.workers,
                progress=self.progress,
                task=f"{task}: cache",
            )
        self.engine.wait()
        if where != "memory" and not self.engine.main:
            images = open_cache(where, self.data.train)
        return replace(self.data, train=images)

    def _where(self, teacher: nn.Module, task: str) -> str | os.PathLike[str] | None:
        if self.cache == "none":
            return None
        if self.cache == "auto":
            images = self.data.train
            fits = is_deterministic(images) and cache_bytes(teacher, images) <= MEMORY_LIMIT
            return "memory" if fits else None
        return self.cache if self.cache == "memory" else Path(self.cache) / task


def _hint_objective(teacher: nn.Module) -> LossFn:
    def loss_fn(model: nn.Module, batch: Batch, epoch: float) -> Tensor:
        return hint_loss(_tuple(model(batch[0])), _outputs(teacher, batch))

    return loss_fn


def _objective(observed: Observed | None, label_weight: float, label_smoothing: float) -> LossFn:
    if observed is None:
        labels_alone = classification_loss(label_smoothing)
        return lambda model, batch, epoch: label_weight * labels_alone(model, batch, epoch)

    def loss_fn(model: nn.Module, batch: Batch, epoch: float) -> Tensor:
        images, labels, *_ = batch
        output, values = model(images)
        loss = observed.loss(values, _outputs(observed.teacher, batch), labels, epoch)
        return loss + label_weight * label_loss(output, labels, label_smoothing) if label_weight else loss

    return loss_fn


def _outputs(teacher: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """The teacher's for a batch: cached beside its images, or computed now."""
    images, _, *cached = batch
    if cached:
        return tuple(cached)
    with torch.no_grad():
        return _tuple(teacher(images))


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
