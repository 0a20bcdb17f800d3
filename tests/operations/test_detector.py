"""A one-stage detector (`tests.detector`): split blocks, pooled context and boxes as distributions, edited exactly."""

from __future__ import annotations

import pytest
import torch

import surgery
from tests.detector import BINS, Detector
from tests.switched_off import find_sources, run, run_switched_off
from tests.zoo import randomised

EXACT = 1e-10


def build(how: str = "chunk") -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(Detector(how=how)).double().eval()


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


def hold(edited: torch.nn.Module, reference: torch.nn.Module, x: torch.Tensor | None = None) -> None:
    """In evaluation the boxes, in training the raw maps and the gradients, at two batch sizes."""
    for train in (False, True):
        check = surgery.verify(edited, reference, images(2) if x is None else x, train=train)
        assert not check.problem
        assert check.batches == 2
        assert max(check.max_rel, check.max_grad) <= EXACT


@pytest.fixture(scope="module", params=["chunk", "split"])
def nets(request):
    net = build(request.param)
    return net, surgery.trace(net, images(2))


def test_it_is_traced_whole_and_only_what_the_head_says_is_left_alone(nets):
    net, traced = nets
    assert isinstance(traced, torch.fx.GraphModule)
    hold(traced, net)
    hold(surgery.slim(traced, 1.0), net, images(1).transpose(2, 3).contiguous())
    frozen = {g.name: g.reason for g in surgery.dimension_groups(traced) if not g.editable}
    heads = {f"head.{branch}.{level}.2" for branch in ("boxes", "kinds") for level in range(3)}
    assert set(frozen) <= {"input of stem.0", "input of head.distances.expect", "head.distances.expect", *heads}
    assert traced.head.distances.expect.weight.flatten().tolist() == list(range(BINS))


def test_it_is_permuted_widened_and_deepened_exactly(nets):
    net, traced = nets
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    hold(surgery.reindex(traced, {g.name: g.permutation(seed=1) for g in groups}), net)
    hold(surgery.widen(traced, 1.5, seed=1), net)
    hold(surgery.widen(traced, 2.0), net)
    deep = surgery.deepen(traced, {"stage2": 1, "bottom2": 1})
    assert sum(p.numel() for p in deep.parameters()) > sum(p.numel() for p in net.parameters())
    for train in (False, True):
        assert surgery.verify(deep.train(train), net.train(train), images(2)).max_rel <= EXACT
    net.eval()


def test_it_is_slimmed_to_a_quarter_and_equals_itself_without_the_rest(nets):
    net, traced = nets
    slim, kept = find_sources(traced, lambda module: surgery.slim(module, 0.5), copies=False)
    assert slim.stage2.spread[0].out_channels == 16
    assert surgery.cost(slim).macs <= 0.32 * surgery.cost(traced).macs
    hold(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5)))
    for batch in (1, 3):
        found, expected = (run(slim, (images(batch),), False), run_switched_off(net, kept, (images(batch),), False))
        for ours, theirs in zip(found.outputs, expected.outputs, strict=True):
            assert not theirs.isnan().any()
            assert (ours - theirs).abs().max() <= EXACT * theirs.abs().max()


def test_a_slim_one_is_saved_and_loaded(nets, tmp_path):
    slim = surgery.slim(nets[1], 0.5)
    surgery.save(slim, tmp_path / "slim")
    assert surgery.verify(surgery.load(tmp_path / "slim", model=build(nets[0].stage1.how)), slim, images(2)).ok
