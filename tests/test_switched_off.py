"""The judge of slim networks is itself tried on networks whose parts are removed by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from tests.random_graphs import build
from tests.random_graphs.check import WrongError, check
from tests.switched_off import Run, find_sources, narrowed, run, run_switched_off, worst_difference


class Mixed(nn.Module):
    """Layers whose sums and statistics see removed channels, if these are only zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.layer_norm = nn.Linear(3, width), nn.LayerNorm(width)
        self.rms_norm, self.group_norm = nn.RMSNorm(width), nn.GroupNorm(1, width)
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rms_norm(self.layer_norm(self.first(x)).sigmoid())
        x = F.normalize(self.group_norm(x.cos().transpose(1, 2)), dim=1).transpose(1, 2)
        return self.last(x + (x @ x.transpose(1, 2)).softmax(-1) @ x * x.mean(-1, keepdim=True))


def without(model: nn.Module, kept: list[int]) -> nn.Module:
    """The model made narrow by hand."""
    narrow = Mixed(len(kept)).double()
    state = {}
    for name, value in model.state_dict().items():
        if name == "last.weight":
            state[name] = value[:, kept]
        else:
            state[name] = value if name == "last.bias" else value[kept]
    narrow.load_state_dict(state)
    return narrow


def mixed_net() -> tuple[nn.Module, torch.Tensor]:
    model = Mixed(5).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return model, torch.randn(2, 4, 3, dtype=torch.float64)


@pytest.mark.parametrize("train", [False, True])
def test_what_is_removed_is_missing_from_sums_and_statistics(train):
    model, x = mixed_net()
    slim, kept = find_sources(model, lambda m: without(m, [0, 2, 3]), copies=False)
    off = run_switched_off(model, kept, (x,), train)
    assert worst_difference(run(slim, (x,), train), narrowed(off, kept)) < 1e-12


def test_a_slim_network_that_keeps_other_rows_than_columns_is_found():
    model, x = mixed_net()

    def wrong(m):
        narrow = without(m, [0, 2, 3])
        narrow.last.weight.data.copy_(m.last.weight[:, [0, 2, 4]])
        return narrow

    slim, kept = find_sources(model, wrong, copies=False)
    assert worst_difference(run(slim, (x,), False), run_switched_off(model, kept, (x,), False)) > 1e-3


def test_a_norm_over_all_channels_is_found():
    """Zeros instead of channels that are gone are another function."""
    model, x = mixed_net()
    slim, kept = find_sources(model, lambda m: without(m, [0, 2, 3]), copies=False)
    zeros = copy.deepcopy(model)
    for name, parameter in zeros.named_parameters():
        mask = torch.ones(parameter.numel(), dtype=torch.bool)
        mask[kept[name].positions.flatten()] = False
        parameter.data.masked_fill_(mask.view(parameter.shape), 0)
    assert worst_difference(run(zeros, (x,), False), run(slim, (x,), False)) > 1e-3


def test_a_wrong_gradient_is_found():
    model, x = mixed_net()
    plain = run(model, (x,), True)
    other = Run(plain.outputs, {name: -g if name == "first.bias" else g for name, g in plain.gradients.items()})
    assert worst_difference(other, plain) > 1


def test_a_removed_output_is_never_passed_over():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(2, 3, dtype=torch.float64)

    def short(m):
        narrow = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
        narrow.load_state_dict({k: v[:1] if k.startswith("1.") else v for k, v in m.state_dict().items()})
        return narrow

    _, kept = find_sources(net, short, copies=False)
    off = run_switched_off(net, kept, (x,), False)
    with pytest.raises(AssertionError, match="not finite"):
        worst_difference(off, off)


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan"), float("inf")])
def test_a_comparison_that_could_not_fail_fails(value):
    vacuous = Run([torch.full((2, 3), value)], {})
    with pytest.raises(AssertionError, match=r"not finite|are all"):
        worst_difference(vacuous, vacuous)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda m: m.last.weight.data.mul_(1.001), "off by"),
        (lambda m: m.last.bias.data.fill_(float("nan")), "off by nan"),
    ],
)
def test_an_edit_that_is_off_is_wrong(monkeypatch, break_it, said):
    widen = surgery.widen

    def broken(module, *args, **kwargs):
        result = widen(module, *args, **kwargs)
        break_it(result)
        return result

    monkeypatch.setattr(surgery, "widen", broken)
    with pytest.raises(WrongError, match=f"widen, in evaluation at batch 1: {said}"):
        check([("conv", 1, 48), ("conv", 0, 20)])


def test_an_error_that_is_not_a_refusal_is_wrong(monkeypatch):
    monkeypatch.setattr(surgery, "slim", lambda *args, **kwargs: {}["missing"])
    with pytest.raises(WrongError, match="slim: KeyError"):
        check([("conv", 1, 48), ("conv", 0, 20)])


def test_a_run_leaves_the_module_as_it_was():
    net, inputs = build([("conv", 1, 48), ("norm", 0, 0)])
    before = copy.deepcopy(net.state_dict())
    run(net, inputs, True)
    assert not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
