"""Train, export and score the models of a curve, each of them once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from surgery.counting.cost import Cost, cost
from surgery.deploy.budget.budget import refuse_unreachable, slim_to_budget
from surgery.deploy.budget.clock import Clock
from surgery.deploy.compress.recovery import hold_out
from surgery.deploy.curve.candidates import Budget, Candidate
from surgery.deploy.curve.control import control_settings, from_scratch
from surgery.deploy.curve.run_progress import PartProgress, RunProgress
from surgery.deploy.curve.store import NOTE, Kept, Store, data_identity, key_of, write_note
from surgery.deploy.curve.teaching import Lesson
from surgery.deploy.measure.environment import environment, usable_cores
from surgery.deploy.onnx.export import export_onnx
from surgery.models.saving import save
from surgery.operations.importance.registry import rank_on
from surgery.operations.slim import slim
from surgery.settings import BudgetSettings, TimingSettings, TradeoffSettings
from surgery.training.data.data import Data
from surgery.training.data.fingerprint import module_digest
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.loop import train
from surgery.training.modes import device_of, pick_device
from surgery.units import LIMITS

ONNX_FILE = "model.onnx"

CHECK = "check budgets"
"""The task that refuses unreachable budgets."""


@dataclass(frozen=True)
class Dense:
    """The dense model after its training, and its folder; None if it was not trained."""

    module: nn.Module
    history: History | None
    folder: Path | None


@dataclass(frozen=True)
class Trial:
    """A candidate that was trained with one seed, saved, exported and scored."""

    seed: int
    model: Kept
    control: Kept | None
    """The same sizes, trained from scratch."""

    @property
    def score(self) -> Score:
        assert self.model.score is not None
        return self.model.score

    @property
    def control_score(self) -> Score | None:
        return None if self.control is None else self.control.score

    @property
    def control_history(self) -> History | None:
        return None if self.control is None else self.control.training["scratch"]


@dataclass(frozen=True)
class Measured:
    """A model of the curve that is trained, saved, exported and scored, but not timed.

    Attributes:
        trials: one for each seed; the first is timed.
        budget: how its widths were found, if it was slimmed to a budget.
    """

    candidate: Candidate | Budget
    cost: Cost
    trials: tuple[Trial, ...]
    budget: Mapping[str, Any] | None

    @property
    def folder(self) -> Path:
        """The folder of the first seed's model."""
        return self.trials[0].model.folder

    @property
    def folders(self) -> dict[str, Path]:
        """The folders of all models by their names in the results."""
        found: dict[str, Path] = {}
        for number, trial in enumerate(self.trials):
            seed = f"-seed-{trial.seed}" if number else ""
            found[f"{self.candidate.folder}{seed}"] = trial.model.folder
            if trial.control is not None:
                found[f"{self.candidate.folder}-scratch{seed}"] = trial.control.folder
        return found


