"""What tests of training share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from tests.zoo import digits_net


@pytest.fixture
def model() -> nn.Module:
    """A small convolutional network for the digits, traced."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return surgery.trace(digits_net().eval(), torch.zeros(2, 3, 8, 8))
