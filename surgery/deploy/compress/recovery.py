"""Recovery: a student that was carved out of a dense model learns from it what the carving has cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.utils.data import Subset

from surgery.deploy.compress.hints import Kept, KeptHint
from surgery.errors import UsageError
from surgery.progress import Progress
from surgery.settings import CompressSettings
from surgery.training.data.data import Data, labels_of, stratified_split
from surgery.training.data.fingerprint import is_deterministic
from surgery.training.distilling.distill import distill
from surgery.training.distilling.objectives import KD, Objective
from surgery.training.history import History, Score
from surgery.training.stopping import EarlyStopping


@dataclass(frozen=True)
class Recovered:
    """A student after its recovery.

    Attributes:
        module: the student, of the best epoch.
        score: its score on the validation images.
        kept: the number of that epoch, from 1; 0: none was better than no training.
        history: the record of the training.
    """

    module: nn.Module
    score: Score
    kept: int
    history: History


def hold_out(data: Data, settings: CompressSettings) -> Data:
    """Split the training images: the same data with fewer images to train on, and those held out to test on.

    Raises:
        UsageError: images that change from one reading to the next, or too few.
    """
    if not is_deterministic(data.train):
        raise UsageError(
            "the training images change from one reading to the next, and so would those that decide: leave out the "
            "augmentation of the data, and give it as the setting augment"
        )
    kept, aside = stratified_split(labels_of(data.train).tolist(), fraction=settings.validation, seed=settings.seed)
    if len(kept) < 2:
        raise UsageError(f"of {data.counts[0]} training images {len(kept)} are left to train on: there must be 2")
    return replace(data, train=Subset(data.train, kept), test=Subset(data.train, aside))


def recovery_rate(dense: Score, student: Score, settings: CompressSettings) -> float:
    """The peak learning rate of a recovery, set by the damage that is left.

        lr * min(lr_most, max(lr_least, sqrt(1 - accuracy / dense accuracy)))

    A student that has lost all learns at the full rate; one that has lost nearly nothing is not moved far from where it
    is: by default at the usual rate of the optimizer, a fifth of the full one.

    Args:
        dense, student: scores of the dense model and of the compensated student on the same images.
        settings: ``lr``, ``lr_least`` and ``lr_most``.

    Example:
        >>> recovery_rate(Score(80, 100), Score(60, 100), CompressSettings(lr=1e-3))
        0.0005
    """
    lost = max(0.0, 1 - student.correct / dense.correct) if dense.correct else 1.0
    return settings.peak_lr * min(settings.lr_most, max(settings.lr_least, math.sqrt(lost)))


def recover(
    student: nn.Module,
    dense: nn.Module,
    data: Data,
    settings: CompressSettings,
    *,
    step: int,
    lr: float,
    before: Score,
    hints: Kept,
    checkpoint: Path | None,
    progress: Progress | None,
) -> Recovered:
    """Distil the dense model into a copy of ``student``: labels, softened outputs (`KD`) and, where there are any,
    hints.

    Args:
        data: ``data.test`` are the validation images, which end the training and choose its epoch.
        step: the number of the carving before, from 1.
        lr: the peak learning rate.
        before: the student's score on the validation images.
        hints: the stages whose values are hints, and the dense model's channels that the student has there.
        checkpoint: the folder from which an interrupted recovery resumes.
    """
    learned: list[Objective] = [KD()]
    if hints:
        learned.append(KeptHint(tuple(hints.items()), settings.hint_weight))
    stopping = EarlyStopping(settings.patience, before)
    found = distill(
        student,
        dense,
        data,
        settings.recovery(step, lr),
        objectives=learned,
        stopping=stopping,
        checkpoint=checkpoint,
        progress=progress,
    )
    assert found.history is not None
    return Recovered(found.module, found.score, stopping.best(found.history.epochs), found.history)
