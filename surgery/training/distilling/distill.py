"""Distillation: a student learns from a teacher's hints, then from its outputs (FitNets)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.errors import UsageError
from surgery.graph.traced import TracedModule
from surgery.progress import Progress
from surgery.selectors import Where
from surgery.settings import DistillSettings, accepts, renamed
from surgery.taps.hints import HintPair, attach_hint, hint_loss
from surgery.taps.pairing import Guided
from surgery.training.data.adapt import AnyData, as_data
from surgery.training.data.cache import cache_bytes, cache_outputs, open_cache
from surgery.training.data.data import Data, Derived
from surgery.training.data.fingerprint import is_deterministic, module_digest
from surgery.training.distilling.objectives import KD, Objective
from surgery.training.distilling.observed import Observed, observe
from surgery.training.engine import Engine
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.loop import Course, classification_loss, label_loss, take_course
from surgery.training.modes import plain_modes
from surgery.training.optimizers import check_data, check_trainable
from surgery.training.resume import is_finished
from surgery.training.run import Batch, LossFn
from surgery.training.stopping import EarlyStopping
from surgery.training.tracking import followed

MEMORY_LIMIT = 2 * 2**30
"""Bytes that a teacher's outputs may take with ``cache="auto"``."""


@dataclass(frozen=True)
class Distillation:
    """The result of `surgery.distill`. Scores are on the test images.

    Attributes:
        module: the trained student, a new module without regressors, heads and taps.
        names: the guided layers and hints of stage 1.
        hints: the record of stage 1, with hint losses; None if it was skipped.
        history: the record of stage 2; None if it was skipped.
        teacher_score: score of the teacher.
        before: score of the student as it was given.
        score: score of the trained student.
    """

    module: nn.Module = field(repr=False, compare=False)
    names: tuple[tuple[str, str], ...]
    hints: History | None
    history: History | None
    teacher_score: Score
    before: Score
    score: Score

    student = renamed("module", "student")

    @property
    def seconds(self) -> float:
        """Time of both stages."""
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


@accepts(DistillSettings)
@followed
@plain_modes()
def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: AnyData,
    settings: DistillSettings = DistillSettings(),
    *,
    guided: Guided = None,
    hint: Where | None = None,
    objectives: Objective | Sequence[Objective] = (KD(),),
    stopping: EarlyStopping | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Distillation:
    """Teach a student what a teacher knows, in the two stages of FitNets (Romero et al., ICLR 2015, section 2.4).

    In stage 1 the layers up to the guided layer, and a regressor behind it, learn to predict the teacher's hint
    (`surgery.attach_hint`, equation 3). In stage 2 the whole student learns labels and the teacher's softened outputs
    (`KD`, equation 2), whose weight lambda decays from 4 to 1. The teacher is frozen, in ``eval()``.

    ``objectives`` replace `KD`, or add to it. The joint variant of later toolkits, hints and labels at once, is
    ``hint_epochs=0, objectives=(KD(), Hint())``.

    Args:
        student, teacher: traced modules that take the same images, with the same number of classes. Neither is changed.
            The student trains on its device, or under ``accelerate launch`` in all processes (`surgery.train`).
        data: images (N, C, H, W) and labels, as of `surgery.load_data`, or what `surgery.as_data` takes.
        settings: see `surgery.DistillSettings`; its fields may be given as keywords. ``cache`` says where the teacher's
            outputs for the training images are kept: ``"memory"``; a path, for folders that later runs with this
            teacher reuse; ``"none"``, to compute them in each step. ``"auto"`` is ``"memory"`` for images that are the
            same each time they are read (not augmented) and outputs of up to 2 GiB, else ``"none"``. With
            ``channels_last`` the result still has the memory format of ``student``.
        guided, hint: as in `surgery.attach_hint`; by default the middle layers.
        objectives: one or several things to learn in stage 2 next to labels
            (`surgery.training.distilling.objectives`); with none, labels alone.
        stopping: when stage 2 ends early, and which of its epochs is kept (`surgery.EarlyStopping`). The images of
            ``data.test`` decide: pass data whose part to test on is one to validate on.
        checkpoint: a folder from which an interrupted run resumes to the same weights (`surgery.train`).

    Returns:
        The trained student as ``.module``, with the records of both stages and scores.

    Raises:
        UsageError: a setting out of range, networks that do not fit together, a cache of images that change, another
            run's checkpoint.
        EditError: layers that cannot be guided, or have no hint to give.
        FloatingPointError: a loss stops being a number.

    Example:
        >>> found = surgery.distill(student, teacher, data, guided="layer2", hint="layer2", hint_epochs=5, epochs=20)
        >>> surgery.save(found.module, "student/")
    """
    data = as_data(data)
    objectives = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
    if settings.epochs and not objectives and not settings.label_weight:
        raise UsageError("no objectives, and label_weight is 0: there is nothing to learn in stage 2")
    settings.refuse_mixed(objectives)
    check_data(data)
    check_trainable(student)
    engine = Engine(next(student.parameters()).device, settings.precision)
    identity = {
        "teacher": module_digest(teacher),
        "regressor": settings.regressor,
        "channels_last": settings.channels_last,
    }
    teaching = _Teaching(data, settings, engine, identity, checkpoint, progress)
    pair = observed = None
    if settings.hint_epochs:
        pair = attach_hint(student, teacher, guided, hint, regressor=settings.regressor, seed=settings.seed)
    if settings.epochs and objectives:
        observed = observe(student, teacher, objectives, epochs=settings.epochs, seed=settings.seed)
    if settings.channels_last:
        learning = [pair] if pair is not None else []
        learning += [observed.student, observed.teacher] if observed is not None else []  # type: ignore[list-item]
        for module in learning:
            cast(Any, module).to(memory_format=torch.channels_last)
    before, teacher_score = (evaluate(module, data.test, **settings.scoring) for module in (student, teacher))
    hints = history = None
    learned = student
    if pair is not None:
        hints = teaching.give_hints(pair)
        learned = pair.restore(student)
    if settings.epochs:
        if stopping is not None and stopping.before is None:
            given = before if learned is student else evaluate(learned, data.test, **settings.scoring)
            stopping = replace(stopping, before=given)
        learned, history = teaching.give_outputs(learned, observed, objectives, stopping)
    return Distillation(
        module=learned,
        names=pair.names if pair is not None else (),
        hints=hints,
        history=history,
        teacher_score=teacher_score,
        before=before,
        score=evaluate(learned, data.test, **settings.scoring),
    )


