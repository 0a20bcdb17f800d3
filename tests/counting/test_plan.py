"""A plan says what an edit gives, to the last parameter and multiply-accumulate, without making it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery import models as catalogue
from surgery.axes.analysis import analyse
from surgery.counting.planned import planned_cost
from tests.zoo import FAMILIES, build_family, traced_of


class Mixer(nn.Module):
    """A layer along the positions is used once for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.along, self.across = nn.Linear(6, 8), nn.Linear(5, 7), nn.Linear(8, 4)

    def forward(self, x):
        return self.across(self.along(self.stem(x).transpose(1, 2)).relu().transpose(1, 2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mha, self.head = nn.Linear(6, 8), nn.MultiheadAttention(8, 4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.mha(x, x, x)[0]
        scores = torch.einsum("bnc,bmc->bnm", x, x).softmax(-1)
        return self.head(scores @ x)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.up = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.depth, self.b = nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.b(self.depth(self.up(self.norm(self.a(x)).relu())))


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(self.norm(torch.cat([self.a(x), self.b(x)], -1)))


class Recurrent(nn.Module):
    """The shapes of its states do not say how often its weights are used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b = nn.Linear(6, 8), nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(self.lstm(self.a(x))[0])


def check(traced, step, planned):
    made = surgery.apply(traced, step)
    assert planned.cost == surgery.cost(made)
    assert (planned.macs, planned.params, planned.bytes) == tuple(planned.cost.to_dict().values())
    assert dict(planned.shapes) == {
        name: tuple(t.shape) for name, t in (*made.named_parameters(), *made.named_buffers())
    }
    assert planned.cost != surgery.cost(traced)


@pytest.fixture(params=[Mixer, Attention, Decoder])
def traced(request):
    return traced_of(request.param, *((2, 3, 8, 8) if request.param is Decoder else (2, 5, 6)))[0]


@pytest.mark.parametrize("rate", [0.5, 0.3, {"*": 0.75}])
def test_a_plan_is_what_slim_gives(traced, rate):
    assert planned_cost(traced, analyse(traced)).known
    planned = surgery.plan(traced, rate)
    check(traced, planned.step, planned)
    assert surgery.verify(surgery.apply(traced, planned.step), surgery.slim(traced, rate)).max_abs == 0


def test_copies_are_planned_as_reindex_makes_them(traced):
    group = next(g for g in surgery.dimension_groups(traced) if g.editable and not g.single)
    planned = surgery.plan(traced, {group.name: [*range(group.units), *range(group.units)]})
    check(traced, planned.step, planned)


def test_many_plans_are_those_of_each(traced):
    rates = [0.75, 0.5, 0.25]
    assert list(surgery.plans(traced, rates)) == [surgery.plan(traced, rate) for rate in rates]


def test_what_no_formula_is_for_is_counted_when_made():
    traced, _ = traced_of(Recurrent, 2, 5, 6)
    assert not planned_cost(traced, analyse(traced)).known
    planned = surgery.plan(traced, 0.5)
    check(traced, planned.step, planned)


def test_a_plan_touches_no_weights(traced):
    ghost = traced.to("meta")
    assert surgery.plan(ghost, 0.5).params < sum(p.numel() for p in ghost.parameters())


def test_magnitude_and_rounding_are_planned(traced):
    planned = surgery.plan(traced, 0.3, round_to=2, importance="magnitude")
    check(traced, planned.step, planned)
    assert planned.step == surgery.recipe(surgery.slim(traced, 0.3, round_to=2, importance="magnitude")).steps[-1]


def test_what_cannot_be_is_refused(traced):
    group = next(g for g in surgery.dimension_groups(traced) if g.editable)
    with pytest.raises(surgery.UsageError, match="outside"):
        surgery.plan(traced, {group.name: [0, group.units]})
    with pytest.raises(surgery.UsageError, match="split rate"):
        surgery.plan(traced, 1.5)


def test_an_index_that_no_edit_can_have_has_no_plan():
    """Of a concatenation that a norm reads, all of one part is copied and nothing of the other."""
    traced, _ = traced_of(Joined, 2, 6)
    with pytest.raises(surgery.EditError, match="every unit needs the same number of copies"):
        surgery.plan(traced, {"a": [0, 1, 2, 3] * 2})


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large"])
def test_a_detector_is_counted_when_made(name):
    source = catalogue.CATALOGUE[name].small_source
    model = catalogue.build(source, seed=0).eval()
    traced = surgery.trace(model, catalogue.small_inputs(name), source=source)
    assert not planned_cost(traced, analyse(traced)).known
    planned = surgery.plan(traced, 0.5)
    check(traced, planned.step, planned)


def test_it_says_what_it_is():
    traced, _ = traced_of(Decoder, 2, 3, 8, 8)
    assert "MACs an input" in str(surgery.plan(traced, 0.5))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_planned_to_the_last_mac(name):
    traced = build_family(name).traced
    planned = surgery.plan(traced, 0.5)
    made = surgery.cost(surgery.apply(traced, planned.step))
    assert (planned.macs, planned.params) == (made.macs, made.params)
    added = made.bytes - planned.bytes  # the positions of a shuffle that became a selection
    assert added >= 0
    assert added % 8 == 0