class CandidateTraining:
    """Trains the models of a run, or finds them in earlier runs."""

    def __init__(
        self, store: Store, data: Data, settings: TradeoffSettings, progress: RunProgress, *, trust: bool = False
    ) -> None:
        self.store, self.data, self.settings, self.progress = store, data, settings, progress
        self.trust = trust
        self.device = pick_device(settings.device)
        self.identity = data_identity(data)
        self.reused: list[str] = []

    def refuse_unreachable(self, plan: Sequence[Candidate | Budget], dense: nn.Module) -> None:
        """Raise `EditError` for a budget that no model can keep to. Training does not change sizes."""
        settings = self.settings
        limits = [(LIMITS[candidate.what], candidate.limit) for candidate in plan if isinstance(candidate, Budget)]
        if limits:
            clock = Clock(TimingSettings(threads=settings.threads, seed=settings.seed))
            with self.progress.task(CHECK):
                refuse_unreachable(dense, limits, round_to=settings.round_to, clock=clock)

    def dense(self, module: nn.Module) -> Dense:
        """Train a copy of ``module``, the dense model, or load it from an earlier run."""
        if self.settings.epochs == 0:
            with self.progress.task("train dense"):
                return Dense(module, None, None)
        settings = self.settings.training()
        made_by = {"model": module_digest(module), "data": self.identity, "settings": settings.identity()}
        key = key_of(made_by)
        with self.progress.task("train dense") as progress:
            kept = self._kept(key, "dense")
            if kept is not None:
                return Dense(kept.into(module), kept.training["train"], kept.folder)
            checkpoint = self.store.unfinished(key) / "model.pt"
            done = train(
                self._moved(module),
                self.data,
                settings,
                checkpoint=checkpoint,
                progress=progress,
                task="train dense",
            )
            trained, history = done.without_module()
            trained = trained.cpu()
            save(trained, self.store.place(key))
            return Dense(trained, history, self.store.keep(key, {"train": history}, None, made_by).folder)

    def candidate(self, candidate: Candidate | Budget, dense: nn.Module) -> Measured:
        """Make the candidate from the trained dense model and train it with each seed, or load what an earlier run
        trained."""
        start, found = self._start(candidate, dense)
        trials = []
        for seed in self.settings.every_seed:
            model = self._trained(candidate, start, dense, found, seed)
            trials.append(Trial(seed, model, self._control(candidate, start, seed)))
        return Measured(candidate, cost(start), tuple(trials), found)

    def _trained(
        self,
        candidate: Candidate | Budget,
        start: nn.Module,
        dense: nn.Module,
        found: Mapping[str, Any] | None,
        seed: int,
    ) -> Kept:
        """Train the candidate ``start`` with one seed, export and score it, or load it from an earlier run."""
        lesson = Lesson(replace(self.settings, seed=seed))
        made_by = {
            "model": module_digest(start),
            "dense": module_digest(dense),
            "data": self.identity,
            **lesson.identity(),
        }
        key, also = key_of(made_by), also_seed(self.settings, seed)
        tune, export = (f"{candidate.folder}: {stage}{also}" for stage in ("fine-tune", "export and score"))
        kept = self._kept(key, f"{candidate.name}{also}")
        place = self.store.place(key)
        with self.progress.task(tune) as progress:
            if kept is None:
                checkpoint = self.store.unfinished(key)
                module, training = lesson.give(
                    candidate,
                    self._moved(start),
                    self._moved(dense),
                    self.data,
                    checkpoint=checkpoint,
                    progress=progress,
                    task=tune,
                )
                module = module.cpu()
        with self.progress.task(export):
            if kept is None:
                save(module, place)
                if found is not None:
                    write_note(place / NOTE, found)
                export_onnx(module, place / ONNX_FILE)
                classify = _onnx_classifier(place / ONNX_FILE, self.settings.threads or usable_cores())
                score = evaluate(classify, self.data.test, **self.settings.scoring)
                kept = self.store.keep(key, training, score, made_by)
        return kept

    def _control(self, candidate: Candidate | Budget, start: nn.Module, seed: int) -> Kept | None:
        """Train a model of the candidate's sizes from scratch, or load it from an earlier run; None: no controls."""
        settings = control_settings(replace(self.settings, seed=seed))
        if settings is None:
            return None
        fresh = from_scratch(start, seed=settings.seed, trust=self.trust)
        made_by = {"model": module_digest(fresh), "data": self.identity, "settings": settings.identity()}
        also = also_seed(self.settings, seed)
        key, task = key_of(made_by), f"{candidate.folder}: from scratch{also}"
        with self.progress.task(task) as progress:
            kept = self._kept(key, f"{candidate.name} from scratch{also}")
            if kept is None:
                checkpoint = self.store.unfinished(key) / "model.pt"
                done = train(
                    self._moved(fresh), self.data, settings, checkpoint=checkpoint, progress=progress, task=task
                )
                trained, history = done.without_module()
                score = evaluate(trained, self.data.test, **self.settings.scoring)
                save(trained.cpu(), self.store.place(key))
                kept = self.store.keep(key, {"scratch": history}, score, made_by)
        return kept

    def _start(self, candidate: Candidate | Budget, dense: nn.Module) -> tuple[nn.Module, Mapping[str, Any] | None]:
        """Make the candidate before its training; for a budget, also say how its widths were found."""
        settings = self.settings
        common: dict[str, Any] = {"round_to": settings.round_to, "importance": settings.importance}
        compresses = settings.method == "compress"
        data = hold_out(self.data, settings.compressing()) if compresses else self.data
        calibration = data if compresses else None
        if isinstance(candidate, Candidate):
            ranked = {**common, "importance": rank_on(settings.importance, data)}
            return candidate.apply(dense, **ranked, seed=settings.seed, calibration=calibration), None
        made_by = {
            **({"method": "compress"} if compresses else {}),
            "budget": [candidate.what, candidate.limit],
            "dense": module_digest(dense),
            "data": self.identity,
            "machine": [environment().cpu, settings.threads] if candidate.what == "latency" else [],
            **common,
            "seed": settings.seed,
        }
        key = key_of(made_by)
        with self.progress.task(f"{candidate.folder}: search") as progress:
            found = self.store.find_note(key)
            if found is None:
                names = [*(["probe"] if candidate.what == "latency" else []), "damage", "search"]
                told = PartProgress(progress, f"{candidate.folder}: search", names)
                limits: dict[str, Any] = {LIMITS[candidate.what]: candidate.limit}
                result = slim_to_budget(
                    dense,
                    **limits,
                    data=data,
                    importance=settings.importance,
                    calibration=calibration,
                    round_to=settings.round_to if settings.round_to > 1 else None,
                    settings=BudgetSettings(threads=settings.threads, seed=settings.seed),
                    progress=told,
                )
                self.store.note(key, result.to_dict())
                found = self.store.find_note(key)
        assert found is not None
        kept = rank_on(found["importance"], data)
        start = slim(dense, found["rates"], round_to=found["round_to"], importance=kept, calibration=calibration)
        return start, found

    def _moved(self, module: nn.Module) -> nn.Module:
        """The module on the device to train on: itself where it is there, else a copy."""
        return module if device_of(module) == self.device else copy.deepcopy(module).to(self.device)

    def _kept(self, key: str, name: str) -> Kept | None:
        kept = self.store.find(key)
        if kept is not None:
            self.reused.append(name)
        return kept


def also_seed(settings: TradeoffSettings, seed: int) -> str:
    """The end of the name of a task: nothing for the first seed."""
    return "" if seed == settings.seed else f", seed {seed}"


def _onnx_classifier(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """A function from images to logits that runs the ONNX file in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def classify(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return classify
