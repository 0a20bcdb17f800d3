"""Operations and parameters by the counting rule of Knowledge Evolution's authors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from benchmarks.knowledge_evolution.counting import KECost, ke_cost
from surgery import models as catalogue

X = torch.zeros(2, 3, 224, 224)

# PAPERS section 3.5: billions of operations, millions of parameters; the six digits are those of the authors' log.
FIGURES = {
    "resnet18?num_classes=100": {1.0: (3.632418, 11.227812), 0.5: (0.968435, 2.824580)},
    "resnet34?num_classes=200": {1.0: (7.3344, 21.3873), 0.8: (4.7833, 13.7481)},
    "resnet50?num_classes=200": {0.5: (2.1135, 6.0976), 0.25: (0.5606, 1.5836)},
    "densenet121?num_classes=200": {1.0: (5.7075, 7.1589), 0.5: (1.4962, 1.8643)},
    "googlenet?num_classes=200&aux_logits=false": {0.8: (1.9837, 3.7805), 0.5: (0.8109, 1.5086)},
}


@pytest.mark.parametrize("source", FIGURES)
def test_counts_are_those_of_the_authors_to_the_printed_digit(source):
    traced = surgery.trace(catalogue.build(source, seed=0), X)
    for rate, figures in FIGURES[source].items():
        counted = ke_cost(surgery.slim(traced, rate))
        for count, unit, figure in zip((counted.operations, counted.params), (1e9, 1e6), figures, strict=True):
            digits = len(str(figure).partition(".")[2])
            assert round(count / unit, max(digits, 4)) == figure


def test_densenet_at_rate_0_8_has_their_figures_with_the_channel_that_leaks():
    traced = surgery.trace(catalogue.build("densenet121", num_classes=200, seed=0), X)
    ours, theirs = surgery.slim(traced, 0.8), surgery.slim(traced, {"features": 0.8, "*.denselayer*.conv1": 104 / 128})
    assert [round(ke_cost(m).operations / 1e9, 4) for m in (ours, theirs)] == [3.7675, 3.7981]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (3, 1), groups=2)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU()
        self.most, self.mean = nn.MaxPool2d(3, stride=1), nn.AvgPool2d((2, 2))
        self.end = nn.Linear(6, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = self.mean(self.most(self.relu(x)))
        return self.end(torch.relu(x).mean((2, 3)))


def test_each_layer_is_counted_by_the_rule_whenever_it_is_called_and_functions_are_not():
    positions = 6 * 6 * 8  # 6 channels of 6 x 8
    conv, norm, relus = (2 * 3 * 2 - 1 + 1) * positions, 2 * positions, 2 * positions
    pools = (3 - 1) * (6 * 4 * 6) + 2 * (6 * 2 * 3)
    expected = KECost(conv + norm + relus + pools + (2 * 6 - 1) * 5, (6 * 2 * 3 + 6) + 12 + 35)
    net, x = Layers(), torch.randn(3, 4, 8, 8)
    assert ke_cost(net, x) == ke_cost(surgery.trace(net, x)) == expected
    assert expected.to_dict() == {"operations": expected.operations, "params": expected.params}


def test_counting_leaves_the_module_as_it_was():
    net = Layers().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    ke_cost(net, torch.zeros(2, 4, 8, 8))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_module_that_was_not_traced_needs_inputs():
    with pytest.raises(surgery.UsageError, match="not a traced module"):
        ke_cost(Layers())
