"""The lottery ticket: prune a trained network by magnitude, set the rest back to an early step, and train again.

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; with late rewinding, Frankle et al., "Linear Mode
Connectivity and the Lottery Ticket Hypothesis", ICML 2020. Knowledge Evolution is measured against it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.errors import whole_number
from surgery.passes.tickets import hold_masked, magnitude_masks, rewind
from surgery.training.data import Data
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.loop import train


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


def lottery(
    model: nn.Module,
    data: Data,
    sparsity: float,
    rounds: int = 1,
    *,
    epochs: int,
    rewind_to: int = 0,
    scope: str = "layer",
    vectors: bool = False,
    whole: Collection[str] = (),
    checkpoint: str | os.PathLike[str] | None = None,
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
        checkpoint: a folder from which a run that was cut off goes on, to the same weights.
        settings: of `surgery.train`.

    Raises:
        UsageError: a setting out of range, or another run's checkpoint.
        FloatingPointError: the loss stops being a number.
    """
    whole_number("rounds", rounds, 1)
    chosen: dict[str, Any] = {"scope": scope, "vectors": vectors, "whole": whole}
    magnitude_masks(model, sparsity, **chosen)  # what cannot be pruned so is refused before the training

    def trained(network: nn.Module, task: str, **more: Any) -> History:
        file = None if checkpoint is None else Path(checkpoint) / f"{task}.pt"
        return train(network, data, epochs=epochs, checkpoint=file, task=task, **{**settings, **more})

    early = copy.deepcopy(model)
    if rewind_to:
        trained(early, "early", last_step=rewind_to)
    network = copy.deepcopy(model)
    history = trained(network, "dense")
    tickets = [Ticket(0.0, evaluate(network, data.test), history)]
    masks: dict[str, Tensor] = {}
    for number in range(1, rounds + 1):
        pruned = 1 - (1 - sparsity) ** (number / rounds)
        masks = magnitude_masks(network, pruned, within=masks, **chosen)
        network = rewind(model, early, masks)
        hold = hold_masked(network, masks)
        history = trained(network, f"ticket-{number}", first_step=rewind_to, after_step=hold)
        tickets.append(Ticket(pruned, evaluate(network, data.test), history))
    return Lottery(network, masks, tuple(tickets))
