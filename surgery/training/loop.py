"""One training loop and one evaluation, which every procedure of this package uses.

What is learned is decided by a `LossFn`; the loop knows only how to step. A procedure such as distillation brings its
own loss and leaves this file as it is.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from surgery.errors import UsageError, unknown_name
from surgery.training.checks import check_numbers, check_trainable, check_whole
from surgery.training.data import Data, Images
from surgery.training.descent import OPTIMIZERS, SCHEDULES, parameter_groups, set_rate
from surgery.training.engine import Engine, plain_modes, random_state, seed_everything
from surgery.training.fingerprint import module_digest, training_digest
from surgery.training.growth import Growth, Stage, count, grown, grown_record, rehearse, stages
from surgery.training.history import Epoch, History, Score
from surgery.training.loading import EpochOrder, loader
from surgery.training.optimizer import transfer_optimizer
from surgery.training.resume import Checkpoint, Progressed, Saved

Batch = tuple[Any, ...]
"""Images (N, C, H, W), labels (N,), and what else the items of the data set have; or what ``Data.collate`` makes."""

LossFn = Callable[[nn.Module, Batch, float], Tensor]
"""From a model in training mode, a batch on its device, and the number of epochs done so far, with the fraction of the
one it is in, to the scalar loss to descend: a mean over the samples."""


class Progress(Protocol):
    """Told how far a task is. The library never draws; whoever calls it may."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


@plain_modes()
def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    optimizer: str = "sgd",
    lr: float | None = None,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    label_smoothing: float = 0.0,
    schedule: str = "one-cycle",
    grow: Mapping[int, Growth] | None = None,
    first_step: int = 0,
    last_step: int | None = None,
    seed: int = 0,
    loss_fn: LossFn | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    test_each_epoch: bool = False,
    precision: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    identity: Mapping[str, Any] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "train",
) -> History:
    """Train ``model`` in place on ``data.train`` and return how it went. The model is left in its mode of before.

    Gradients and precision are the loop's own, whatever ``no_grad`` or ``autocast`` it is called in.

    It is trained where it is, and under ``accelerate launch`` in as many processes as there are, each of which takes
    its share of every batch: the same batches and the same losses, up to rounding, as in one process. (BatchNorm
    normalises by each process's share, and dropout draws anew in each; the model should be the same in all of them.)

    Args:
        optimizer: ``sgd``, with Nesterov momentum, ``adamw``, whose first beta is ``momentum``, or ``rmsprop``, whose
            decay it is (`OPTIMIZERS`, with the ``lr`` and ``weight_decay`` that each has by default). Weight decay
            spares biases and norms.
        lr: the peak learning rate: ``one-cycle`` warms up to it over the first quarter of the steps and anneals to
            zero, ``cosine`` begins at it, ``constant`` stays at it (`SCHEDULES`).
        batch_size: of all processes together.
        grow: what grows before which epoch, counted from 0: ``{0: Growth(images=0.3), 4: Growth(images=1.0,
            widen=1.5)}``. A copy of the model is trained then, and `History.model` is what became of it; the
            optimiser's state follows the weights, and the schedule, a fraction of all steps to come, goes on. What
            cannot be grown as asked is refused before the training begins.
        first_step, last_step: train as if ``first_step`` steps had been taken, and no further than ``last_step``: the
            images and learning rates are those of the whole training. The optimiser begins without state.
        seed: of the order of the images and all other randomness of torch. It and the number of a step say what is
            random in the step. The global random state is left as it was.
        loss_fn: `classification_loss` unless given.
        after_step: called with the model after each step.
        precision: ``no``, ``bf16`` or ``fp16`` (automatic mixed precision: weights stay as they are); by default
            ``no``, or what ``accelerate launch`` was told.
        checkpoint: a file that is written after each epoch, and from which the training goes on where it was cut off,
            to the same weights. One that is over is not done again.
        checkpoint_every: write it every so many steps, too. Continued in the middle of an epoch, images that are
            augmented in ``workers`` are not what they would have been.
        identity: what, besides the settings above and the model's weights, makes a training another one, such as the
            settings of ``loss_fn``: a checkpoint of another one is refused. Plain JSON data.
        workers: processes that read images; 0 reads them in this one.
        progress: called after each step, with ``task``.

    Raises:
        UsageError: nothing to train or to train on, a setting out of range, another training's checkpoint, or one that
            cannot be written; and what `surgery.widen` and `surgery.deepen` raise.
        FloatingPointError: the loss stops being a number.
    """
    check_settings(data, epochs, optimizer, lr, batch_size, schedule, checkpoint_every)
    check_whole(first_step=first_step, last_step=last_step)
    check_numbers(momentum, weight_decay, label_smoothing, seed, workers)
    check_trainable(model)
    plan = stages(data, epochs, grow or {}, seed)
    total = sum(stage.epochs * _steps_of_epoch(stage.images, batch_size) for stage in plan)
    last_step = total if last_step is None else last_step
    if not 0 <= first_step < last_step <= total:
        raise UsageError(f"steps {first_step} to {last_step} are not among the {total} of this training")
    if grow and last_step - first_step < total:
        raise UsageError("a training that grows has all of its steps: leave out first_step and last_step")
    if grow:
        rehearse(model, plan, seed)
        model = copy.deepcopy(model)
    engine = Engine(_device(model), precision)
    for size in (min(batch_size, count(stage.images)) for stage in plan):
        if size % engine.processes:
            raise UsageError(f"a batch of {size} images cannot be shared equally among {engine.processes} processes")
    rule = OPTIMIZERS[optimizer]
    settings: dict[str, Any] = {
        "epochs": epochs,
        "optimizer": optimizer,
        "lr": rule.lr if lr is None else lr,
        "momentum": momentum,
        "weight_decay": rule.weight_decay if weight_decay is None else weight_decay,
        "label_smoothing": label_smoothing,
        "batch_size": batch_size,
        "schedule": schedule,
        "steps": [first_step, last_step],
        "precision": engine.precision,
        "seed": seed,
    }
    file = None
    if checkpoint is not None:
        file = Checkpoint(Path(checkpoint), {**settings, **_identity(model, data, plan), **(identity or {})})
    saved = None if file is None else file.read()
    engine.wait()  # a process may not write what another one has not read yet
    if file is not None and engine.main:
        file.prepare()
    model.to(engine.device)
    run = _Run(
        model=model,
        descent=rule.make(parameter_groups(model, settings["weight_decay"]), settings["lr"], momentum),
        engine=engine,
        data=data,
        settings=settings,
        total=total,
        loss_fn=loss_fn or classification_loss(label_smoothing),
        after_step=after_step,
        test_each_epoch=test_each_epoch,
        checkpoint=file,
        checkpoint_every=checkpoint_every,
        workers=workers,
        progress=progress if engine.main else None,
        task=task,
        saved=saved,
    )
    with random_state(engine.device):
        return run.through(plan, returns_model=bool(grow))


