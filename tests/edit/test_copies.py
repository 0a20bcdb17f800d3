"""Shares of a weight add up to it without rounding."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import surgery
from surgery.edit.copies import share_out
from tests.zoo import build_family


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_shares_of_a_weight_sum_to_it_in_exact_arithmetic(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(6, 9, 1, 1, generator=generator) * torch.tensor([1e-3, 1, 50, 1, 1, 1]).view(-1, 1, 1, 1)).to(
        dtype
    )
    weight[3, 2] = 0.0
    old = torch.tensor([*range(9), 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3])
    share = 1.0 / torch.bincount(old)[old].double()
    result = share_out(weight, 1, old, share)
    assert result.dtype == dtype
    for row in range(6):
        for column in range(9):
            copies = [Fraction(v.item()) for v in result[row, old == column, 0, 0]]
            assert sum(copies) == Fraction(weight[row, column, 0, 0].item())
    even = weight.double()[:, old] * share.view(1, -1, 1, 1)
    assert ((result.double() - even).abs() <= 8 * torch.finfo(dtype).eps * weight.double()[:, old].abs()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_between_shares_leaves_their_sum_as_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(5, 6, 1, generator=generator) * torch.tensor([1e-3, 1, 50, 1, 1]).view(-1, 1, 1)).to(dtype)
    weight[3, 1] = 0.0
    old = torch.tensor([*range(6), 0, 1, 1, 2, 2, 2])
    share = 1.0 / torch.bincount(old)[old].double()
    asked = []

    def draw(shape):
        asked.append(torch.randn(shape, generator=generator))
        return asked[-1]

    result = share_out(weight, 1, old, share, draw)
    assert result.dtype == dtype
    assert asked[0].shape == (5, 6, 1)  # all copies but the last of each
    for row in range(5):
        for column in range(6):
            copies = [Fraction(v.item()) for v in result[row, old == column, 0]]
            whole = Fraction(weight[row, column, 0].item())
            assert sum(copies) == whole
            ulp = abs(whole) * Fraction(torch.finfo(dtype).eps)
            assert all(abs(part - whole / len(copies)) <= abs(whole) / len(copies) / 2 + ulp for part in copies[:-1])
    assert (result[:, 0] != result[:, 6]).sum() >= 4


def test_shares_of_either_sign_sum_to_the_weight_too():
    weight = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    old, share = torch.tensor([0, 1, 2, 2, 2]), torch.tensor([1.0, 1.0, -0.4, 0.7, 0.7], dtype=torch.float64)
    result = share_out(weight, 1, old, share)
    assert torch.equal(result[:, 2:].double().sum(1), weight[:, 2].double())
    assert torch.allclose(result[:, 2], -0.4 * weight[:, 2], rtol=1e-6)


def test_uneven_shares_sum_to_the_weight_too():
    weight = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    old, share = torch.tensor([0, 1, 1, 1]), torch.tensor([1.0, 0.2, 0.7, 0.1], dtype=torch.float64)
    result = share_out(weight, 1, old, share).double()
    assert torch.equal(result[:, 1:].sum(1), weight[:, 1].double())
    assert torch.allclose(result[:, 2], 0.7 * weight[:, 1].double(), rtol=1e-6)


def test_a_float32_model_is_widened_exactly_as_float64_shows():
    family = build_family("resnext50_32x4d")
    traced, x = family.traced.float(), family.x
    for factor in (1.3, 2.0, 3.7):
        wide = surgery.widen(traced, factor, seed=1)
        assert surgery.verify(wide, traced, x, dtype=torch.float64).max_rel <= 1e-10
