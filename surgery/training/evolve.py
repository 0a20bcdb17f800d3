"""Knowledge Evolution: a network is trained in generations, and a slim one grows up inside of it (KELS, WELS).

Taha, Shrivastava, Davis, CVPR 2021. Each generation keeps the fit-hypothesis, draws the rest anew and trains all of it;
nothing is masked in between, so a step costs what a plain step costs.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from surgery.errors import UsageError, whole_number
from surgery.operations.reset import reset_hypothesis
from surgery.operations.slim import Rate, masked, slim, split_masks
from surgery.progress import Progress
from surgery.training.data.data import Data
from surgery.training.data.loading import loader
from surgery.training.descent import check_scored
from surgery.training.engine import mixed_seed, plain_modes, random_state, seed_everything
from surgery.training.evaluation import device_of, evaluate, in_mode
from surgery.training.history import History, Score
from surgery.training.loop import train
from surgery.training.run import LossFn

PAPER: Mapping[str, Mapping[str, float]] = {"sgd": {"lr": 0.256, "weight_decay": 1e-4}}
"""The peak learning rate and weight decay of the authors' code, which trains by SGD."""

Scorer = Callable[[nn.Module], Score]


@dataclass(frozen=True)
class Generation:
    """One generation.

    Attributes:
        dense: the score of the whole network after it.
        slim: that of the fit-hypothesis on its own: of the slim network (KELS), or of the network with the rest
            switched off (WELS).
        history: how it was trained.
    """

    dense: Score
    slim: Score
    history: History

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"dense": asdict(self.dense), "slim": asdict(self.slim), "history": self.history.to_dict()}


