"""Axes that factor one: a linear layer's outputs seen as a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery.axes.factored import settle
from surgery.axes.ledger import Findings, Grid


class Generator(nn.Module):
    """A decoder: each channel of the map is a run of the linear layer's outputs."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.a, self.norm, self.b = nn.Linear(6, 16 * 4), nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 8, 2)
        self.unflatten, self.c = nn.Unflatten(1, (16, 2, 2)), nn.Conv2d(8, 12, 2)
        self.d = nn.Linear(12 * 4, 5)

    def forward(self, z):
        z = self.a(z)
        if self.spelling == "view":
            x = z.view(-1, 16, 2, 2)
        elif self.spelling == "module":
            x = self.unflatten(z)
        elif self.spelling == "size":
            x = z.reshape(z.size(0), z.size(1) // 4, 2, 2)
        else:
            x = z.view(-1, 4, 16).transpose(1, 2).unflatten(-1, (2, 2))  # channels last
        return self.d(self.c(self.b(self.norm(x).relu()).relu()).flatten(1))


@pytest.mark.parametrize("spelling", ["view", "module", "size", "channels last"])
def test_a_linear_layer_viewed_as_a_map_is_edited_channel_by_channel(spelling):
    model = Generator(spelling).double().eval()
    model.norm.running_var.uniform_(0.5, 2.0)
    traced = surgery.trace(model, torch.rand(2, 6, dtype=torch.float64))
    groups = {group.name: group for group in surgery.dimension_groups(traced)}
    assert groups["a"].units == 16
    assert groups["a"].editable
    permuted = surgery.reindex(traced, {name: g.permutation(0) for name, g in groups.items() if g.editable})
    slim, wide = surgery.slim(traced, 0.5), surgery.widen(traced, 2.0)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert slim.a.out_features == 32
    for batch in (1, 2, 3):
        z = torch.rand(batch, 6, dtype=torch.float64)
        torch.testing.assert_close(permuted(z), model(z), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(slim(z), masked(z), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(wide(z), model(z), rtol=1e-10, atol=1e-14)


def test_axes_of_which_neither_must_stay_are_settled_in_an_array_that_is_closed():
    ids = np.arange(8).reshape(2, 4).copy()
    grid = Grid(ids[:], "view")
    ids.flags.writeable = False  # as the analysis hands its arrays on
    assert settle(Findings(count=8), [grid]).component.reshape(2, 4).tolist() == [[0, 1, 2, 3]] * 2
