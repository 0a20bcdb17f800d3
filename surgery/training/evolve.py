"""Knowledge Evolution: a network is trained in generations, with a slim network inside of it (KELS, WELS).

Taha, Shrivastava, Davis, CVPR 2021. Each generation keeps the fit-hypothesis, initialises the rest again, and trains
the whole network. No mask is applied during training, so a step costs the same as a plain step.
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
from surgery.operations.masks import masked, split_masks
from surgery.operations.reset import reset_hypothesis
from surgery.operations.slim import Rate, slim
from surgery.progress import Progress
from surgery.settings import EvolveSettings, accepts, renamed
from surgery.training.data.adapt import AnyData, as_data
from surgery.training.data.data import Data
from surgery.training.data.loading import loader
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.loop import train
from surgery.training.modes import device_of, in_mode, mixed_seed, plain_modes, random_state, seed_everything
from surgery.training.optimizers import check_scored
from surgery.training.resume import plain_identity
from surgery.training.run import LossFn
from surgery.training.tracking import followed

PAPER = EvolveSettings(
    epochs=200, lr=0.256, weight_decay=1e-4, schedule="warmup-cosine", batch_size=32, label_smoothing=0.1
)
"""The settings of the authors' code."""

Scorer = Callable[[nn.Module], Score]


@dataclass(frozen=True)
class Generation:
    """One generation.

    Attributes:
        dense: score of the whole network.
        slim: score of the fit-hypothesis alone: the slim network (KELS), or the network with the rest switched off
            (WELS).
        history: the record of its training.
    """

    dense: Score
    slim: Score
    history: History

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"dense": asdict(self.dense), "slim": asdict(self.slim), "history": self.history.to_dict()}


