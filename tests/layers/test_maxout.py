"""Maxout behind convolutions and linear layers: it widens, slims, deepens, exports and is saved like other layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import InsertIdentity, Recipe
from surgery.errors import UsageError
from surgery.layers.maxout import Maxout
from tests.zoo import randomised

EXACT = 1e-10


class Net(nn.Module):
    """Two maxout convolutions, one of them with BatchNorm and three pieces, and a maxout layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act1, self.pool = nn.Conv2d(3, 12, 3, padding=1), Maxout(2), nn.MaxPool2d(2, ceil_mode=True)
        self.conv2, self.norm, self.act2 = nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12), Maxout(3)
        self.fc, self.act3, self.head = nn.Linear(4 * 2 * 2, 10), Maxout(2), nn.Linear(5, 3)

    def forward(self, x):
        x = self.pool(self.act1(self.conv1(x)))
        x = self.act2(self.norm(self.conv2(x)))
        return self.head(self.act3(self.fc(x.flatten(1))))


class Tokens(nn.Module):
    """Maxout on the last axis."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 15), Maxout(3, dim=-1), nn.Linear(5, 4)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


@pytest.fixture
def x():
    return torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def traced(x) -> Any:
    torch.manual_seed(0)
    return surgery.trace(randomised(Net()).double().eval(), x)


def test_a_unit_is_the_largest_of_the_pieces_beside_each_other():
    x = torch.tensor([[[1.0], [5.0], [4.0], [-2.0], [0.0], [3.0]]])
    assert torch.equal(Maxout(2)(x), torch.tensor([[[5.0], [4.0], [3.0]]]))
    assert torch.equal(Maxout(3, dim=-1)(x.mT), torch.tensor([[[5.0, 3.0]]]))
    assert torch.equal(Maxout(1)(x), x)
    assert repr(Maxout(2)) == "Maxout(pieces=2, dim=1)"


def test_a_unit_without_a_piece_is_an_error():
    with pytest.raises(UsageError, match=r"^a maxout unit has at least 1 piece, not 0$"):
        Maxout(0)


def test_the_pieces_of_a_unit_are_chosen_together(traced):
    groups = {g.name: g for g in surgery.dimension_groups(traced)}
    assert {n: (g.size, g.units) for n, g in groups.items() if g.editable} == {
        "conv1": (12, 6),
        "conv2": (12, 4),
        "fc": (10, 5),
    }
    assert [str(m) for m in groups["conv1"].members] == ["conv1.weight[0]", "conv1.bias[0]", "conv2.weight[1]"]


def test_permuting_every_group_changes_nothing(traced, x):
    index = {g.name: g.permutation(seed=1) for g in surgery.dimension_groups(traced) if g.editable}
    assert all(i != sorted(i) for i in index.values())
    assert surgery.verify(surgery.reindex(traced, index), traced, x).max_rel <= EXACT


@pytest.mark.parametrize("widths", [2.0, 1.5, {"conv1": 18, "fc": 1.4}])
@pytest.mark.parametrize("break_symmetry", ["uneven", "zero-sum", None])
def test_widening_changes_nothing(traced, x, widths, break_symmetry):
    wide = surgery.widen(traced, widths, seed=3, break_symmetry=break_symmetry)
    assert wide.conv1.weight.shape[0] == (24 if widths == 2.0 else 18)
    assert wide.conv1.weight.shape[0] == 2 * wide.conv2.weight.shape[1]
    assert surgery.verify(wide, traced, x).max_rel <= EXACT


def test_the_slim_network_is_the_dense_one_without_its_reset_hypothesis(traced, x):
    slim = surgery.slim(traced, 0.5)
    assert [slim.conv1.weight.shape[0], slim.conv2.weight.shape[:2], slim.fc.weight.shape] == [6, (6, 3), (6, 8)]
    assert surgery.verify(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5)), x).max_rel <= EXACT


def test_maxout_of_tokens_is_edited_like_that_of_maps():
    torch.manual_seed(0)
    tokens = torch.randn(2, 6, 4, dtype=torch.float64)
    traced = surgery.trace(Tokens().double().eval(), tokens)
    assert surgery.verify(surgery.widen(traced, {"up": 2.0}), traced, tokens).max_rel <= EXACT
    deep = surgery.deepen(traced, ["up"])
    assert isinstance(deep.up_identity0.act, Maxout)
    assert surgery.verify(deep, traced, tokens).max_rel <= EXACT


@pytest.mark.parametrize("place", ["conv1", "act1", "pool", "conv2", "fc", "act3"])
@pytest.mark.parametrize("form", [None, "layer", "residual"])
def test_deepening_changes_nothing_behind_a_maxout_of_either_sign(traced, x, place, form):
    deep = surgery.deepen(traced, {place: 2}, form=form, seed=1)
    assert surgery.verify(deep, traced, x).max_rel <= EXACT
    steps = surgery.recipe(deep).steps
    assert [(s.form, s.activation, s.pieces) for s in steps if isinstance(s, InsertIdentity)] == [
        (form or "layer", "Maxout", 3 if place == "conv2" else 2)
    ] * 2
    assert Recipe.from_json(surgery.recipe(deep).to_json()) == surgery.recipe(deep)


def test_an_identity_layer_has_the_identity_in_each_piece(traced):
    deep = surgery.deepen(traced, ["fc"])
    assert torch.equal(deep.fc_identity0.linear.weight, torch.eye(5).double().repeat_interleave(2, 0))


def test_the_pieces_of_an_identity_layer_part_as_they_learn(traced, x):
    deep = surgery.deepen(traced, ["conv1"])
    deep(x).square().sum().backward()
    gradient = deep.conv1_identity0.conv.weight.grad.unflatten(0, (-1, 2))
    assert gradient[:, 0].abs().sum() > 0
    assert gradient[:, 1].abs().sum() == 0


def test_what_was_edited_can_be_edited_again_exported_and_saved(traced, x, tmp_path):
    grown = surgery.widen(surgery.deepen(traced, ["conv1", "conv2", "fc"]), 1.5, seed=1)
    again = surgery.deepen(surgery.widen(grown, 1.3, seed=2), ["conv1"])
    assert surgery.verify(again, traced, x).max_rel <= EXACT
    surgery.save(again, tmp_path / "net")
    loaded = surgery.load(tmp_path / "net", model=Net().double())
    assert surgery.verify(loaded, again, x).max_abs == 0
    surgery.export_onnx(again.float(), tmp_path / "net.onnx")