@dataclass
class _Run:
    """A training under way."""

    model: nn.Module
    descent: Optimizer
    engine: Engine
    data: Data
    settings: Mapping[str, Any]
    total: int
    loss_fn: LossFn
    after_step: Callable[[nn.Module], None] | None
    test_each_epoch: bool
    checkpoint: Checkpoint | None
    checkpoint_every: int | None
    workers: int
    progress: Progress | None
    task: str
    saved: Saved | None

    def through(self, plan: Sequence[Stage], *, returns_model: bool) -> History:
        """From the beginning, or from where it was cut off, to the end."""
        self.at = self.saved.progressed if self.saved else self._beginning(plan[0])
        growths = list(self.at.growths)
        for stage in plan:
            if stage.growth is not None:
                if growths:
                    growths.pop(0)
                    self._take(grown(self.model, stage.growth, self.settings["seed"]), stage.growth)
                else:
                    self._restore()
                    self._grow(stage, stage.growth)
            if self.at.epoch < stage.first + stage.epochs and not self.over:
                self._restore()
                self._train(stage)
        self._restore()
        if self.checkpoint is not None and self.engine.main:
            self.checkpoint.save(self.at, self.model, None, None)
        model = self.model if returns_model else None
        first, last = self.settings["steps"]
        return History(tuple(self.at.epochs), last - first, tuple(self.at.growths), model)

    @property
    def over(self) -> bool:
        """Whether all steps are done."""
        return bool(self.at.steps >= self.settings["steps"][1])

    def _beginning(self, stage: Stage) -> Progressed:
        first = self.settings["steps"][0]
        skipped, within = divmod(first, _steps_of_epoch(stage.images, self.settings["batch_size"]))
        return Progressed(steps=first, skipped=skipped, within=within)

    def _restore(self) -> None:
        """What the checkpoint has, once the model has grown to the size that it had."""
        if self.saved is not None:
            self.saved.restore(self.model, self.descent, self.engine.scaler)
            self.saved = None
            if self.progress is not None:
                self.progress(self.task, self.at.steps, self.total)

    def _take(self, larger: nn.Module, growth: Growth) -> None:
        if larger is not self.model:
            self.descent = transfer_optimizer(self.descent, self.model, larger, new=growth.state)
            self.model = larger

    def _grow(self, stage: Stage, growth: Growth) -> None:
        started, before = time.perf_counter(), self.model
        self._take(grown(before, growth, self.settings["seed"]), growth)
        score = self._score() if self.test_each_epoch else None
        batch, *_ = next(iter(loader(stage.images, self.settings["batch_size"], collate=self.data.collate)))
        record = grown_record(stage, before, self.model, batch.to(self.engine.device), score, started)
        self.at.growths.append(record)

    def _train(self, stage: Stage) -> None:
        """The epochs of a stage that are still to come."""
        order = EpochOrder(stage.images, self.settings["seed"])
        whole = loader(stage.images, self.settings["batch_size"], self.workers, order=order, collate=self.data.collate)
        batches = self.engine.shared(whole)
        step = self.engine.stepper(_Objective(self.model, self.loss_fn), self.descent)
        with _mode(self.model, training=True):
            while self.at.epoch < stage.first + stage.epochs and not self.over:
                started = time.perf_counter() - self.at.seconds
                order.begin(self.at.epoch, self.at.within * (whole.batch_size or 1), whole)
                self._steps(iter(batches), step, _steps_of_epoch(stage.images, self.settings["batch_size"]), started)
                score = self._score() if self.test_each_epoch else None
                loss, seconds = self.at.summed / self.at.counted, time.perf_counter() - started
                self.at.epochs.append(Epoch(count(stage.images), loss, self._rate(), score, seconds))
                self.at.within, self.at.counted, self.at.summed, self.at.seconds = 0, 0, 0.0, 0.0
                self._save()

    def _steps(self, batches: Iterator[Batch], step: Callable[..., float], count: int, started: float) -> None:
        """The steps of an epoch that are still to come."""
        seed, rank, device = self.settings["seed"], self.engine.rank, self.engine.device
        while self.at.within < count and not self.over:
            seed_everything(seed, rank, self.at.steps)
            batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tuple(next(batches)))
            set_rate(self.descent, self._rate())
            self.at.summed += step(batch, self.at.epoch + self.at.within / count)
            self.at.steps += 1
            self.at.within += 1
            self.at.counted += 1
            if self.after_step is not None:
                self.after_step(self.model)
            if self.progress is not None:
                self.progress(self.task, self.at.steps, self.total)
            if self.checkpoint_every and self.at.steps % self.checkpoint_every == 0 and self.at.within < count:
                self.at.seconds = time.perf_counter() - started
                self._save()
        self._check()

    def _rate(self) -> float:
        return float(self.settings["lr"] * SCHEDULES[self.settings["schedule"]](self.at.steps / self.total))

    def _score(self) -> Score:
        return _evaluate(self.model, self.data.test, self.engine, workers=self.workers)

    def _save(self) -> None:
        self._check()
        if self.checkpoint is not None and self.engine.main:
            self.checkpoint.save(self.at, self.model, self.descent, self.engine.scaler)

    def _check(self) -> None:
        if not math.isfinite(self.at.summed):
            raise FloatingPointError(
                f"the loss of {self.task} is {self.at.summed} after {self.at.steps} steps: lower lr"
            )