@dataclass(frozen=True)
class Evolution:
    """The result of `surgery.evolve`.

    Attributes:
        module: a new module, the network after the last generation.
        slim: the slim network inside of it; None for WELS.
        masks: the fit-hypothesis.
        generations: one record for each generation.
        long: with ``long=True``, the record of as many epochs in one go without a reset.
        long_module: the module of ``long``.
    """

    module: nn.Module = field(repr=False, compare=False)
    slim: nn.Module | None = field(repr=False, compare=False)
    masks: Mapping[str, Tensor] = field(repr=False, compare=False)
    generations: tuple[Generation, ...]
    long: Generation | None = None
    long_module: nn.Module | None = field(default=None, repr=False, compare=False)

    model = renamed("module", "model")
    long_model = renamed("long_module", "long_model")

    @property
    def score(self) -> Score:
        """Score of the network after the last generation."""
        return self.generations[-1].dense

    @property
    def slim_score(self) -> Score:
        """Score of its fit-hypothesis."""
        return self.generations[-1].slim

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the models and masks."""
        return {
            "generations": [generation.to_dict() for generation in self.generations],
            "long": self.long and self.long.to_dict(),
        }


@accepts(EvolveSettings, model="module", split_rate="rate")
@followed
@plain_modes()
def evolve(
    module: nn.Module,
    data: AnyData,
    rate: Rate = 0.5,
    generations: int = 5,
    settings: EvolveSettings = EvolveSettings(),
    *,
    reset: Mapping[str, Any] | None = None,
    loss_fn: LossFn | None = None,
    score: Scorer | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evolution:
    """Train a network in generations (Knowledge Evolution, Taha et al., CVPR 2021, section 3).

    The first generation trains the network as it is given. Each later one keeps the fit-hypothesis, initialises the
    rest again, and trains the whole network with a new optimizer and schedule, on the images in another order.

    Args:
        module: a traced module. It is not changed.
        data: what `surgery.as_data` takes, with images to test on unless ``score`` is given.
        rate: fraction of each layer's channels (KELS), or weights (WELS), in the fit-hypothesis.
        generations: number of generations.
        settings: see `surgery.EvolveSettings`; its fields may be given as keywords. `PAPER` has the authors' values.
            With ``recalibrate`` the slim network is scored and returned with BatchNorm statistics of the training
            images.
        reset: options of `surgery.reset_hypothesis`. By default the whole reset-hypothesis is drawn as in a new
            network. A user's own module must be traced with ``source=``, or come with ``fresh=``, a function that
            makes a new one, unless its layers' classes initialise themselves. Each generation has its own seed.
        loss_fn: as in `surgery.train`.
        score: scores a network; by default its accuracy on the test images.
        checkpoint: a folder from which an interrupted run resumes, to the same weights.
        identity: as in `surgery.train`: extra JSON data that distinguishes checkpoints.

    Returns:
        The last generation as ``.module``, its slim network, and the record of each generation.

    Raises:
        UsageError: a setting out of range, no images to score on, another run's checkpoint, or parameters without a
            known initialisation.
        FloatingPointError: the loss stops being a number.

    Example:
        >>> slim = surgery.evolve(traced, data, rate=0.5, generations=8, epochs=20).slim
    """
    data = as_data(data)
    whole_number("generations", generations, 1)
    check_scored(data, score)
    masks = split_masks(module, rate, kind=settings.kind, seed=settings.seed)
    options = _reset_options(reset or {}, generations)
    if generations > 1:
        reset_hypothesis(module, masks, **options)  # refuses before the training
    drawn = {name: value for name, value in options.items() if name != "fresh"}
    evolved = {"kind": settings.kind, "split_rate": rate, **drawn}
    plain_identity(evolved if checkpoint is not None else {})  # so does this
    score = score or (lambda network: evaluate(network, data.test, **settings.scoring))

    def train_one(network: nn.Module, task: str, number: int, total: int) -> tuple[nn.Module, Generation]:
        history = train(
            network,
            data,
            settings.training(epochs=total, seed=mixed_seed(settings.seed, number)),
            loss_fn=loss_fn,
            checkpoint=None if checkpoint is None else Path(checkpoint) / f"{task}.pt",
            identity={**(identity or {}), **(evolved if number else {})},
            progress=progress,
            task=task,
        )
        network, history = history.without_module()
        return network, Generation(score(network), score(fit_hypothesis(network)), history)

    def fit_hypothesis(network: nn.Module) -> nn.Module:
        if settings.kind == "wels":
            return masked(network, masks)
        carved = slim(network, rate)
        return recalibrate(carved, data, settings.batch_size, seed=settings.seed) if settings.recalibrate else carved

    found = []
    network = module
    for number in range(generations):
        if number:
            network = reset_hypothesis(network, masks, seed=mixed_seed(settings.seed, number), **options)
        network, generation = train_one(network, f"generation-{number + 1}", number, settings.epochs)
        found.append(generation)
    long_module, long = None, None
    if settings.long:
        long_module, long = train_one(module, "long", 0, generations * settings.epochs)
    carved = fit_hypothesis(network) if settings.kind == "kels" else None
    return Evolution(network, carved, masks, tuple(found), long, long_module)


def _reset_options(reset: Mapping[str, Any], generations: int) -> dict[str, Any]:
    """Check options of `reset_hypothesis`: each generation must draw different numbers."""
    if not isinstance(reset, Mapping):
        raise UsageError(f"reset must be a mapping of options of reset_hypothesis, not {reset!r}")
    if "seed" in reset:
        raise UsageError("each generation has its own seed, which follows from seed=: leave it out of reset=")
    if isinstance(reset.get("fresh"), nn.Module) and generations > 2:
        raise UsageError("with a model as fresh=, all generations would draw the same: pass a function that makes one")
    return dict(reset)


@plain_modes()
def recalibrate(model: nn.Module, data: Data, batch_size: int = 64, *, seed: int = 0) -> nn.Module:
    """Return a copy whose BatchNorm statistics are the means over the batches of training images.

    Only BatchNorms are in training mode: dropout is off, and a detector needs no targets. A BatchNorm that does not
    run keeps its statistics. A last batch of one image, which has no variance, is skipped.

    Args:
        seed: of augmentation.
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
