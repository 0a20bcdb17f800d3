"""Hints of a carved student: the teacher's values of the very channels that the student has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.deploy.compress.hints import KeptHint, all_channels, keep_channels, relative_error
from surgery.training.distilling.observed import observe
from tests.zoo import digits_net


class Block(nn.Module):
    """A residual block whose second convolution is in the stream."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.skip(x) + self.second(self.norm(self.first(x)).relu())).relu()


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = Block(3, 12, 1), nn.Sequential(Block(12, 16, 2), Block(16, 16, 1))
        self.layer3, self.head = Block(16, 20, 2), nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Staged().eval()
        for name, value in model.named_buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in name else value.normal_()
        return surgery.trace(model, torch.randn(2, 3, 8, 8))


def carve(module: nn.Module, rate: float) -> nn.Module:
    return surgery.slim(module, rate, importance="magnitude")


def further(before: nn.Module, after: nn.Module):
    return surgery.recipe(after).steps[len(surgery.recipe(before).steps) :]


def test_all_channels_of_each_stage_are_there_at_first(dense):
    kept = all_channels(dense)
    assert {name: len(channels) for name, channels in kept.items()} == {"layer1": 12, "layer2": 16, "layer3": 20}
    assert kept["layer1"] == tuple(range(12))


def test_the_channels_are_those_that_the_student_has(dense):
    """As carved, a student computes what the dense model computes with its other channels switched off."""
    student = carve(dense, 0.5)
    kept = keep_channels(all_channels(dense), dense, further(dense, student))
    assert {name: len(channels) for name, channels in kept.items()} == {"layer1": 6, "layer2": 8, "layer3": 10}
    assert any(channels != tuple(range(len(channels))) for channels in kept.values())
    masked = surgery.masked(dense, surgery.split_masks(dense, 0.5, importance="magnitude"))
    hint = KeptHint(tuple(kept.items()))
    for count in (1, 3):
        images = torch.randn(count, 3, 8, 8)
        for teacher, equal in ((masked, True), (dense, False)):
            both = observe(student.double(), teacher.double(), hint, epochs=1)
            ours = both.student.train()
            for norm in (m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.eval()
            loss = both.loss(ours(images.double())[1], both.teacher(images.double()), torch.zeros(count), 0.0)
            assert (float(loss.detach()) < 1e-20) == equal


def test_channels_are_followed_through_several_steps(dense):
    first = carve(dense, 0.75)
    second = carve(first, 0.5)
    kept = keep_channels(all_channels(dense), dense, further(dense, first))
    kept = keep_channels(kept, first, further(first, second))
    found = surgery.origins(dense, second)
    for stage, layer in (("layer1", "layer1.second"), ("layer2", "layer2.1.second"), ("layer3", "layer3.skip")):
        assert list(kept[stage]) == found[f"{layer}.weight"].axes[0].old.tolist()


def test_the_relative_error_is_1_for_the_mean_and_0_for_what_is_wanted():
    wanted = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    assert float(relative_error(wanted, wanted)) == 0
    assert float(relative_error(wanted.mean().expand_as(wanted), wanted)) == pytest.approx(1)
    assert float(relative_error(7 * wanted - 1, 7 * wanted)) == pytest.approx(1 / float((7 * wanted).var(correction=0)))
    assert float(relative_error(torch.zeros(2, 2), torch.zeros(2, 2))) == 0


def test_a_compression_with_hints_names_their_stages_and_leaves_none_behind(digits):
    model = surgery.train(digits_net().eval(), digits, epochs=1, lr=0.05).module
    found = surgery.compress(model, digits, macs=0.4, epochs=1, hint_weight=1.0)
    (step,) = found.steps
    assert step.hints == ("0", "4")
    assert found.module.state_dict().keys() == surgery.slim(found.dense, 0.5).state_dict().keys()
    plain = surgery.compress(model, digits, macs=0.4, epochs=1, hint_weight=0.0)
    assert plain.steps[0].hints == ()
    assert step.history.epochs[0].loss > plain.steps[0].history.epochs[0].loss


DIGITS = 300


def test_a_network_without_stages_has_no_hints():
    traced = surgery.trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.zeros(2, 3, 8, 8))
    assert all_channels(traced) == {}