class _Objective(nn.Module):
    """The loss as a module, so that what wraps modules wraps the whole of a step and nothing touches the model."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Batch, epoch: float) -> Tensor:
        return self.loss_fn(self.model, batch, epoch)


def classification_loss(label_smoothing: float = 0.0) -> LossFn:
    """Cross-entropy; auxiliary classifiers, which some models return beside their logits in training, count as well.

    Their weights are those of the papers: 0.3 each for two (GoogLeNet), 0.4 for one (Inception v3).
    """

    def loss_fn(model: nn.Module, batch: Batch, epoch: float = 0.0) -> Tensor:
        images, labels = batch[:2]
        return label_loss(model(images), labels, label_smoothing)

    return loss_fn


def label_loss(output: Any, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`classification_loss` of what a model returned: logits (N, classes), or a tuple of them and auxiliary ones."""
    logits, *others = output if isinstance(output, tuple) else (output,)
    auxiliary = [other for other in others if other is not None]
    weight = 0.4 if len(auxiliary) == 1 else 0.3
    loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    for other in auxiliary:
        loss = loss + weight * functional.cross_entropy(other, labels, label_smoothing=label_smoothing)
    return loss


def evaluate(
    predict: nn.Module | Callable[[Tensor], Tensor],
    images: Images,
    *,
    batch_size: int = 250,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "evaluate",
) -> Score:
    """How many of ``images`` have their label as the largest of ``predict``'s outputs (N, classes).

    ``predict`` is a module, which is run in evaluation mode and left in the mode it was in, or any function, such as a
    session of another runtime.
    """
    return _evaluate(predict, images, None, batch_size=batch_size, workers=workers, progress=progress, task=task)


