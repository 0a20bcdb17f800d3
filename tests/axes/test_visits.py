"""Models whose Python takes one way or another by values: what no run came across holds what it could meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from tests.zoo import randomised

D = torch.float64


class OneOfTwo(nn.Module):
    """One of two layers is called, by what the input holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.p, self.q = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        self.b = nn.Linear(6, 3)

    def forward(self, x):
        way = self.p if float(x.sum()) > 0 else self.q
        return self.b(way(self.a(x).relu()))


class OneOfTwoWeights(OneOfTwo):
    """As `OneOfTwo`, with bare weights."""

    def __init__(self) -> None:
        super().__init__()
        del self.p, self.q
        self.u, self.v = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return self.b(self.a(x).relu() @ (self.u if float(x.sum()) > 0 else self.v))


class Inside(nn.Module):
    """The choice is made in a part; the rest of the model does not see it."""

    def __init__(self, part: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4))
        self.part = part()
        self.last = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))

    def forward(self, x):
        return self.last(self.part(self.first(x)))


@pytest.mark.parametrize("part", [OneOfTwo, OneOfTwoWeights])
@pytest.mark.parametrize("nested", [False, True])
def test_edits_hold_on_the_way_that_was_not_taken(part, nested):
    torch.manual_seed(0)
    net = randomised(Inside(part) if nested else part()).double().eval()
    inputs = [torch.randn(2, 4, dtype=D) for _ in range(8)]
    traced = surgery.trace(net, inputs[0])
    groups = {g.name: g for g in surgery.dimension_groups(traced)}
    assert {name for name, g in groups.items() if g.editable} == ({"first.0", "last.0"} if nested else set())
    assert "is not used on the example inputs, and may be on others" in groups["part.a" if nested else "a"].reason
    moved = surgery.reindex(traced, {g.name: g.permutation(1) for g in groups.values() if g.editable})
    wide, slim = surgery.widen(traced, 2.0), surgery.slim(traced, 0.5)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    for x in inputs:
        for one, other in ((moved, net), (wide, net), (slim, masked)):
            assert torch.allclose(one(x), other(x), atol=1e-12)


def test_a_model_that_uses_everything_is_edited_everywhere():
    class Clipped(OneOfTwo):
        def forward(self, x):
            x = self.a(x).relu()
            scale = 0.5 if float(x.detach().max()) > 1e3 else 1.0
            return self.b(self.p(x) + self.q(x) * scale)

    net, x = randomised(Clipped()).double().eval(), torch.randn(2, 4, dtype=D)
    traced = surgery.trace(net, x)
    assert not isinstance(traced, torch.fx.GraphModule)
    assert {g.name for g in surgery.dimension_groups(traced) if g.editable} >= {"p.0"}
    assert surgery.verify(surgery.widen(traced, 2.0), net, x).ok
