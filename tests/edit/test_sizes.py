"""Sizes that a network reads from its own values: after an edit they are right at any batch size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

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


@pytest.mark.parametrize("asked", [{"dim": 1}, {"dim": -3}], ids=str)
def test_a_size_may_be_asked_for_by_name(asked):
    class Averaged(nn.Module):
        """Divided by the number of its channels."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.a(x).tanh()
            return self.b(y) / y.size(**asked)

    model = Averaged().double().eval()
    x = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    traced = surgery.trace(model, x[:2])
    wide, slim = surgery.widen(traced, 2.0), surgery.slim(traced, 0.5)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert slim.get_submodule("a").out_channels == 4
    torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=0)
    torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)


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


def window_sizes(net, x):
    """As the original Swin's ``window_reverse`` does."""
    x = net.stem(x).permute(0, 2, 3, 1)
    _, h, w, c = x.shape
    x = x.view(-1, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 2, 2, c)
    x = net.mix(x)
    b = int(x.shape[0] / (h * w / 2 / 2))
    x = x.view(b, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
    return net.head(x.mean((1, 2)))


def head_widths(net, x):
    x = net.stem(x).flatten(2).transpose(1, 2)
    b, n, c = x.shape
    x = net.mix(x)
    heads = x.reshape(b, n, 4, int(c / 4)).transpose(1, 2)
    x = (heads @ heads.transpose(-1, -2) / round(n / 3)).softmax(-1) @ heads
    return net.head(x.transpose(1, 2).reshape(b, n, int(c // 4 * 4.0)).mean(1))


def image_sizes(net, x):
    y = net.stem(x)
    size = int(y.shape[2] * 1.5), round(y.shape[3] / 2)
    y = F.interpolate(y, size=size) * float(x.shape[2]) ** -0.5 * round(x.shape[3] / 3, 1)
    if not isinstance(size[0], int) or int("2") != 2 or int.from_bytes(b"a", "big") != 97:
        y = y * 0
    for _ in range(int(2.9)):
        y = net.mix(y.transpose(1, 3)).transpose(1, 3)
    return net.head(y.mean((2, 3)))


def halves(net, x):
    y = net.mix(net.stem(x).permute(0, 2, 3, 1))
    a, b = torch.split(y, int(y.shape[-1] * 0.5), -1)
    return net.head(torch.cat((a * b.sigmoid(), y[..., : int(y.size(-1) / 2)]), -1).mean((1, 2)))


class Sized(nn.Module):
    """A network whose Python makes integers of sizes."""

    def __init__(self, between) -> None:
        super().__init__()
        self.between = between
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.between(self, x)


@pytest.mark.parametrize("between", [window_sizes, head_widths, image_sizes, halves])
def test_integers_that_python_makes_of_sizes_follow_batch_and_image(between):
    model = Sized(between).double().eval()
    traced = surgery.trace(model, torch.rand(2, 3, 8, 8, dtype=torch.float64))
    assert isinstance(traced, fx.GraphModule)
    slim, wide = surgery.slim(traced, 0.5), surgery.widen(traced, 2.0)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.cost(slim).params < 0.6 * surgery.cost(traced).params
    for shape in ((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 12, 8), (2, 3, 8, 14)):
        x = torch.rand(shape, dtype=torch.float64)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-12, atol=0)
        torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
        torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=0)
    assert "int" not in globals()
    assert "round" not in globals()


def test_a_number_that_decides_how_often_something_runs_is_still_guarded():
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(int(x.shape[1] / 2)):
                x = self.a(x)
            return x

    traced = surgery.trace(Repeated(), torch.rand(2, 6, 4))
    assert traced(torch.rand(3, 6, 4)).shape == (3, 6, 4)
    with pytest.raises(surgery.UsageError, match="the value is 4 here and was 3 when the model was traced"):
        traced(torch.rand(2, 8, 4))
