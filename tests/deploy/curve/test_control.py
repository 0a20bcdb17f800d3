"""The control beside a candidate: the same sizes with new weights, and as many epochs as it had altogether."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.deploy.curve.control import control_settings, from_scratch
from surgery.errors import UsageError
from surgery.settings import TradeoffSettings


def dense() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    for parameter in (*model.parameters(), model[1].running_mean):
        nn.init.normal_(parameter, 5.0)
    return surgery.trace(model.eval(), torch.randn(2, 3, 8, 8))


def test_a_control_has_the_sizes_of_the_candidate_and_nothing_of_its_weights():
    start = surgery.slim(dense(), 0.5)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    one, same, other = (from_scratch(start, seed=seed, trust=False) for seed in (0, 0, 1))
    assert surgery.cost(one) == surgery.cost(start)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in one.state_dict().items())
    for name, parameter in one.named_parameters():
        assert not (parameter == start.get_parameter(name)).any()
        assert "1." in name or not torch.equal(parameter, other.get_parameter(name))
        assert parameter.abs().max() <= 1  # drawn as in a new model
    assert not one.get_buffer("1.running_mean").any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())


@pytest.mark.parametrize(
    ("given", "epochs"),
    [
        ({"epochs": 5, "finetune_epochs": 3}, 8),
        ({"epochs": 0, "finetune_epochs": 3}, 3),
        ({"epochs": 5, "finetune_epochs": 0}, 5),
        ({"epochs": 5, "finetune_epochs": 3, "teach": "hints", "hint_epochs": 2}, 10),
        ({"epochs": 5, "finetune_epochs": 3, "teach": "evolve", "generations": 4}, 17),
    ],
)
def test_a_control_has_the_budget_of_the_dense_model_and_the_candidate_together(given, epochs):
    options = {"optimizer": "adamw", "seed": 3}
    settings = control_settings(TradeoffSettings(control="scratch", **given, **options))
    assert settings == surgery.TrainSettings(epochs=epochs, **options)
    assert control_settings(TradeoffSettings(**given)) is None


def test_weights_that_nothing_initialises_are_refused_before_anything_is_trained(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.fc, self.scale = nn.Flatten(), nn.Linear(192, 10), nn.Parameter(torch.ones(10))

        def forward(self, x):
            return self.fc(self.flat(x)) * self.scale

    with pytest.raises(UsageError, match="scale"):
        surgery.tradeoff(Own(), dataset="digits", rates=[1.0], directory=tmp_path / "made", control="scratch", limit=64)
    assert list(tmp_path.iterdir()) == []
