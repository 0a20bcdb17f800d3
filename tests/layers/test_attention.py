"""Attention by whole heads: the layers and functions that edited networks compute with, and the edits themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import shifted_window_attention
from torchvision.models.video.swin_transformer import shifted_window_attention_3d

import surgery
from surgery.layers.attention import HeadAttention, windowed_attention

EXACT = 1e-10


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (a - b).abs().max().item() <= EXACT * b.abs().max().item()


# ---- torch.nn.MultiheadAttention

MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False, False, True, True, True]])},
    "padding as numbers": {"key_padding_mask": torch.tensor([[0.0] * 5, [0.0, 0.0, -torch.inf, -3.0, 1.0]]).double()},
    "causal": {"attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(1)},
    "for each head": {"attn_mask": torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0)).double()},
    "both": {
        "attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[False] * 5, [False, True, False, True, True]]),
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "packed no more"])
def test_attention_by_heads_is_the_attention_of_torch(masks, averaged, layout):
    torch.manual_seed(0)
    sizes = {"kdim": 7, "vdim": 9} if layout == "packed no more" else {}
    first = layout != "sequence first"
    plain = nn.MultiheadAttention(12, 3, batch_first=first, **sizes).double()
    plain.in_proj_bias.data.normal_()
    own = copy.deepcopy(plain)
    own.__class__ = HeadAttention
    tensors = [
        torch.randn(2, n, d).double() for n, d in ((4, 12), (5, sizes.get("kdim", 12)), (5, sizes.get("vdim", 12)))
    ]
    if not first:
        tensors = [t.transpose(0, 1) for t in tensors]
    for got, wanted in zip(
        own(*tensors, **MASKS[masks], average_attn_weights=averaged),
        plain(*tensors, **MASKS[masks], average_attn_weights=averaged),
        strict=True,
    ):
        assert close(got, wanted)


def test_attention_by_heads_takes_sequences_without_a_batch():
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2).double()
    own = copy.deepcopy(plain)
    own.__class__ = HeadAttention
    x, y = torch.randn(4, 8).double(), torch.randn(5, 8).double()
    for got, wanted in zip(own(x, y, y), plain(x, y, y), strict=True):
        assert close(got, wanted)


class Attending(nn.Module):
    def __init__(self, heads: int, **options: object) -> None:
        super().__init__()
        self.options = options
        self.a = nn.Linear(5, 12)
        self.attention = nn.MultiheadAttention(12, heads, batch_first=True, bias=bool(options.get("bias", True)))
        self.b = nn.Linear(12, 4)

    def forward(self, x):
        y = self.a(x)
        mixed, weights = self.attention(y, y, y, average_attn_weights=self.options.get("average", True))
        return (self.b(mixed), weights) if self.options.get("weights") else self.b(mixed)


def attending(heads: int, **options: object):
    torch.manual_seed(0)
    net = Attending(heads, **options).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    return surgery.trace(net, x), x


@pytest.mark.parametrize("bias", [True, False])
def test_heads_are_cut_copied_and_moved_as_a_whole(bias):
    traced, x = attending(4, bias=bias)
    group = next(g for g in surgery.dimension_groups(traced) if g.name == "attention")
    assert (group.size, group.units) == (36, 4)
    moved = surgery.reindex(traced, {"attention": [2, 0, 3, 1]})
    assert surgery.verify(moved, traced, x).max_rel <= EXACT
    more = surgery.reindex(traced, {"attention": [0, 1, 2, 3, 2, 2]})
    assert more.get_submodule("attention").num_heads == 6
    assert more.get_parameter("attention.out_proj.weight").shape == (12, 18)
    assert surgery.verify(more, traced, x).max_rel <= EXACT
    fewer = surgery.slim(traced, 0.5)
    assert fewer.get_parameter("attention.in_proj_weight").shape == (3 * 2 * 3, 6)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.verify(fewer, masked, x).max_rel <= EXACT
    assert surgery.verify(surgery.widen(fewer, 2.0), fewer, x).max_rel <= EXACT


def test_an_attention_that_torch_can_express_stays_one_of_torch():
    traced, _ = attending(4)
    assert type(surgery.slim(traced, 0.5).get_submodule("attention")) is nn.MultiheadAttention
    odd = surgery.reindex(traced, {"attention": [0, 1, 2]})
    assert type(odd.get_submodule("attention")) is HeadAttention
    assert type(surgery.reindex(odd, {"attention": [0, 1, 2, 2]}).get_submodule("attention")) is nn.MultiheadAttention


def test_heads_are_not_cut_where_their_mean_is_an_output():
    traced, x = attending(4, weights=True)
    heads = next(g for g in surgery.dimension_groups(traced) if g.name == "attention")
    assert not heads.editable
    assert "averages over it" in heads.reason
    assert surgery.verify(surgery.widen(traced, 2.0), traced, x).max_rel <= EXACT


def test_an_edited_attention_is_saved_exported_and_trained(tmp_path):
    traced, x = attending(4)
    odd = surgery.reindex(traced, {"attention": [0, 1, 2]})
    surgery.save(odd, tmp_path / "odd")
    again = surgery.load(tmp_path / "odd", model=Attending(4).double())
    assert surgery.verify(again, odd, x).max_abs == 0
    odd.train()(x).sum().backward()
    assert all(p.grad is not None for p in odd.parameters())
    surgery.export_onnx(odd.float().eval(), tmp_path / "odd.onnx")


# ---- torchvision's windowed attention


def windowed(rank: int, logit_scale: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tokens = (2**rank) * 2 ** (rank == 2)
    result = {
        "qkv_weight": random(36, 12),
        "proj_weight": random(12, 12),
        "relative_position_bias": random(1, 3, tokens, tokens),
        "qkv_bias": random(36),
        "proj_bias": random(12),
    }
    return result | ({"logit_scale": random(3, 1, 1)} if logit_scale else {})


@pytest.mark.parametrize("logit_scale", [False, True])
@pytest.mark.parametrize("shift", [[0, 0], [1, 2], [1, 0], [0, 1]])
@pytest.mark.parametrize("size", [(4, 8), (5, 7), (2, 9), (1, 3), (6, 4)])
def test_windowed_attention_is_that_of_torchvision(size, shift, logit_scale):
    x = torch.randn(2, *size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = windowed(2, logit_scale)
    options = {"window_size": [2, 4], "num_heads": 3, "shift_size": shift}
    wanted = shifted_window_attention(x, **given, **options, training=False)
    got = windowed_attention(x, **given, **options, training=False, head_dim=4)
    assert close(got, wanted)


@pytest.mark.parametrize("shift", [[0, 0, 0], [1, 1, 1], [1, 0, 1]])
@pytest.mark.parametrize("size", [(4, 4, 6), (3, 5, 4)])
def test_windowed_attention_is_that_of_torchvision_in_3d(size, shift):
    x = torch.randn(2, *size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = windowed(3, False)
    options = {"window_size": [2, 2, 2], "num_heads": 3, "shift_size": shift}
    wanted = shifted_window_attention_3d(x, **given, **options, training=False)
    got = windowed_attention(x, **given, **options, training=False, head_dim=4)
    assert close(got, wanted)


def test_windowed_attention_draws_the_same_random_numbers_in_training():
    x = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    given = windowed(2, False)
    options = {"window_size": [2, 4], "num_heads": 3, "shift_size": [1, 2], "attention_dropout": 0.3, "dropout": 0.2}
    torch.manual_seed(3)
    wanted = shifted_window_attention(x, **given, **options, training=True)
    torch.manual_seed(3)
    assert close(windowed_attention(x, **given, **options, training=True, head_dim=4), wanted)
