"""A training in progress: its steps, its growths, and the point from which it resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from surgery.progress import Progress, tell_epoch
from surgery.settings import TrainSettings
from surgery.training.compiling import compiling
from surgery.training.data.augmented import Augmentation
from surgery.training.data.data import Data, Images, count
from surgery.training.data.loading import EpochOrder, loader
from surgery.training.engine import Engine
from surgery.training.evaluation import evaluate
from surgery.training.growth import Growth, grow_model, record_growth
from surgery.training.history import Epoch, History, Score
from surgery.training.modes import in_mode, seed_everything
from surgery.training.optimizer_state import transfer_optimizer
from surgery.training.optimizers import SCHEDULES, set_rate
from surgery.training.phases import Phase
from surgery.training.resume import Checkpoint, Progressed, Saved
from surgery.training.stopping import BestEpoch

Batch = tuple[Any, ...]
"""Images (N, C, H, W), labels (N,), and further parts of items; or what ``Data.collate`` makes. With ``mixup`` or
``cutmix``, labels are probabilities (N, classes)."""

LossFn = Callable[[nn.Module, Batch, float], Tensor]
"""From a model in training mode, a batch on its device, and the number of epochs done (a fraction within an epoch) to
the scalar loss, a mean over the samples."""


@dataclass
class Run:
    """A training in progress; ``steps`` are its first step and the one after its last."""

    model: nn.Module
    descent: Optimizer
    engine: Engine
    data: Data
    settings: TrainSettings
    steps: tuple[int, int]
    total: int
    loss_fn: LossFn
    after_step: Callable[[nn.Module], None] | None
    checkpoint: Checkpoint | None
    progress: Progress | None
    task: str
    saved: Saved | None
    augmentation: Augmentation
    best: BestEpoch | None = None

    def complete(self, plan: Sequence[Phase]) -> History:
        """Run from the beginning, or from the checkpoint, to the end."""
        skipped, within = divmod(self.steps[0], steps_of_epoch(plan[0].images, self.settings.batch_size))
        start = Progressed(steps=self.steps[0], skipped=skipped, within=within)
        self.at = self.saved.progressed if self.saved else start
        growths = list(self.at.growths)
        for phase in plan:
            if phase.growth is not None:
                if growths:
                    growths.pop(0)
                    self._take(grow_model(self.model, phase.growth, self.settings.seed), phase.growth)
                else:
                    self._restore()
                    self._grow(phase, phase.growth)
            if self.at.epoch < phase.first + phase.epochs and not self.over:
                self._restore()
                self._train(phase)
        finished = self.saved is not None and self.saved.finished
        self._restore()
        if self.best is not None and not finished:
            self.best.give(self.model)
        if self.checkpoint is not None and self.engine.main:
            self.checkpoint.save(self.at, self.model, None, None)
        if self.progress is not None and self.at.steps < self.steps[1]:
            self.progress(self.task, self.total, self.total)
        return History(tuple(self.at.epochs), self.at.steps - self.steps[0], tuple(self.at.growths), self.model)

    @property
    def over(self) -> bool:
        """Whether all steps are done, or the training ends early."""
        if self.best is not None and self.at.epochs and self.best.rule.ends(self.at.epochs):
            return True
        return bool(self.at.steps >= self.steps[1])

    def _restore(self) -> None:
        """Load the checkpoint, once the model has grown to its size."""
        if self.saved is not None:
            self.saved.restore(self.model, self.descent, self.engine.scaler)
            if self.best is not None and self.saved.best is not None:
                self.best.state = self.saved.best
            self.saved = None
            if self.progress is not None:
                self.progress(self.task, self.at.steps, self.total)

    def _take(self, larger: nn.Module, growth: Growth) -> None:
        if larger is not self.model:
            self.descent = transfer_optimizer(self.descent, self.model, larger, new=growth.state)
            self.model = larger

    def _grow(self, phase: Phase, growth: Growth) -> None:
        started, before = time.perf_counter(), self.model
        self._take(grow_model(before, growth, self.settings.seed), growth)
        score = self._score(self.model) if self.settings.test_each_epoch else None
        batch, *_ = next(iter(loader(phase.images, self.settings.batch_size, collate=self.data.collate)))
        record = record_growth(
            phase.first, count(phase.images), before, self.model, batch.to(self.engine.device), score, started
        )
        self.at.growths.append(record)

    def _train(self, phase: Phase) -> None:
        """Train the remaining epochs of a phase."""
        images = self.augmentation.over(phase.images)
        order = EpochOrder(images, self.settings.seed, seeds=images is not phase.images)
        whole = loader(images, self.settings.batch_size, self.settings.workers, order=order, collate=self.data.collate)
        batches = self.engine.share(whole)
        with compiling(self.model, self.settings.compile) as forward, in_mode(self.model, training=True):
            step = self.engine.make_step(_Objective(forward, self.loss_fn), self.descent)
            while self.at.epoch < phase.first + phase.epochs and not self.over:
                started = time.perf_counter() - self.at.seconds
                order.begin(self.at.epoch, self.at.within * (whole.batch_size or 1), whole)
                self._steps(iter(batches), step, steps_of_epoch(phase.images, self.settings.batch_size), started)
                scored = self.settings.test_each_epoch or self.best is not None
                score = self._score(forward) if scored else None
                loss, seconds = self.at.summed / self.at.counted, time.perf_counter() - started
                self.at.epochs.append(Epoch(count(phase.images), loss, self._rate(), score, seconds))
                self.at.within, self.at.counted, self.at.summed, self.at.seconds = 0, 0, 0.0, 0.0
                if self.best is not None:
                    self.best.note(self.model, self.at.epochs)
                self._save()
                tell_epoch(self.progress, self.task, len(self.at.epochs), self.at.epochs[-1].figures)

    def _steps(self, batches: Iterator[Batch], step: Callable[..., float], count: int, started: float) -> None:
        """Take the remaining steps of an epoch."""
        seed, rank, device = self.settings.seed, self.engine.rank, self.engine.device
        every = self.settings.checkpoint_every
        while self.at.within < count and not self.over:
            seed_everything(seed, rank, self.at.steps)
            batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tuple(next(batches)))
            batch = self.augmentation.mix(batch, seed, rank, self.at.steps)
            set_rate(self.descent, self._rate())
            self.at.summed += step(batch, self.at.epoch + self.at.within / count)
            self.at.steps += 1
            self.at.within += 1
            self.at.counted += 1
            if self.after_step is not None:
                self.after_step(self.model)
            if self.progress is not None:
                self.progress(self.task, self.at.steps, self.total)
            if every and self.at.steps % every == 0 and self.at.within < count:
                self.at.seconds = time.perf_counter() - started
                self._save()
        self._check()

    def _rate(self) -> float:
        return float(self.settings.peak_lr * SCHEDULES[self.settings.schedule](self.at.steps / self.total))

    def _score(self, model: nn.Module) -> Score:
        return evaluate(model, self.data.test, **self.settings.scoring, engine=self.engine)

    def _save(self) -> None:
        self._check()
        if self.checkpoint is not None and self.engine.main:
            best = None if self.best is None else self.best.state
            self.checkpoint.save(self.at, self.model, self.descent, self.engine.scaler, best)

    def _check(self) -> None:
        if not math.isfinite(self.at.summed):
            raise FloatingPointError(
                f"the loss of {self.task} is {self.at.summed} after {self.at.steps} steps: lower lr"
            )


class _Objective(nn.Module):
    """The loss as a module: wrappers of data parallelism wrap the whole step and leave the model alone."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch, epoch: float) -> Tensor:
        return self.loss_fn(self.model, batch, epoch)


def steps_of_epoch(images: Images, batch_size: int) -> int:
    """Number of steps of an epoch."""
    return count(images) // min(batch_size, count(images))
