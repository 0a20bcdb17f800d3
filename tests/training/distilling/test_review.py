"""ReviewKD's fusion: the student's maps in the teacher's shapes, computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import UsageError
from surgery.training.distilling.review import Review


def maps(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


OURS, THEIRS = [(4, 16, 12), (6, 8, 6), (5, 1, 1)], [(7, 8, 6), (3, 5, 4), (9, 1, 1)]


def review(seed: int = 0) -> Review:
    return Review([c for c, _, _ in OURS], THEIRS, seed).double()


def normed(conv: Tensor) -> Tensor:
    mean, variance = conv.mean((0, 2, 3), keepdim=True), conv.var((0, 2, 3), keepdim=True, unbiased=False)
    return (conv - mean) / (variance + 1e-5).sqrt()


def test_maps_come_out_in_the_teachers_shapes_shallow_to_deep():
    for sizes in (OURS, [(4, 20, 9), (6, 7, 7), (5, 2, 2)]):
        assert [tuple(t.shape) for t in review()(*maps(*sizes))] == [(2, *shape) for shape in THEIRS]


def test_each_level_is_mixed_with_the_result_of_the_deeper_ones():
    module, (shallow, middle, deep) = review(), maps(*OURS)
    first, second, third = module.levels
    mixed = normed(F.conv2d(deep, third.narrow[0].weight))
    expected = [normed(F.conv2d(mixed, third.widen[0].weight, padding=1))]
    for level, value, size in ((second, middle, (5, 4)), (first, shallow, (8, 6))):
        own = normed(F.conv2d(value, level.narrow[0].weight))
        rows, columns = (
            torch.arange(n) * m // n for n, m in zip(own.shape[2:], mixed.shape[2:], strict=True)
        )  # nearest neighbours
        deeper = mixed[:, :, rows][:, :, :, columns]
        weight, bias = level.attention[0].weight[:, :, 0, 0], level.attention[0].bias
        both = torch.einsum("oc,nchw->nohw", weight, torch.cat([own, deeper], 1)) + bias[:, None, None]
        gates = 1 / (1 + (-both).exp())
        mixed = gates[:, :1] * own + gates[:, 1:] * deeper
        rows, columns = (torch.arange(n) * m // n for n, m in zip(size, mixed.shape[2:], strict=True))
        mixed = mixed[:, :, rows][:, :, :, columns]
        expected.insert(0, normed(F.conv2d(mixed, level.widen[0].weight, padding=1)))
    for found, wanted in zip(module(shallow, middle, deep), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_deeper_levels_teach_shallower_ones_and_all_weights_learn():
    module, given = review(), maps(*OURS)
    for value in given:
        value.requires_grad_()
    module(*given)[0].square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in given[:2])
    module.zero_grad()
    sum(out.square().sum() for out in module(*given)).backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


def test_the_width_is_that_of_the_deepest_map_up_to_512():
    assert review().levels[0].narrow[0].weight.shape == (5, 4, 1, 1)
    wide = Review([4, 600], [(3, 2, 2), (3, 1, 1)])
    assert [level.narrow[0].out_channels for level in wide.levels] == [512, 512]
    assert [level.attention is None for level in wide.levels] == [False, True]


def test_weights_come_from_the_seed_alone():
    state = torch.get_rng_state()
    one, two, three = (review(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["levels.0.narrow.0.weight"], three["levels.0.narrow.0.weight"])


@pytest.mark.parametrize(("channels", "shapes"), [([4], []), ([], []), ([4, 5], [(3, 2, 2)])])
def test_unequal_numbers_of_maps_are_refused(channels, shapes):
    with pytest.raises(UsageError) as raised:
        Review(channels, shapes)
    assert str(raised.value) == (
        f"{len(channels)} maps of the student and {len(shapes)} of the teacher: pass equal numbers, at least 1"
    )
