"""How a candidate of a curve is trained: on labels, by the dense model, or in generations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery.deploy.compress.recovery import hold_out, recover, recovery_rate
from surgery.deploy.curve.candidates import Budget, Candidate
from surgery.deploy.curve.run_progress import PartProgress
from surgery.errors import UsageError
from surgery.operations.masks import split_masks
from surgery.operations.reset import reset_hypothesis
from surgery.progress import Progress
from surgery.settings import DistillSettings, EvolveSettings, TradeoffSettings, TrainSettings
from surgery.taps.hints import attach_hint
from surgery.training.data.data import Data
from surgery.training.distilling.distill import distill
from surgery.training.evaluation import evaluate
from surgery.training.evolve import evolve
from surgery.training.history import History
from surgery.training.loop import train

_DISTILL = ("distill: cache", "distill")
"""The tasks of a distillation without hints."""

Trained = tuple[nn.Module, Mapping[str, History]]
"""A module, and the records of its training by stage; empty if it was not trained."""


@dataclass(frozen=True)
class Lesson:
    """How the candidates of a run with these ``settings`` are trained."""

    settings: TradeoffSettings

    @property
    def training(self) -> TrainSettings | None:
        """Settings of the training; for ``evolve``, of each generation. None: no training."""
        epochs = self.settings.finetune_epochs
        return self.settings.training(epochs=epochs) if epochs else None

    def identity(self) -> dict[str, Any]:
        """The identity of a lesson, as plain JSON data."""
        teach, training = self.settings.teach, self.training
        own: dict[str, dict[str, Any]] = {
            "hints": {"hint_epochs": self.settings.hint_epochs},
            "evolve": {"generations": self.settings.generations},
        }
        if self.settings.method == "compress":
            own[teach] = {"method": "compress", "recovery": self.settings.compressing().identity()}
        return {"teach": teach, "settings": training and training.identity(), **own.get(teach, {})}

    @property
    def passes(self) -> int:
        """Number of epochs of all stages together."""
        given = self.settings
        if not given.finetune_epochs:
            return 0
        return {
            "hints": given.finetune_epochs + given.hint_epochs,
            "evolve": given.finetune_epochs * given.generations,
        }.get(given.teach, given.finetune_epochs)

    def refuse(self, candidate: Candidate | Budget, module: nn.Module, dense: nn.Module) -> None:
        """Raise the errors of `give` before anything is trained."""
        given = self.settings
        if given.method == "compress" and isinstance(candidate, Candidate) and candidate.rate is None:
            raise UsageError(f"the method compress is for slim candidates: leave out {candidate.name!r}")
        if self.training is None:
            return
        if given.teach == "evolve":
            if candidate.rate is None or given.round_to > 1 or given.importance != "prefix":
                what = f"candidate {candidate.name!r}" if candidate.rate is None else "round_to and importance"
                raise UsageError(f"Knowledge Evolution carves at split rates alone: leave out {what}")
            reset_hypothesis(dense, split_masks(dense, candidate.rate))
        elif given.teach == "hints":
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
        """Train a copy of ``module``, the candidate made from ``dense``, on the device of both. Neither is changed.

        An interrupted training resumes from the folder ``checkpoint``.
        """
        teach, settings = self.settings.teach, self.training
        if settings is None:
            return module, {}
        if teach == "evolve" and candidate.rate is not None:
            names = [f"generation-{number + 1}" for number in range(self.settings.generations)]
            evolution = evolve(
                dense,
                data,
                candidate.rate,
                self.settings.generations,
                EvolveSettings.of(settings, {"recalibrate": True}),
                checkpoint=checkpoint,
                progress=PartProgress(progress, task, names),
            )
            assert evolution.slim is not None
            return evolution.slim, {n: g.history for n, g in zip(names, evolution.generations, strict=True)}
        if self.settings.method == "compress":
            return self._recover(module, dense, data, checkpoint, PartProgress(progress, task, _DISTILL))
        if teach == "labels":
            history = train(module, data, settings, checkpoint=checkpoint / "model.pt", progress=progress, task=task)
            trained, history = history.without_module()
            return trained, {"train": history}
        found = distill(
            module,
            dense,
            data,
            DistillSettings.of(settings, {"hint_epochs": self.settings.hint_epochs if teach == "hints" else 0}),
            checkpoint=checkpoint,
            progress=PartProgress(progress, task, ["hints: cache", "hints", *_DISTILL]),
        )
        stages = {"hints": found.hints, "distill": found.history}
        return found.module, {name: history for name, history in stages.items() if history is not None}

    def _recover(
        self, module: nn.Module, dense: nn.Module, data: Data, checkpoint: Path, progress: Progress
    ) -> Trained:
        """Recover a compensated candidate as `surgery.compress` does; held-out training images decide."""
        settings = self.settings.compressing()
        split = hold_out(data, settings)
        before, whole = (evaluate(one, split.test, **settings.scoring) for one in (module, dense))
        found = recover(
            module,
            dense,
            split,
            settings,
            step=1,
            lr=recovery_rate(whole, before, settings),
            before=before,
            hints={},
            checkpoint=checkpoint,
            progress=progress,
        )
        return found.module, {"distill": found.history}
