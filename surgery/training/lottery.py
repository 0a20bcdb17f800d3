"""The lottery ticket: prune a trained network by magnitude, set the rest back to an early step, and train again.

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; with late rewinding, Frankle et al., "Linear Mode
Connectivity and the Lottery Ticket Hypothesis", ICML 2020. Knowledge Evolution is measured against it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.errors import UsageError, whole_number
from surgery.operations.tickets import hold_masked, magnitude_masks, rewind
from surgery.progress import Progress
from surgery.selectors import Where
from surgery.settings import LotterySettings, accepts, renamed
from surgery.training.data.adapt import AnyData, as_data
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.loop import train
from surgery.training.modes import plain_modes
from surgery.training.optimizers import check_scored
from surgery.training.resume import plain_identity
from surgery.training.run import LossFn, steps_of_epoch
from surgery.training.tracking import followed


@dataclass(frozen=True)
class Ticket:
    """One round.

    Attributes:
        sparsity: fraction of weights that is pruned; 0 in the first round.
        score: of the network after its training.
        history: of its training.
    """

    sparsity: float
    score: Score
    history: History

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"sparsity": self.sparsity, "score": asdict(self.score), "history": self.history.to_dict()}


@dataclass(frozen=True)
class Lottery:
    """The result of `surgery.lottery`.

    Attributes:
        module: a new module, the last ticket after its training; its pruned weights are 0.
        masks: of the last ticket.
        tickets: the first is the dense network.
    """

    module: nn.Module = field(repr=False, compare=False)
    masks: Mapping[str, Tensor] = field(repr=False, compare=False)
    tickets: tuple[Ticket, ...]

    model = renamed("module", "model")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without model and masks."""
        return {"tickets": [ticket.to_dict() for ticket in self.tickets]}


@accepts(LotterySettings, model="module")
@followed
@plain_modes()
def lottery(
    module: nn.Module,
    data: AnyData,
    sparsity: float,
    rounds: int = 1,
    settings: LotterySettings = LotterySettings(),
    *,
    whole: Where = (),
    loss_fn: LossFn | None = None,
    score: Callable[[nn.Module], Score] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Lottery:
    """Train, keep the largest weights, rewind them to step ``rewind_to``, and train again.

    Each round prunes the same fraction of the remaining weights, so that the last one has ``sparsity``. From step
    ``rewind_to`` on, a ticket sees the same images in the same order, at the same learning rates, as the dense network
    (Frankle and Carbin, ICLR 2019; Frankle et al., ICML 2020).

    Args:
        module: a traced module, as initialised. It is not changed.
        data: what `surgery.as_data` takes, with images to test on unless ``score`` is given.
        sparsity: final fraction of pruned weights, in [0, 1).
        rounds: number of times to prune and train again.
        settings: see `surgery.LotterySettings`; its fields may be given as keywords.
        whole: layers or parameters that are not pruned, as in `surgery.magnitude_masks`.
        loss_fn, identity: as in `surgery.train`.
        score: of a network, by default its accuracy on the test images.
        checkpoint: a folder from which an interrupted run resumes, to the same weights.

    Returns:
        The last ticket, trained, as ``.module``, its masks, and the record of each round.

    Raises:
        UsageError: a setting out of range, no images to score on, or another run's checkpoint.
        FloatingPointError: the loss stops being a number.

    Example:
        >>> ticket = surgery.lottery(traced, data, sparsity=0.9, rounds=5, epochs=20).module
    """
    data = as_data(data)
    whole_number("rounds", rounds, 1)
    check_scored(data, score)
    rewind_to = settings.rewind_to
    total = settings.epochs * steps_of_epoch(data.train, settings.batch_size) if data.counts[0] else 0
    if 0 < total <= rewind_to:
        raise UsageError(f"rewind_to is {rewind_to}: it must be below {total}, the steps of this training")
    pruning: dict[str, Any] = {"scope": settings.scope, "vectors": settings.vectors, "whole": whole}
    magnitude_masks(module, sparsity, **pruning)  # refuses before the training, as the next line does
    plain_identity(pruning if checkpoint is not None else {})
    score = score or (lambda network: evaluate(network, data.test, **settings.scoring))

    def train_one(network: nn.Module, task: str, kept: Mapping[str, Any] | None = None, **steps: Any) -> History:
        file = None if checkpoint is None else Path(checkpoint) / f"{task}.pt"
        known = {**(identity or {}), **(kept or {})}
        options: dict[str, Any] = {"loss_fn": loss_fn, "progress": progress, "task": task, **steps}
        return train(network, data, settings, checkpoint=file, identity=known, **options)

    early = train_one(module, "early", last_step=rewind_to).module if rewind_to else module
    network, history = train_one(module, "dense").without_module()
    tickets = [Ticket(0.0, score(network), history)]
    masks: dict[str, Tensor] = {}
    for number in range(1, rounds + 1):
        pruned = 1 - (1 - sparsity) ** (number / rounds)
        masks = magnitude_masks(network, pruned, within=masks, **pruning)
        network = rewind(module, early, masks)
        hold = hold_masked(network, masks)
        kept = {**pruning, "sparsity": pruned}
        trained = train_one(network, f"ticket-{number}", kept, first_step=rewind_to, after_step=hold)
        network, history = trained.without_module()
        tickets.append(Ticket(pruned, score(network), history))
    return Lottery(network, masks, tuple(tickets))