@dataclass(frozen=True)
class Evolution:
    """What an evolution gave.

    Attributes:
        model: a copy of the network that was given, after the last generation.
        slim: the slim network inside of it; none for WELS.
        masks: the fit-hypothesis.
        generations: the first is that of the network as it was given.
        long: the same network trained as many epochs in one go, nothing reset; where it was asked for.
        long_model: what that gave.
    """

    model: nn.Module = field(repr=False, compare=False)
    slim: nn.Module | None = field(repr=False, compare=False)
    masks: Mapping[str, Tensor] = field(repr=False, compare=False)
    generations: tuple[Generation, ...]
    long: Generation | None = None
    long_model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def score(self) -> Score:
        """Of the network after the last generation."""
        return self.generations[-1].dense

    @property
    def slim_score(self) -> Score:
        """Of its fit-hypothesis."""
        return self.generations[-1].slim

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the models and masks."""
        return {
            "generations": [generation.to_dict() for generation in self.generations],
            "long": self.long and self.long.to_dict(),
        }


@plain_modes()
def evolve(
    model: nn.Module,
    data: Data,
    split_rate: Rate = 0.5,
    generations: int = 5,
    *,
    epochs: int = 200,
    kind: str = "kels",
    reset: Mapping[str, Any] | None = None,
    recalibrate: bool = False,
    long: bool = False,
    optimizer: str = "sgd",
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    schedule: str = "warmup-cosine",
    batch_size: int = 32,
    label_smoothing: float = 0.1,
    loss_fn: LossFn | None = None,
    score: Scorer | None = None,
    precision: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    identity: Mapping[str, Any] | None = None,
    test_each_epoch: bool = False,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
) -> Evolution:
    """Train a network in generations (section 3; the settings by default are those of the authors' code).

    The first generation trains the network as it is given. Each other one begins with the fit-hypothesis of the one
    before and all else drawn anew, with a new optimiser and a new schedule, and sees the images in another order.

    Args:
        model: a traced module. It is not changed.
        split_rate: what share of each layer's channels (KELS), or weights (WELS), the fit-hypothesis has.
        generations: how many.
        epochs: passes over the training images in each.
        kind: of the fit-hypothesis, as in `surgery.split_masks`.
        reset: options of `surgery.reset_hypothesis`: what is drawn anew, and how. All of it, by default, as in a new
            network: a module of one's own must be traced with ``source=``, or come with ``fresh=`` here, a function
            that makes a new one, unless its layers' classes say how they are initialised. Each generation draws by
            a seed of its own.
        recalibrate: whether the slim network's BatchNorm statistics are measured anew, on the training images. It is
            scored, and given, with them.
        long: whether the network is also trained for ``generations * epochs`` epochs at once, for comparison.
        lr, weight_decay: by default `PAPER`'s for SGD, and the usual ones of other optimisers.
        loss_fn: as in `surgery.train`, whose settings are those that are not named here, too.
        score: of a network, by default its accuracy on the test images.
        checkpoint: a folder from which a run that was cut off goes on, to the same weights.
        identity: as in `surgery.train`: what says that ``loss_fn`` is another one.

    Raises:
        UsageError: a setting out of range, no images to score on, another run's checkpoint, or parameters that nothing
            says how to initialise.
        FloatingPointError: the loss stops being a number.
    """
    whole_number("generations", generations, 1)
    seed = whole_number("seed", seed, 0)
    if kind == "wels" and recalibrate:
        raise UsageError("recalibrate is for the slim network, and WELS gives none")
    check_scored(data, score)
    scored = score or (lambda network: evaluate(network, data.test, workers=workers))
    masks = split_masks(model, split_rate, kind=kind, seed=seed)
    options = _reset_options(reset or {}, generations)
    if generations > 1:
        reset_hypothesis(model, masks, **options)  # what cannot be drawn anew is refused before the training
    usual = PAPER.get(optimizer, {})
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": usual.get("lr") if lr is None else lr,
        "momentum": momentum,
        "weight_decay": usual.get("weight_decay") if weight_decay is None else weight_decay,
        "schedule": schedule,
        "batch_size": batch_size,
        "label_smoothing": label_smoothing,
        "loss_fn": loss_fn,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "test_each_epoch": test_each_epoch,
        "workers": workers,
        "progress": progress,
    }

    drawn = {name: value for name, value in options.items() if name != "fresh"}
    evolved = {"kind": kind, "split_rate": dict(split_rate) if isinstance(split_rate, Mapping) else split_rate, **drawn}

    def trained(network: nn.Module, task: str, number: int, total: int) -> History:
        return train(
            network,
            data,
            epochs=total,
            seed=mixed_seed(seed, number),
            checkpoint=None if checkpoint is None else Path(checkpoint) / f"{task}.pt",
            identity={**(identity or {}), **(evolved if number else {})},
            task=task,
            **settings,
        )

    def alone(network: nn.Module) -> nn.Module:
        if kind == "wels":
            return masked(network, masks)
        carved = slim(network, split_rate)
        return recalibrated(carved, data, batch_size, seed=seed) if recalibrate else carved

    found = []
    network = copy.deepcopy(model)
    for number in range(generations):
        if number:
            network = reset_hypothesis(network, masks, seed=mixed_seed(seed, number), **options)
        history = trained(network, f"generation-{number + 1}", number, epochs)
        found.append(Generation(scored(network), scored(alone(network)), history))
    baseline, other = None, None
    if long:
        other = copy.deepcopy(model)
        history = trained(other, "long", 0, generations * epochs)
        baseline = Generation(scored(other), scored(alone(other)), history)
    carved = alone(network) if kind == "kels" else None
    return Evolution(network, carved, masks, tuple(found), baseline, other)


def _reset_options(reset: Mapping[str, Any], generations: int) -> dict[str, Any]:
    """Options of `reset_hypothesis`, such that each generation draws other numbers."""
    if not isinstance(reset, Mapping):
        raise UsageError(f"reset= has options of reset_hypothesis by name, and is not {reset!r}")
    if "seed" in reset:
        raise UsageError("each generation draws by a seed of its own, which follows from seed=: leave it out of reset=")
    if isinstance(reset.get("fresh"), nn.Module) and generations > 2:
        raise UsageError("with one model as fresh= all generations would draw the same: pass a function that makes one")
    return dict(reset)


@plain_modes()
def recalibrated(model: nn.Module, data: Data, batch_size: int = 64, *, seed: int = 0) -> nn.Module:
    """A copy whose BatchNorm statistics are the means over the batches of training images. All else is as it was.

    The BatchNorms alone are in training mode as they are measured: dropout is off, and a detector needs no targets. One
    that is not run keeps what it has. An image that is left over is left out, since a batch of one has no variance.
    ``seed`` is that of augmentation.
    """
    result = copy.deepcopy(model)
    device = device_of(result)
    norms = [layer for layer in result.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    before = [(norm, norm.momentum, copy.deepcopy(dict(norm.named_buffers(recurse=False)))) for norm in norms]
    with random_state(device), in_mode(result, training=False), torch.no_grad():
        seed_everything(seed)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for images, *_ in loader(data.train, batch_size, collate=data.collate):
            if len(images) > 1:
                result(pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), images))
        for norm, momentum, buffers in before:
            norm.momentum = momentum
            if not norm.num_batches_tracked:
                norm.load_state_dict(buffers, strict=False)
    return result
