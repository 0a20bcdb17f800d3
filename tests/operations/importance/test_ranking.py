"""Channels of several groups ranked together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery.axes.analysis import analyse
from surgery.errors import UsageError
from surgery.operations.importance.ranking import structure


def trace(*layers: nn.Module, size: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return surgery.trace(nn.Sequential(*layers).double().eval(), torch.rand(2, size).double())


@pytest.fixture(scope="module")
def chain() -> nn.Module:
    return trace(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    model = surgery.models.build("resnet18?num_classes=10", seed=0).eval()
    return surgery.trace(model, torch.zeros(2, 3, 32, 32))


SCORES = {
    "0": [9.0, 1.0, 8.0, 1.5, 7.0, 0.1],
    "2": [0.5, 0.2, 0.4, 0.3],
    "4": [5.0, 6.0, 0.6, 0.7, 0.8, 0.9, 4.0, 3.0],
}


def kept(module: nn.Module, **options) -> dict[str, list[int]]:
    masks = surgery.split_masks(module, **options)
    return {name: np.flatnonzero(masks[f"{name}.bias"].numpy()).tolist() for name in SCORES}


def test_global_keeps_the_best_of_all_groups_and_one_unit_of_each(chain):
    found = kept(chain, rate=0.5, importance=SCORES, ranking="global")  # 9 of 18
    assert found == {"0": [0, 2, 3, 4], "2": [0], "4": [0, 1, 6, 7]}


def test_local_keeps_the_share_of_each(chain):
    assert kept(chain, rate=0.5, importance=SCORES) == {"0": [0, 2, 4], "2": [0, 2], "4": [0, 1, 6, 7]}


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.77, 1.0])
def test_a_rate_is_the_share_of_all_units(chain, rate):
    found = kept(chain, rate=rate, importance=SCORES, ranking="global")
    assert sum(map(len, found.values())) == max(3, math.ceil(round(rate * 18, 9)))


def test_of_equal_units_the_first_are_kept(chain):
    alike = {name: [1.0] * len(own) for name, own in SCORES.items()}
    assert kept(chain, rate=0.5, importance=alike, ranking="global") == {"0": [*range(6)], "2": [0, 1], "4": [0]}


def test_kept_units_are_rounded_up_to_a_multiple(chain):
    found = kept(chain, rate=0.5, importance=SCORES, ranking="global", round_to=3)
    assert found == {"0": [0, 1, 2, 3, 4, 5], "2": [0, 2, 3], "4": [0, 1, 4, 5, 6, 7]}


def test_groups_of_different_rates_are_ranked_apart(chain):
    found = kept(chain, rate={"0": 0.5, "2": 0.5, "4": 0.25}, importance=SCORES, ranking="global")
    assert found == {"0": [0, 2, 3, 4], "2": [0], "4": [0, 1]}
    assert kept(chain, rate={"0": 0.5}, importance=SCORES, ranking="global")["0"] == [0, 2, 4]


def test_scores_compare_as_the_criterion_says(chain):
    with surgery.restore_importance():
        surgery.importance("raw", across="raw")(lambda scored: SCORES[scored.group.name])
        surgery.importance("mean")(lambda scored: SCORES[scored.group.name])
        surgery.importance("never", across="never")(lambda scored: SCORES[scored.group.name])
        raw = kept(chain, rate=0.5, importance="raw", ranking="global")
        mean = kept(chain, rate=0.5, importance="mean", ranking="global")
        with pytest.raises(UsageError, match="'never' does not compare channels of different groups"):
            kept(chain, rate=0.5, importance="never", ranking="global")
    assert raw == {"0": [0, 2, 3, 4], "2": [0], "4": [0, 1, 6, 7]}
    scaled = [(v / np.mean(own), name, k) for name, own in SCORES.items() for k, v in enumerate(own)]
    best: dict[str, list[int]] = {name: [] for name in SCORES}
    for _, name, k in sorted(scaled, reverse=True)[:9]:
        best[name].append(k)
    assert mean == {name: sorted(own) for name, own in best.items()}
    assert mean != raw


def test_a_group_that_is_scored_otherwise_keeps_its_own_rate():
    module = trace(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 8), nn.BatchNorm1d(8),
                   nn.Linear(8, 2))  # fmt: skip
    with torch.no_grad():
        module.get_parameter("1.weight").copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 3.0, 4.0]))
        module.get_parameter("5.weight").fill_(2.0)
    with pytest.warns(surgery.ImportanceWarning, match="cannot score 1 of 3 groups"):
        slim = surgery.slim(module, 0.5, importance="bn-scale", ranking="global")
    indices = surgery.recipe(slim).steps[-1].indices
    assert (indices["0"], indices["4"]) == ((4, 5), (0, 1, 2, 3, 4))  # 7 of 14 in both
    assert len(indices["2"]) == 2


def test_isomorphic_groups_have_the_same_kinds_of_layers_whatever_their_sizes(resnet):
    analysis = analyse(resnet)
    inside = [structure(resnet, analysis.find(f"layer{n}.{k}.conv1")) for n in range(1, 5) for k in range(2)]
    assert len(set(inside)) == 1
    assert inside[0][0] == ("Conv2d", "weight", "0", "producer")
    assert structure(resnet, analysis.find("conv1")) != inside[0]
    assert structure(resnet, analysis.find("layer2.0.conv2")) == structure(resnet, analysis.find("layer3.0.conv2"))
    assert structure(resnet, analysis.find("layer4.0.conv2")) != structure(resnet, analysis.find("layer3.0.conv2"))


def test_isomorphic_keeps_the_share_of_each_kind(resnet):
    analysis = analyse(resnet)
    groups = [group for group in analysis.groups if group.editable]
    plan = surgery.plan(resnet, 0.5, importance="magnitude", ranking="isomorphic")
    kinds: dict[object, list[int]] = {}
    for group in groups:
        count = kinds.setdefault(structure(resnet, group), [0, 0])
        count[0] += group.units
        count[1] += len(plan.step.indices.get(group.name, range(group.units)))
    assert len(kinds) > 1
    assert all(now == math.ceil(0.5 * before) for before, now in kinds.values())
    widths = [len(plan.step.indices[f"layer{n}.{k}.conv1"]) for n, k in ((1, 0), (1, 1), (2, 1))]
    assert widths != [32, 32, 64]


@pytest.mark.parametrize("ranking", ["global", "isomorphic"])
def test_parts_with_other_readers_keep_a_unit_each(ranking):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 5), nn.Linear(4, 5)
            self.out = nn.Linear(5, 2)

        def forward(self, x):
            one, other = self.both(x).relu().chunk(2, 1)
            return self.out(self.a(one).relu()) + self.out(self.b(other).relu())

    torch.manual_seed(0)
    module = surgery.trace(Halves().double(), torch.rand(2, 3).double())
    scores = {name: np.arange(len(own), dtype=float) for name, own in surgery.unit_scores(module).items()}
    options = {"importance": scores, "ranking": ranking}
    slim = surgery.slim(module, 0.4, **options)
    index = np.array(surgery.recipe(slim).steps[-1].indices["both"])
    assert (index < 4).any()
    assert (index >= 4).any()
    reference = surgery.masked(module, surgery.split_masks(module, 0.4, **options))
    for batch in (1, 3):
        x = torch.rand(batch, 3).double()
        surgery.verify(slim, reference, x, dtype=torch.float64, train=True).raise_if_different()


def test_an_unknown_ranking_is_refused(chain):
    for call in (surgery.slim, surgery.split_masks, surgery.plan):
        with pytest.raises(UsageError, match="unknown ranking 'globl'; did you mean 'global'"):
            call(chain, 0.5, ranking="globl")
    with pytest.raises(UsageError, match="leave it out for WELS"):
        surgery.split_masks(chain, 0.5, kind="wels", ranking="global")
