"""One training for every procedure of this package.

What is learned is decided by a `LossFn`; the loop (`run.py`) knows only how to step. A procedure such as distillation
brings its own loss and leaves both files as they are.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from surgery.errors import UsageError
from surgery.progress import Progress
from surgery.training.data.data import Data, count
from surgery.training.data.fingerprint import module_digest, training_digest
from surgery.training.descent import (
    OPTIMIZERS,
    check_numbers,
    check_settings,
    check_trainable,
    check_whole,
    parameter_groups,
)
from surgery.training.engine import Engine, plain_modes, random_state
from surgery.training.evaluation import device_of
from surgery.training.growth import Growth, Stage, rehearse, stages
from surgery.training.history import History
from surgery.training.resume import Checkpoint
from surgery.training.run import Batch, LossFn, Run, steps_of_epoch


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
    total = sum(stage.epochs * steps_of_epoch(stage.images, batch_size) for stage in plan)
    last_step = total if last_step is None else last_step
    if not 0 <= first_step < last_step <= total:
        raise UsageError(f"steps {first_step} to {last_step} are not among the {total} of this training")
    if grow and last_step - first_step < total:
        raise UsageError("a training that grows has all of its steps: leave out first_step and last_step")
    if grow:
        rehearse(model, plan, seed)
        model = copy.deepcopy(model)
    engine = Engine(device_of(model), precision)
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
    run = Run(
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
