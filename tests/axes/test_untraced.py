"""Ops whose results have no shape, storage or version of their own: the layers around them are edited all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import surgery

D = torch.float64
EXACT = 1e-10


class Between(nn.Module):
    """Two branches, with something odd before the first."""

    def __init__(self, odd):
        super().__init__()
        self.odd = odd
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).tanh()
        y = (self.a(self.odd(x)) + self.b(x)).mean((2, 3))
        return self.head(self.inner(y).relu())


def score(x):
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(y.pow(3).sum(), y)
    return x * grad


def inference(x):
    with torch.inference_mode(bool(x.sum() > -1e9)):
        y = x.tanh().mul_(2)
    return x * y.clone()


ODD = {
    "autograd.grad": score,
    "a count": lambda x: x * (x > 0).nonzero().shape[0],
    "a mask": lambda x: x * x[x > 0].sum(),
    "distinct values": lambda x: x * torch.unique(x.round()).numel(),
    "inference tensors": inference,
    "vmap": lambda x: torch.func.vmap(torch.tanh)(x),
    "vmap over channels": lambda x: torch.func.vmap(lambda z: z.softmax(-1), in_dims=1, out_dims=1)(x),
    "vmap that mixes channels": lambda x: torch.func.vmap(lambda z: z[:4].repeat(2, 1, 1))(x),
    "func.grad": lambda x: torch.func.grad(lambda z: (z**3).sum())(x),
    "jvp": lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1],
    "a sparse matrix": lambda x: (torch.sparse.mm(torch.eye(36, dtype=x.dtype).to_sparse(),
                                                  x.flatten(2).permute(2, 0, 1).flatten(1))
                                  .view(36, x.shape[0], -1).permute(1, 2, 0).reshape(x.shape)),
}  # fmt: skip


def images(batch):
    return torch.randn(batch, 3, 6, 6, dtype=D, generator=torch.Generator().manual_seed(batch))


def passes(module, x, train):
    """Outputs and the gradient of the input."""
    x = x.clone().requires_grad_()
    y = copy.deepcopy(module).train(train)(x)
    return y.detach(), torch.autograd.grad((y * torch.arange(1.0, 6.0, dtype=D)).sum(), x)[0]


@pytest.mark.parametrize("name", ODD)
def test_layers_around_what_has_no_shape_storage_or_version_are_edited(name):
    torch.manual_seed(0)
    model = Between(ODD[name]).double().eval()
    traced = surgery.trace(model, images(2))
    assert "inner" in {g.name for g in surgery.dimension_groups(traced) if g.editable}
    slim = surgery.slim(traced, 0.5)
    assert slim.inner.out_features == 4
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    pairs = [(surgery.widen(traced, 1.5), model), (surgery.widen(traced, 2.0), model), (slim, masked)]
    for batch in (1, 2, 3):
        for train in (False, True):
            for edited, like in pairs:
                for found, expected in zip(passes(edited, images(batch), train), passes(like, images(batch), train),
                                           strict=True):  # fmt: skip
                    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT * float(expected.abs().max()))


def test_what_python_makes_by_keywords_keeps_them():
    """Tensors of indices, of a dtype that is asked for, in Python that decides by values."""

    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.b(self.a(x).relu())
            if float(x.sum()) > 1e9:
                y = -y
            rows = torch.full((2,), 1, dtype=torch.int64)
            rows = torch.cat([rows, torch.zeros(1, dtype=torch.long)])
            return self.last(y[:, rows].relu())

    model = Picks().double().eval()
    traced = surgery.trace(model, torch.randn(2, 5, 4, dtype=torch.float64))
    slim = surgery.slim(traced, 0.5)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert [slim.get_submodule(name).out_features for name in "ab"] == [3, 3]
    for batch in (1, 3):
        x = torch.randn(batch, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
