"""When a training ends early, and which of its epochs is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgery.errors import whole_number
from surgery.training.history import Epoch, Score


@dataclass(frozen=True)
class EarlyStopping:
    """End a training whose score no longer rises, and keep its best epoch.

    An epoch is progress where its accuracy lies above the 95 % interval (`Score.interval`) of the last epoch that was:
    anything less may be noise of the images that it is scored on. The training ends ``patience`` epochs after the last
    progress. Kept is the epoch with the most correct images, of equal ones the last; none, if all are worse than the
    model was before.

    Both follow from the scores alone, so a training that resumes ends where it would have.

    Attributes:
        patience: number of epochs without progress.
        before: the score before the training, as of an epoch 0; None: the first epoch is progress.

    Example:
        >>> stopping = surgery.EarlyStopping(patience=3)
        >>> surgery.distill(student, teacher, validated, epochs=50, hint_epochs=0, stopping=stopping)
    """

    patience: int
    before: Score | None = None

    def __post_init__(self) -> None:
        whole_number("patience", self.patience, 1)

    def ends(self, epochs: Sequence[Epoch]) -> bool:
        """Whether a training ends after these epochs, each with a score."""
        mark, at = self.before, 0
        for number, epoch in enumerate(epochs, 1):
            score = _score(epoch)
            if mark is None or score.accuracy > mark.interval()[1]:
                mark, at = score, number
        return len(epochs) - at >= self.patience

    def best(self, epochs: Sequence[Epoch]) -> int:
        """The number of the epoch to keep, from 1; 0: the model as it was before."""
        scores = [self.before, *map(_score, epochs)]
        return max(range(len(scores)), key=lambda k: (-1 if (one := scores[k]) is None else one.correct, k))

    def identity(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"patience": self.patience, "before": self.before and [self.before.correct, self.before.total]}


class BestEpoch:
    """The weights of the best epoch of a training so far."""

    def __init__(self, rule: EarlyStopping, model: nn.Module) -> None:
        self.rule = rule
        self.state = _copy(model)

    def note(self, model: nn.Module, epochs: Sequence[Epoch]) -> None:
        """Look at the model after these epochs."""
        if self.rule.best(epochs) == len(epochs):
            self.state = _copy(model)

    def give(self, model: nn.Module) -> None:
        """Give the model these weights."""
        model.load_state_dict(self.state)


def _score(epoch: Epoch) -> Score:
    assert epoch.score is not None  # `Run` scores each
    return epoch.score


def _copy(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