def _evaluate(
    predict: nn.Module | Callable[[Tensor], Tensor],
    images: Images,
    engine: Engine | None,
    *,
    batch_size: int = 250,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "evaluate",
) -> Score:
    """With an engine each of its processes takes a share of the images."""
    processes = engine.processes if engine else 1
    batches = loader(images, math.ceil(batch_size / processes) * processes, workers)
    batches = engine.shared(batches) if engine else batches
    device = _device(predict)
    correct = total = 0
    with _mode(predict, training=False), torch.inference_mode():
        for done, (batch, labels, *_) in enumerate(batches, 1):
            right = predict(batch.to(device)).argmax(1)
            right = right == labels.to(right.device)
            right = engine.gathered(right) if engine else right
            correct += int(right.sum())
            total += len(right)
            if progress is not None:
                progress(task, done, len(batches))
    return Score(correct, total)


def _steps_of_epoch(images: Images, batch_size: int) -> int:
    """Steps of an epoch."""
    return count(images) // min(batch_size, count(images))


def _identity(model: nn.Module, data: Data, plan: Sequence[Stage]) -> dict[str, Any]:
    """What is trained on what, for a checkpoint to be recognised by."""
    growths = [
        [s.first, count(s.images), *map(str, (g.widen, g.deepen, g.state, g.widen_options, g.deepen_options))]
        for s in plan
        if (g := s.growth) is not None
    ]
    return {
        "model": module_digest(model),
        "data": f"{data.source}, {data.counts[0]} images of {data.image_size} pixels",
        "augment": data.augment,
        "images": training_digest(data.train),
        "growths": growths,
    }


def check_settings(
    data: Data,
    epochs: int,
    optimizer: str,
    lr: float | None,
    batch_size: int,
    schedule: str,
    checkpoint_every: int | None,
) -> None:
    """Raise `UsageError` for settings that `train` refuses, before any work is done."""
    check_whole(epochs=epochs, batch_size=batch_size, checkpoint_every=checkpoint_every)
    if optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", optimizer, OPTIMIZERS)
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if epochs < 1:
        raise UsageError(f"epochs is {epochs}: it must be at least 1")
    if lr is not None and not (isinstance(lr, Real) and lr > 0):
        raise UsageError(f"the learning rate is {lr!r}: it must be above 0")
    if batch_size < 2:
        raise UsageError(f"the batch size is {batch_size}: batch statistics need at least 2")
    if data.counts[0] < 2:
        raise UsageError(f"data set {data.source!r} has {data.counts[0]} training images: there must be at least 2")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise UsageError(f"checkpoint_every is {checkpoint_every}: it must be at least 1 step")


def _device(model: object) -> torch.device:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


@contextmanager
def _mode(model: object, *, training: bool) -> Iterator[None]:
    """The model in one mode, and each of its submodules back in its own mode afterwards."""
    if not isinstance(model, nn.Module):
        yield
        return
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
