"""Sizes that a network reads from its own values: after an edit they are right at any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery


class FoldedHeads(nn.Module):
    """Four heads folded into the batch, in one of several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.stem, self.q, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        b, _, h, w = x.shape
        q = self.q(self.stem(x)).reshape(b * 4, 4, h * w).transpose(1, 2)  # (b * heads, positions, head_dim)
        if self.spelling == "shape[0]":
            q = q.reshape(q.shape[0], 4, 4, -1)
        elif self.spelling == "size(0)":
            q = q.reshape(q.size(0), 4, 4, -1)
        elif self.spelling == "unpacked":
            folded, positions, depth = q.shape
            q = q.view(folded, positions // 4, 4, depth)
        elif self.spelling == "sequence first":
            q = q.transpose(0, 1)
            q = q.reshape(q.shape[0], q.shape[1], -1).transpose(0, 1).reshape(-1, 4, 4, 4)
        elif self.spelling == "numel":
            q = q.reshape(q.numel() // 64, 4, 4, 4)
        elif self.spelling == "whole shape":
            q = (q * 2).reshape(q.shape).unflatten(1, (4, 4))
        elif self.spelling == "quotient":
            q = q.reshape(q.shape[0] // 4, 4, 16, -1).reshape(b * 4, 4, 4, -1)
        return self.out(q.permute(0, 3, 1, 2).reshape(b, 16, h, w))


SPELLINGS = ["shape[0]", "size(0)", "unpacked", "sequence first", "numel", "whole shape", "quotient"]


@pytest.mark.parametrize("traced_batch", [1, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_heads_folded_into_the_batch_are_edited_for_every_batch_size(spelling, traced_batch):
    model = FoldedHeads(spelling).double().eval()
    traced = surgery.trace(model, torch.rand(traced_batch, 3, 4, 4, dtype=torch.float64))
    slim, wide = surgery.slim(traced, 0.5), surgery.widen(traced, 2.0)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.cost(slim).params < surgery.cost(traced).params
    for batch in (1, 2, 3):
        x = torch.rand(batch, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
        torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=0)


class Cards(nn.Module):
    """Channels counted by the network itself, in whole and in part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        b, c, h, w = x.shape
        return self.b(x.reshape(b, c // 2, 2, h, w).flatten(1, 2)) / c


def test_a_size_that_weights_give_stays_a_number_in_the_graph():
    traced = surgery.trace(Cards().eval(), torch.rand(2, 3, 4, 4))
    slim = surgery.slim(traced, 0.5)
    assert "floordiv(mul" not in slim.code.replace(" ", "")
    assert " / 8" in slim.code


def test_attention_that_python_calls_follows_an_edit_of_its_heads_alone():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, x):
            x = self.a(x)
            if float(x.detach().sum()) > 1e9:
                x = x * 2
            return self.b(self.attention(x, x, x)[0])

    model = Branching().double().eval()
    traced = surgery.trace(model, torch.rand(2, 5, 4, dtype=torch.float64))
    wide = surgery.widen(traced, {"attention": 2.0})
    slim = surgery.slim(traced, {"attention": 0.5})
    masked = surgery.masked(traced, surgery.split_masks(traced, {"attention": 0.5}))
    assert slim.attention.num_heads == 2
    for batch in (1, 3):
        x = torch.rand(batch, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=0)
        torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
