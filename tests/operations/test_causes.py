"""What used to leave channels alone (`tests.causes`): permuted, widened and slimmed exactly, and again."""

from __future__ import annotations

import pytest
import torch

import surgery
from tests.causes import CAUSES, over_channels
from tests.zoo import traced_of

EXACT = 1e-10


def hold(traced, x):
    """Permuted and widened it computes the same, and slimmed what it computes with the rest switched off."""
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    slim, dense = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    pairs = [
        (surgery.reindex(traced, {g.name: g.permutation(seed=1) for g in groups}), traced),
        (surgery.widen(traced, 1.5, seed=1), traced),
        (surgery.widen(traced, 2.0), traced),
        (slim, dense),
    ]
    for edited, reference in pairs:
        check = surgery.verify(edited, reference, x, train=True)
        assert not check.problem
        assert check.batches == 2
        assert check.gradients
        assert max(check.max_rel, check.max_grad) <= EXACT
    return slim


@pytest.mark.parametrize("name", CAUSES)
def test_it_is_edited_exactly_and_can_be_edited_again(name):
    make, shape, editable = CAUSES[name]
    traced, x = traced_of(make, *shape)
    assert {g.name for g in surgery.dimension_groups(traced) if g.editable} >= set(editable.split())
    slim = hold(traced, x)
    sizes = [{g.name: g.size for g in surgery.dimension_groups(net)} for net in (slim, traced)]
    assert all(sizes[0][name] < sizes[1][name] for name in editable.split())
    hold(slim, x)
    hold(surgery.widen(traced, 2.0), x)


@pytest.mark.parametrize("name", ["rms", "spread", "lengths", "grouped queries: expand", "packed: unbind"])
def test_it_is_saved_and_loaded(name, tmp_path):
    make, shape, _ = CAUSES[name]
    traced, x = traced_of(make, *shape)
    for edited in (surgery.slim(traced, 0.5), surgery.widen(traced, 2.0)):
        surgery.save(edited, tmp_path / "saved", force=True)
        loaded = surgery.load(tmp_path / "saved", model=make().double())
        assert surgery.verify(loaded, edited, x).max_rel <= EXACT


def test_the_positions_of_a_maximum_over_channels_stay():
    def numbered(net, x):
        return x * x.max(1, keepdim=True)[1]

    traced, _ = traced_of(over_channels(numbered), 2, 3, 6, 6)
    group = next(g for g in surgery.dimension_groups(traced) if g.name == "write")
    assert not group.editable
    assert group.reason == "max numbers its positions"


def test_a_maximum_may_be_taken_apart_if_its_positions_are_not_read():
    def unpacked(net, x):
        values, _ = x.max(1, keepdim=True)
        return x * values

    traced, x = traced_of(over_channels(unpacked), 2, 3, 6, 6)
    hold(traced, x)
    assert surgery.slim(traced, 0.5).write.out_channels == 4


def test_a_mean_over_channels_refuses_copies_in_unequal_numbers():
    traced, _ = traced_of(CAUSES["rms"][0], *CAUSES["rms"][1])
    with pytest.raises(surgery.EditError, match="every unit needs the same number of copies"):
        surgery.reindex(traced, {"write": [0, 0, *range(1, 8)]})
    assert surgery.widen(traced, {"write": 16}).write.out_channels == 16
    with pytest.raises(surgery.EditError, match="only whole factors are exact"):
        surgery.widen(traced, {"write": 12})


def test_torch_sees_the_mean_of_the_channels_that_are_left():
    traced, x = traced_of(CAUSES["layer_norm"][0], *CAUSES["layer_norm"][1])
    slim = surgery.slim(traced, 0.5)
    kept = torch.nn.functional.conv2d(x, traced.write.weight[:4], traced.write.bias[:4]).tanh() + 0.3
    y = torch.nn.functional.layer_norm(kept.permute(0, 2, 3, 1), (4,), traced.scale[:4]).permute(0, 3, 1, 2)
    y = torch.nn.functional.conv2d(y, traced.read.weight[:3, :4], traced.read.bias[:3]).tanh().mean((2, 3))
    torch.testing.assert_close(slim(x), y @ traced.head.weight[:, :3].T + traced.head.bias)
