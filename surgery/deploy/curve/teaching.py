"""How a candidate of a curve is trained: on labels, by the dense model, or in generations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery.deploy.curve.candidates import Budget, Candidate
from surgery.deploy.curve.run_progress import parts_of
from surgery.errors import UsageError
from surgery.operations.reset import reset_hypothesis
from surgery.operations.slim import split_masks
from surgery.progress import Progress
from surgery.settings import DistillSettings, EvolveSettings, TradeoffSettings, TrainSettings
from surgery.taps.hints import attach_hint
from surgery.training.data.data import Data
from surgery.training.distilling.distill import distill
from surgery.training.evolve import evolve
from surgery.training.history import History
from surgery.training.loop import train

Trained = tuple[nn.Module, Mapping[str, History]]
"""A module, and the records of its training by stage; empty if it was not trained."""


@dataclass(frozen=True)
class Lesson:
    """How a candidate is trained.

    Attributes:
        teach: one of `surgery.settings.TEACHERS`.
        settings: settings of the training, by SGD; for ``evolve``, of each generation. None: no training.
        hint_epochs: for ``hints``, epochs of stage 1.
        generations: for ``evolve``, their number.
    """

    teach: str
    settings: TrainSettings | None
    hint_epochs: int = 1
    generations: int = 3

    @classmethod
    def of(cls, settings: TradeoffSettings) -> Lesson:
        """The lesson that ``settings`` ask for."""
        epochs, common = settings.finetune_epochs, {"lr": settings.lr, "batch_size": settings.batch_size}
        own = TrainSettings(epochs=epochs, seed=settings.seed, **common) if epochs else None  # type: ignore[arg-type]
        return cls(settings.teach, own, settings.hint_epochs, settings.generations)

    def identity(self) -> dict[str, Any]:
        """The identity of a lesson, as plain JSON data."""
        own = {"hints": {"hint_epochs": self.hint_epochs}, "evolve": {"generations": self.generations}}
        settings = self.settings.identity() if self.settings else None
        return {"teach": self.teach, "settings": settings, **own.get(self.teach, {})}

    @property
    def passes(self) -> float:
        """Number of epochs of all stages together."""
        extra = self.hint_epochs if self.teach == "hints" else 0
        times = self.generations if self.teach == "evolve" else 1
        return self.settings.epochs * times + extra if self.settings else 0

    def refuse(
        self,
        candidate: Candidate | Budget,
        module: nn.Module,
        dense: nn.Module,
        *,
        round_to: int = 1,
        importance: str = "prefix",
    ) -> None:
        """Raise the errors of `give` before anything is trained."""
        if self.settings is None:
            return
        if self.teach == "evolve":
            if candidate.rate is None or round_to > 1 or importance != "prefix":
                what = f"candidate {candidate.name!r}" if candidate.rate is None else "round_to and importance"
                raise UsageError(f"Knowledge Evolution carves at split rates alone: leave out {what}")
            reset_hypothesis(dense, split_masks(dense, candidate.rate))
        elif self.teach == "hints":
            attach_hint(module, dense)

    def give(
        self,
        candidate: Candidate | Budget,
        module: nn.Module,
        dense: nn.Module,
        data: Data,
        *,
        checkpoint: Path,
        progress: Progress,
        task: str,
    ) -> Trained:
        """Train a copy of ``module``, the candidate made from ``dense``. Neither is changed.

        An interrupted training resumes from the folder ``checkpoint``.
        """
        settings = self.settings
        if settings is None:
            return module, {}
        if self.teach == "evolve" and candidate.rate is not None:
            names = [f"generation-{number + 1}" for number in range(self.generations)]
            evolution = evolve(
                dense,
                data,
                candidate.rate,
                self.generations,
                EvolveSettings.of(settings, {"recalibrate": True}),
                checkpoint=checkpoint,
                progress=parts_of(progress, task, names),
            )
            assert evolution.slim is not None
            return evolution.slim, {n: g.history for n, g in zip(names, evolution.generations, strict=True)}
        if self.teach == "labels":
            history = train(module, data, settings, checkpoint=checkpoint / "model.pt", progress=progress, task=task)
            trained, history = history.without_module()
            return trained, {"train": history}
        found = distill(
            module,
            dense,
            data,
            DistillSettings.of(settings, {"hint_epochs": self.hint_epochs if self.teach == "hints" else 0}),
            checkpoint=checkpoint,
            progress=parts_of(progress, task, ["hints: cache", "hints", "distill: cache", "distill"]),
        )
        stages = {"hints": found.hints, "distill": found.history}
        return found.module, {name: history for name, history in stages.items() if history is not None}
