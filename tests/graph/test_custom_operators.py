"""Operators that somebody registered with torch: their axes stay, and what is before and behind them can be edited."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import surgery


@torch.library.custom_op("surgery_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    """Nobody says what it does to shapes."""
    return x * 3


@torch.library.custom_op("surgery_tests::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    """The shape depends on the data."""
    return x[x > 0]


@torch.library.custom_op("surgery_tests::triple_", mutates_args=("x",))
def triple_(x: torch.Tensor) -> torch.Tensor:
    """Works in place, and gives something as well."""
    x.mul_(3)
    return x.sum()


LOW = torch.library.Library("surgery_tests_low", "DEF")
LOW.define("shifted(Tensor x) -> Tensor")
LOW.impl("shifted", lambda x: x + 1, "CPU")


class Around(nn.Module):
    """Layers on both sides of an operator."""

    def __init__(self, operator) -> None:
        super().__init__()
        self.operator = operator
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)
        self.d, self.e = nn.Conv2d(6, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.operator(self.b(self.a(x)))
        return self.e(self.d(self.c(x).relu()).mean((2, 3)))


def by_definition(x):
    return triple(x)


def by_name(x):
    return torch.ops.surgery_tests.triple(x)


def without_kernel(x):
    return torch.ops.surgery_tests_low.shifted(x)


@pytest.mark.parametrize("operator", [by_definition, by_name, without_kernel])
def test_an_operator_without_a_fake_is_left_alone_and_its_surroundings_edited(operator, tmp_path):
    model = Around(operator).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    traced = surgery.trace(model, x)
    assert isinstance(traced, fx.GraphModule)
    slim, wide = surgery.slim(traced, 0.5), surgery.widen(traced, 2.0)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert (slim.a.out_channels, slim.b.out_channels, slim.c.out_channels, slim.d.out_channels) == (4, 8, 3, 4)
    surgery.save(slim, tmp_path / "slim")
    loaded = surgery.load(tmp_path / "slim", model=model)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
        torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=0)
        assert torch.equal(loaded(x), slim(x))
    macs = surgery.cost(slim).macs
    assert macs == 36 * 3 * 4 + 16 * (36 * 8 + 8 * 3 + 3 * 4) + 4 * 4


def test_an_operator_that_multiplies_has_to_have_a_formula():
    class Weighted(Around):
        def forward(self, x):
            return super().forward(x) + triple(self.e.weight).sum()

    with pytest.raises(surgery.UsageError, match="cannot count the MACs of surgery_tests::triple"):
        surgery.cost(Weighted(nn.Identity()), torch.rand(1, 3, 6, 6))


def test_a_shape_that_depends_on_the_data_leaves_python_as_it_is():
    model = Around(lambda x: x * positive(x.detach()).mean()).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    traced = surgery.trace(model, x)
    assert not isinstance(traced, fx.GraphModule)
    torch.testing.assert_close(traced(x), model(x))


def test_an_operator_without_a_fake_that_writes_says_what_it_needs():
    def write(x):
        x = x * 1
        triple_(x)
        return x

    traced = surgery.trace(Around(write), torch.randn(2, 3, 6, 6))
    with pytest.raises(surgery.SurgeryError, match=r"surgery_tests::triple_ writes .*torch\.library\.register_fake"):
        surgery.slim(traced, 0.5)


def test_gradients_that_forward_computes_leave_python_as_it_is():
    class Descending(Around):
        def forward(self, x):
            with torch.enable_grad():
                self.a(x.detach()).square().sum().backward()
            return super().forward(x)

    model = Descending(nn.Identity()).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    traced = surgery.trace(model, x)
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
    slim(x)
    assert bool(slim.a.weight.grad.any())
