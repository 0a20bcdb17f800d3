"""How a candidate of a curve is trained: on labels, by the dense model, or in generations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery.deploy.curve.candidates import Budget, Candidate
from surgery.errors import UsageError, unknown_name
from surgery.operations.reset import reset_hypothesis
from surgery.operations.slim import split_masks
from surgery.progress import Progress
from surgery.taps.hints import attach_hint
from surgery.training.data.data import Data
from surgery.training.distilling.distill import distill
from surgery.training.evolve import evolve
from surgery.training.history import History
from surgery.training.loop import train

TEACHERS: Mapping[str, str] = {
    "labels": "on labels",
    "kd": "on labels and the dense model's softened outputs (KD, equation 2 of FitNets)",
    "hints": "on hints from the dense model's middle, then on labels and its softened outputs (FitNets)",
    "evolve": "as the fit-hypothesis of the dense model, which evolves in generations (Knowledge Evolution)",
}
"""What a candidate learns from, by name, in words that follow "trained"."""

Trained = tuple[nn.Module, Mapping[str, History]]
"""A module, and how it was trained, by stage; no stages where it was not."""


@dataclass(frozen=True)
class Lesson:
    """How a candidate is trained: all that its weights depend on beside its own and the dense model's.

    Attributes:
        teach: one of `TEACHERS`.
        epochs: passes over the training images; for ``evolve``, in each generation. 0: none.
        lr: the peak learning rate, of SGD.
        hint_epochs: for ``hints``, those of stage 1.
        generations: for ``evolve``.
    """

    teach: str
    epochs: int
    lr: float
    batch_size: int
    seed: int
    hint_epochs: int = 1
    generations: int = 3

    def __post_init__(self) -> None:
        if self.teach not in TEACHERS:
            raise unknown_name("way to teach", self.teach, TEACHERS)

    def settings(self) -> dict[str, Any]:
        """What tells one lesson from another, as plain JSON data."""
        own = {"hints": {"hint_epochs": self.hint_epochs}, "evolve": {"generations": self.generations}}
        common = {"teach": self.teach, "epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        return {**common, "seed": self.seed, **own.get(self.teach, {})}

    @property
    def passes(self) -> float:
        """Epochs of all stages together."""
        extra = self.hint_epochs if self.teach == "hints" else 0
        return self.epochs * (self.generations if self.teach == "evolve" else 1) + extra if self.epochs else 0

    def refuse(
        self,
        candidate: Candidate | Budget,
        module: nn.Module,
        dense: nn.Module,
        *,
        round_to: int = 1,
        importance: str = "prefix",
    ) -> None:
        """Raise what `give` would, before anything is trained."""
        if self.epochs == 0:
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
        """Train a copy of ``module``, the candidate as it was carved from ``dense``; neither is changed.

        ``checkpoint`` is a folder from which it goes on where it was cut off.
        """
        common: dict[str, Any] = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        if self.epochs == 0:
            return module, {}
        if self.teach == "evolve" and candidate.rate is not None:
            names = [f"generation-{number + 1}" for number in range(self.generations)]
            evolution = evolve(
                dense,
                data,
                candidate.rate,
                self.generations,
                **common,
                recalibrate=True,
                checkpoint=checkpoint,
                seed=self.seed,
                progress=parts_of(progress, task, names),
            )
            assert evolution.slim is not None
            return evolution.slim, {n: g.history for n, g in zip(names, evolution.generations, strict=True)}
        if self.teach == "labels":
            trained = copy.deepcopy(module)
            history = train(
                trained,
                data,
                **common,
                seed=self.seed,
                checkpoint=checkpoint / "model.pt",
                progress=progress,
                task=task,
            )
            return trained, {"train": history}
        found = distill(
            module,
            dense,
            data,
            **common,
            hint_epochs=self.hint_epochs if self.teach == "hints" else 0,
            optimizer="sgd",
            checkpoint=checkpoint,
            seed=self.seed,
            progress=parts_of(progress, task, ["hints: cache", "hints", "distill: cache", "distill"]),
        )
        stages = {"hints": found.hints, "distill": found.history}
        return found.student, {name: history for name, history in stages.items() if history is not None}


def parts_of(progress: Progress, whole: str, names: list[str]) -> Progress:
    """Tells ``progress`` how far ``whole`` is, from how far its parts are, each of which counts alike."""

    def part(task: str, done: int, total: int) -> None:
        progress(whole, round(1000 * (names.index(task) + done / total) / len(names)), 1000)

    return part