class _Pairs(Derived):
    """Images and labels alone."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.images[index][:2]


@dataclass(frozen=True)
class _Teaching:
    """The two stages, each on the training images, with cached outputs of the teacher where there are any."""

    data: Data
    settings: DistillSettings
    engine: Engine
    identity: Mapping[str, Any]
    checkpoint: str | os.PathLike[str] | None
    progress: Progress | None

    @cached_property
    def pairs(self) -> Data:
        """The data, without further parts of training items: they would be taken for the teacher's outputs."""
        return replace(self.data, train=_Pairs(self.data.train))

    def give_hints(self, pair: HintPair) -> History:
        """Train the pair's student: stage 1."""
        settings, file = self.settings, self._file("hints")
        given = settings.training(
            epochs=settings.hint_epochs,
            lr=settings.lr if settings.hint_lr is None else settings.hint_lr,
            label_smoothing=0.0,
            test_each_epoch=False,
        )
        course = Course(
            loss_fn=_hint_loss(pair.teacher),
            checkpoint=file,
            identity={**self.identity, "names": [list(names) for names in pair.names]},
            progress=self.progress,
            task="hints",
        )
        data = self._taught_by(pair.teacher, "hints", file)
        trained, history = take_course(pair.student, data, given, course).without_module()
        pair.student = cast(TracedModule, trained)
        return history

    def give_outputs(
        self,
        student: nn.Module,
        observed: Observed | None,
        objectives: Sequence[Objective],
        stopping: EarlyStopping | None,
    ) -> tuple[nn.Module, History]:
        """Train the student, or its observed copy: stage 2."""
        settings, file = self.settings, self._file("student")
        if observed is not None:
            observed.take(student)
        course = Course(
            loss_fn=_output_loss(observed, settings.label_weight, settings.label_smoothing),
            checkpoint=file,
            identity={
                **self.identity,
                "label_weight": settings.label_weight,
                "objectives": [repr(objective) for objective in objectives],
            },
            progress=self.progress,
            task="distill",
            stopping=stopping,
        )
        trained, history = take_course(
            student if observed is None else observed.student,
            self.data if observed is None else self._taught_by(observed.teacher, "distill", file),
            settings.training(),
            course,
        ).without_module()
        if observed is None:
            return trained, history
        return replace(observed, student=cast(TracedModule, trained)).restore(student), history

    def _file(self, name: str) -> Path | None:
        return None if self.checkpoint is None else Path(self.checkpoint) / f"{name}.pt"

    def _taught_by(self, teacher: nn.Module, task: str, checkpoint: Path | None) -> Data:
        """The data of a stage, with the teacher's outputs unless it is finished or computes them in each step."""
        teacher.to(self.engine.device)
        where = self._where(teacher, task)
        if where is None or (checkpoint is not None and is_finished(checkpoint)):
            return self.pairs
        if where == "memory" or self.engine.main:
            images = cache_outputs(
                teacher,
                self.pairs.train,
                where=where,
                batch_size=self.settings.batch_size,
                workers=self.settings.workers,
                progress=self.progress if self.engine.main else None,
                task=f"{task}: cache",
            )
        self.engine.wait()
        if where != "memory" and not self.engine.main:
            images = open_cache(where, self.pairs.train)
        return replace(self.pairs, train=images)

    def _where(self, teacher: nn.Module, task: str) -> str | os.PathLike[str] | None:
        cache = self.settings.cache
        if cache == "none" or (cache == "auto" and self.settings.augments):
            return None
        if cache == "auto":
            images = self.pairs.train
            fits = is_deterministic(images) and cache_bytes(teacher, images) <= MEMORY_LIMIT
            return "memory" if fits else None
        return cache if cache == "memory" else Path(cache) / task


def _hint_loss(teacher: nn.Module) -> LossFn:
    def loss_fn(model: nn.Module, batch: Batch, epoch: float) -> Tensor:
        return hint_loss(_as_tuple(model(batch[0])), _teacher_outputs(teacher, batch))

    return loss_fn


def _output_loss(observed: Observed | None, label_weight: float, label_smoothing: float) -> LossFn:
    if observed is None:
        labels_alone = classification_loss(label_smoothing)
        return lambda model, batch, epoch: label_weight * labels_alone(model, batch, epoch)

    def loss_fn(model: nn.Module, batch: Batch, epoch: float) -> Tensor:
        images, labels, *_ = batch
        output, values = model(images)
        loss = observed.loss(values, _teacher_outputs(observed.teacher, batch), labels, epoch)
        return loss + label_weight * label_loss(output, labels, label_smoothing) if label_weight else loss

    return loss_fn


def _teacher_outputs(teacher: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """The teacher's outputs for a batch: the cached ones, or computed now."""
    images, _, *cached = batch
    if cached:
        return tuple(cached)
    with torch.no_grad():
        return _as_tuple(teacher(images))


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
