"""The control beside a candidate: a model of the same sizes that is trained from scratch, with the same budget."""

from __future__ import annotations

import torch
from torch import nn

from surgery.deploy.curve.teaching import Lesson
from surgery.operations.reset import reset_hypothesis
from surgery.settings import TradeoffSettings, TrainSettings


def control_settings(settings: TradeoffSettings) -> TrainSettings | None:
    """The settings of a control's training: on labels, for as many epochs as the dense model and a candidate together.

    None: there is no control, or nothing is trained.
    """
    epochs = settings.epochs + Lesson(settings).passes
    return settings.training(epochs=epochs) if settings.control == "scratch" and epochs else None


def from_scratch(module: nn.Module, *, seed: int, trust: bool) -> nn.Module:
    """Return a model of the same sizes with all weights drawn as in a new one (`surgery.reset_hypothesis`).

    Raises:
        UsageError: parameters that nothing initialises.
    """
    masks = {name: torch.zeros_like(one, dtype=torch.bool) for name, one in module.named_parameters()}
    return reset_hypothesis(module, masks, seed=seed, trust=trust)
