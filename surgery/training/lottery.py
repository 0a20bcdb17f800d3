"""The lottery ticket: prune a trained network by magnitude, set the rest back to an early step, and train again.

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; with late rewinding, Frankle et al., "Linear Mode
Connectivity and the Lottery Ticket Hypothesis", ICML 2020. Knowledge Evolution is measured against it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.errors import UsageError, whole_number
from surgery.operations.tickets import hold_masked, magnitude_masks, rewind
from surgery.training.data.data import Data
from surgery.training.descent import check_scored
from surgery.training.engine import plain_modes
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.loop import train
from surgery.training.run import steps_of_epoch

_OWN = ("grow", "first_step", "last_step", "after_step", "task")
"""Settings of `train` that are the lottery's to make."""


@dataclass(frozen=True)
class Ticket:
    """One round.

    Attributes:
        sparsity: the fraction of weights that is pruned; 0 in the first round.
        score: of the network after its training.
        history: of that.
    """

    sparsity: float
    score: Score
    history: History

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"sparsity": self.sparsity, "score": asdict(self.score), "history": self.history.to_dict()}


@dataclass(frozen=True)
class Lottery:
    """What a lottery gave.

    Attributes:
        model: a copy of the network that was given: the last ticket, trained; its pruned weights are 0.
        masks: of the last ticket.
        tickets: the first is the dense network.
    """

    model: nn.Module = field(repr=False, compare=False)
    masks: Mapping[str, Tensor] = field(repr=False, compare=False)
    tickets: tuple[Ticket, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without model and masks."""
        return {"tickets": [ticket.to_dict() for ticket in self.tickets]}


@plain_modes()
def lottery(
    model: nn.Module,
    data: Data,
    sparsity: float,
    rounds: int = 1,
    *,
    epochs: int,
    batch_size: int = 64,
    rewind_to: int = 0,
    scope: str = "layer",
    vectors: bool = False,
    whole: Collection[str] = (),
    score: Callable[[nn.Module], Score] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Lottery:
    """Train, keep the largest weights, set these back to what they were at step ``rewind_to``, and train on from there.

    Each round prunes the same fraction of what is left, so that the last has ``sparsity``. A ticket sees the images in
    the order, and at the learning rates, that the dense network had from that step on.

    Args:
        model: a traced module, as initialised. It is not changed.
        sparsity: the fraction of weights that is pruned in the end, in [0, 1).
        rounds: how often to prune and train again.
        epochs: passes over the training images, of the dense network.
        rewind_to: a step of the training; 0 is the initialisation.
        scope, vectors, whole: as in `surgery.magnitude_masks`.
        score: of a network, by default its accuracy on the test images.
        checkpoint: a folder from which a run that was cut off goes on, to the same weights.
        batch_size, identity, settings: of `surgery.train`.

    Raises:
        UsageError: a setting out of range, or one that the lottery makes itself, no images to score on, or another
            run's checkpoint.
        FloatingPointError: the loss stops being a number.
    """
    whole_number("rounds", rounds, 1)
    whole_number("rewind_to", rewind_to, 0)
    whole_number("epochs", epochs, 1)
    whole_number("batch_size", batch_size, 2)
    if taken := [name for name in _OWN if name in settings]:
        raise UsageError(f"{', '.join(taken)}: the lottery decides on this itself, leave it out")
    check_scored(data, score)
    scored = score or (lambda network: evaluate(network, data.test))
    total = epochs * steps_of_epoch(data.train, batch_size) if data.counts[0] else 0
    if 0 < total <= rewind_to:
        raise UsageError(f"rewind_to is {rewind_to}: it must be below {total}, the steps of this training")
    chosen: dict[str, Any] = {"scope": scope, "vectors": vectors, "whole": whole}
    magnitude_masks(model, sparsity, **chosen)  # what cannot be pruned so is refused before the training

    def trained(network: nn.Module, task: str, kept: Mapping[str, Any] | None = None, **more: Any) -> History:
        file = None if checkpoint is None else Path(checkpoint) / f"{task}.pt"
        known = {**(identity or {}), **(kept or {})}
        return train(
            network, data, epochs=epochs, batch_size=batch_size, checkpoint=file, identity=known, task=task,
            **settings, **more,
        )  # fmt: skip

    early = copy.deepcopy(model)
    if rewind_to:
        trained(early, "early", last_step=rewind_to)
    network = copy.deepcopy(model)
    history = trained(network, "dense")
    tickets = [Ticket(0.0, scored(network), history)]
    masks: dict[str, Tensor] = {}
    for number in range(1, rounds + 1):
        pruned = 1 - (1 - sparsity) ** (number / rounds)
        masks = magnitude_masks(network, pruned, within=masks, **chosen)
        network = rewind(model, early, masks)
        hold = hold_masked(network, masks)
        kept = {**chosen, "whole": [*whole], "sparsity": pruned}
        history = trained(network, f"ticket-{number}", kept, first_step=rewind_to, after_step=hold)
        tickets.append(Ticket(pruned, scored(network), history))
    return Lottery(network, masks, tuple(tickets))
