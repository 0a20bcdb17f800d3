"""Channels are kept by what their weights are, where that is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import UsageError


@pytest.fixture(scope="module")
def residual():
    return surgery.trace(surgery.models.build("resnet18?num_classes=10", seed=0).eval(), torch.zeros(2, 3, 32, 32))


def chain() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 3.0, 2.0, 0.5, 0.1, 4.0]).view(6, 1, 1, 1).expand(6, 3, 1, 1))
        model[3].weight.fill_(1.0)
    return surgery.trace(model.eval(), torch.zeros(2, 3, 1, 1))


def kept(module: nn.Module) -> list[float]:
    return [float(value) for value in module.get_submodule("0").weight[:, 0, 0, 0].detach()]


def test_the_channels_with_the_largest_weights_are_kept_in_their_order():
    assert kept(surgery.slim(chain(), 0.5)) == [1.0, 3.0, 2.0]
    assert kept(surgery.slim(chain(), 0.5, importance="magnitude")) == [3.0, 2.0, 4.0]


def test_layers_that_read_a_channel_count_as_much_as_those_that_write_it():
    module = chain()
    with torch.no_grad():
        module.get_submodule("3").weight[:, 4] = 100.0
    assert kept(surgery.slim(module, 0.5, importance="magnitude")) == [3.0, pytest.approx(0.1), 4.0]


def test_scores_are_means_over_the_parameters_in_units_of_their_own_means():
    module = chain()
    squares = torch.tensor([1.0, 9.0, 4.0, 0.25, 0.01, 16.0])
    expected = (squares / squares.mean() + 1) / 2
    assert surgery.unit_scores(module, "magnitude")["0"] == pytest.approx(expected.numpy(), rel=1e-5)
    assert not surgery.unit_scores(module, "prefix")["0"].any()


@pytest.mark.parametrize("rate", [0.5, {"layer3": 0.3}])
def test_slim_by_magnitude_is_masked_dense(residual, rate):
    x = torch.randn(2, 3, 32, 32)
    carved = surgery.slim(residual, rate, importance="magnitude")
    masks = surgery.split_masks(residual, rate, importance="magnitude")
    surgery.verify(carved, surgery.masked(residual, masks), x, dtype=torch.float64).raise_if_different()
    shapes = {name: tensor.shape for name, tensor in surgery.slim(residual, rate).state_dict().items()}
    assert {name: tensor.shape for name, tensor in carved.state_dict().items()} == shapes


def test_an_unknown_importance_is_refused(residual):
    with pytest.raises(UsageError, match="unknown importance 'magnitud'; did you mean 'magnitude'"):
        surgery.slim(residual, 0.5, importance="magnitud")


def test_scattered_weights_have_no_channels_to_choose():
    with pytest.raises(UsageError, match="leave it out for WELS, which keeps scattered weights"):
        surgery.split_masks(chain(), 0.5, kind="wels", importance="magnitude")
