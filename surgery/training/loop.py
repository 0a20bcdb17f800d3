"""The training loop of every procedure of this package.

A `LossFn` decides what is learned; the loop (`run.py`) only steps. A procedure such as distillation has its own loss.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import UsageError, whole_number
from surgery.progress import Progress
from surgery.settings import TrainSettings, accepts
from surgery.training.data.adapt import AnyData, as_data
from surgery.training.data.augmented import Augmentation
from surgery.training.data.data import Data, count
from surgery.training.data.fingerprint import images_digest, module_digest, training_digest
from surgery.training.engine import Engine
from surgery.training.growth import Growth
from surgery.training.history import History
from surgery.training.modes import device_of, plain_modes, random_state
from surgery.training.optimizers import OPTIMIZERS, check_data, check_trainable, parameter_groups
from surgery.training.phases import Phase, plan_phases, rehearse
from surgery.training.resume import Checkpoint
from surgery.training.run import Batch, LossFn, Run, steps_of_epoch
from surgery.training.stopping import BestEpoch, EarlyStopping
from surgery.training.tracking import followed


@accepts(TrainSettings)
@followed
@plain_modes()
def train(
    model: nn.Module,
    data: AnyData,
    settings: TrainSettings = TrainSettings(),
    *,
    grow: Mapping[int, Growth] | None = None,
    first_step: int = 0,
    last_step: int | None = None,
    loss_fn: LossFn | None = None,
    after_step: Callable[[nn.Module], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    task: str = "train",
) -> History:
    """Train a copy of ``model`` on ``data.train``. The model itself is not changed.

    Training runs on the model's device. Under ``accelerate launch`` the processes share every batch: batches and losses
    are the same as in one process, up to rounding. (BatchNorm normalises by each process's share, and each process
    draws its own dropout; pass the same model in all of them.) Gradients and precision do not depend on a ``no_grad``
    or ``autocast`` around the call.

    Args:
        model: any module that classifies the images; traced, if it grows.
        data: images (N, C, H, W) and labels, as of `surgery.load_data`, or what `surgery.as_data` takes.
        settings: see `surgery.TrainSettings`. Its fields may be given as keywords, which take precedence. ``one-cycle``
            warms up over the first quarter of the steps and anneals to zero, ``cosine`` begins at ``lr``.
        grow: growths by the epoch, from 0, that they come before: ``{0: Growth(images=0.3), 4: Growth(images=1.0,
            widen=1.5)}``. The optimizer's state follows the weights, and the schedule continues over all planned steps.
            An impossible growth is refused before the training.
        first_step, last_step: train only these steps of the whole training, with its images and learning rates. The
            optimizer begins without state.
        loss_fn: the loss; by default `classification_loss`. With ``mixup`` or ``cutmix`` its labels are probabilities
            (N, classes); in several processes each mixes its share of a batch.
        after_step: called with the model in training after each step, such as `surgery.hold_masked`.
        checkpoint: a file, written after each epoch, from which an interrupted training resumes to the same weights; a
            finished training is not repeated. If it resumes within an epoch, random changes that the data set makes by
            itself in ``workers`` differ; those of the settings do not.
        identity: extra JSON data that distinguishes checkpoints, such as the settings of ``loss_fn``.
        progress: called after each step, with ``task``.

    Returns:
        The record of the training, with the trained model, in the mode of ``model``, as ``.module``.

    Raises:
        UsageError: nothing to train or to train on, a setting out of range, another training's checkpoint, or one that
            cannot be written; also as `surgery.widen` and `surgery.deepen`.
        FloatingPointError: the loss stops being a number.

    Example:
        >>> trained = surgery.train(model, surgery.load_data("digits"), epochs=3, lr=0.1).module
    """
    course = Course(
        grow=grow or {},
        first_step=first_step,
        last_step=last_step,
        loss_fn=loss_fn,
        after_step=after_step,
        checkpoint=checkpoint,
        identity=identity or {},
        progress=progress,
        task=task,
    )
    return take_course(model, as_data(data), settings.training(), course)


@dataclass(frozen=True, kw_only=True)
class Course:
    """The arguments of `train` besides the model, the data and the settings; and when the training ends early."""

    grow: Mapping[int, Growth] = field(default_factory=dict)
    first_step: int = 0
    last_step: int | None = None
    loss_fn: LossFn | None = None
    after_step: Callable[[nn.Module], None] | None = None
    checkpoint: str | os.PathLike[str] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None
    task: str = "train"
    stopping: EarlyStopping | None = None


def take_course(model: nn.Module, data: Data, settings: TrainSettings, course: Course) -> History:
    """Train a copy of ``model``: see `train`. With ``course.stopping``, ``data.test`` is scored after each epoch."""
    check_data(data)
    check_trainable(model)
    augmentation = Augmentation.of(data, settings)
    plan = plan_phases(data, settings.epochs, course.grow, settings.seed)
    total = sum(phase.epochs * steps_of_epoch(phase.images, settings.batch_size) for phase in plan)
    steps = _steps(course.first_step, course.last_step, total, grows=bool(course.grow))
    rehearse(model, plan, settings.seed)
    engine = Engine(device_of(model), settings.precision)
    for size in (min(settings.batch_size, count(phase.images)) for phase in plan):
        if size % engine.processes:
            raise UsageError(f"a batch of {size} images cannot be shared equally among {engine.processes} processes")
    file = None
    if course.checkpoint is not None:
        own: dict[str, Any] = {**settings.identity(), "steps": list(steps), "precision": engine.precision}
        if course.stopping is not None:
            own["stopping"] = {**course.stopping.identity(), "images": images_digest(data.test)}
        file = Checkpoint(Path(course.checkpoint), {**_identity(model, data, plan), **own, **course.identity})
    saved = None if file is None else file.read()
    engine.wait()  # no process may write before all have read
    model = copy.deepcopy(model).to(engine.device)
    make = OPTIMIZERS[settings.optimizer]
    run = Run(
        model=model,
        descent=make(parameter_groups(model, settings.decay), settings.peak_lr, settings.momentum),
        engine=engine,
        data=data,
        settings=settings,
        steps=steps,
        total=total,
        loss_fn=course.loss_fn or classification_loss(settings.label_smoothing),
        after_step=course.after_step,
        checkpoint=file,
        progress=course.progress if engine.main else None,
        task=course.task,
        saved=saved,
        augmentation=augmentation,
        best=None if course.stopping is None else BestEpoch(course.stopping, model),
    )
    with file.hold() if file is not None and engine.main else nullcontext(), random_state(engine.device):
        return run.complete(plan)


def _steps(first: int, last: int | None, total: int, *, grows: bool) -> tuple[int, int]:
    """Check the first step, and the one after the last, of a training of ``total`` steps."""
    first = whole_number("first_step", first, 0)
    last = total if last is None else whole_number("last_step", last, 1)
    if not first < last <= total:
        raise UsageError(f"steps {first} to {last} are outside of the {total} steps of this training")
    if grows and last - first < total:
        raise UsageError("a training that grows takes all of its steps: leave out first_step and last_step")
    return first, last


def classification_loss(label_smoothing: float = 0.0) -> LossFn:
    """Cross-entropy of the logits and of auxiliary classifiers, which some models return in training.

    The weights of auxiliary classifiers are the papers': 0.3 each for two (GoogLeNet), 0.4 for one (Inception v3).
    """

    def loss_fn(model: nn.Module, batch: Batch, epoch: float = 0.0) -> Tensor:
        images, labels = batch[:2]
        return label_loss(model(images), labels, label_smoothing)

    return loss_fn


def label_loss(output: Any, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`classification_loss` of a model's output: logits (N, classes), or a tuple of them and auxiliary logits.

    Labels are classes (N,) or probabilities (N, some of the classes); those of the last classes are 0 then.
    """
    logits, *others = output if isinstance(output, tuple) else (output,)
    if labels.is_floating_point() and labels.ndim == 2:
        labels = functional.pad(labels, (0, logits.shape[1] - labels.shape[1]))
    auxiliary = [other for other in others if other is not None]
    weight = 0.4 if len(auxiliary) == 1 else 0.3
    loss = functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    for other in auxiliary:
        loss = loss + weight * functional.cross_entropy(other, labels, label_smoothing=label_smoothing)
    return loss


def _identity(model: nn.Module, data: Data, plan: Sequence[Phase]) -> dict[str, Any]:
    """The model, data and growths by which a checkpoint is recognised."""
    growths = [
        [s.first, count(s.images), g.widen, g.deepen, g.state, str(g.widen_options), str(g.deepen_options)]
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
