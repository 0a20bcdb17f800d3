"""Data movement that an edit outgrows: pieces of unequal sizes become selections, at any batch size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery


class PackedKeysAndValues(nn.Module):
    """Attention of ``heads`` heads with keys and values in one layer, as in PVT v2. Of one head the keys keep their
    width, which sets the scale, and the values do not: the two halves are no longer of one size."""

    def __init__(self, heads: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.spelling = heads, spelling
        self.embed, self.q, self.kv = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x)
        b, n, _ = x.shape
        h = self.heads
        q = self.q(x).reshape(b, n, h, 8 // h).permute(0, 2, 1, 3)
        kv = self.kv(x)
        if self.spelling == "unbind":
            k, v = kv.reshape(b, n, 2, h, 8 // h).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.spelling == "index":
            kv = kv.reshape(b, -1, 2, h, 8 // h).permute(2, 0, 3, 1, 4)
            k, v = kv[0], kv[1]
        else:
            k, v = (part.reshape(b, n, h, 8 // h).transpose(1, 2) for part in kv.chunk(2, -1))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 8)
        return self.head(self.out(x).relu())


@pytest.mark.parametrize("traced_batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("spelling", ["unbind", "index", "chunk"])
def test_packed_keys_and_values_are_edited_for_every_batch_size(spelling, heads, traced_batch):
    model = PackedKeysAndValues(heads, spelling).double().eval()
    traced = surgery.trace(model, torch.rand(traced_batch, 6, 3, dtype=torch.float64))
    slim, wide = surgery.slim(traced, 0.5), surgery.widen(traced, 2.0)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert slim.kv.weight.numel() < traced.kv.weight.numel()
    for batch in (1, 2, 3):
        x = torch.rand(batch, 6, 3, dtype=torch.float64)
        torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
        torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=0)


class Halves(nn.Module):
    """Channels in two halves, flattened with positions, and put back."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.between = between
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(self.between(x.unflatten(1, (2, -1)).flatten(1)).view(x.shape))


def test_channels_that_are_flattened_with_positions_on_the_way_take_any_order_and_copies():
    model = Halves().double().eval()
    traced = surgery.trace(model, torch.rand(2, 3, 6, 6, dtype=torch.float64))
    (group,) = (g for g in surgery.dimension_groups(traced) if g.name == "a")
    edits = [surgery.reindex(traced, {"a": group.permutation(1)}), surgery.widen(traced, 1.5), surgery.widen(traced, 2)]
    assert edits[1].a.out_channels == 12
    for batch, size in ((1, 6), (2, 6), (3, 4)):
        x = torch.rand(batch, 3, size, size, dtype=torch.float64)
        for edited in edits:
            torch.testing.assert_close(edited(x), model(x), rtol=1e-10, atol=1e-12)


def test_an_order_that_flattened_channels_cannot_take_is_refused_where_they_are_read():
    traced = surgery.trace(Halves(torch.relu).double(), torch.rand(2, 3, 6, 6, dtype=torch.float64))
    with pytest.raises(surgery.EditError, match=r"^flatten \(flatten.*cannot follow the edit: it is not a selection"):
        surgery.reindex(traced, {"a": [0, 1, 7, 5, 6, 3, 2, 4]})
