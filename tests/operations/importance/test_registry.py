"""Criteria of one's own, and what is refused of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery.errors import UsageError
from surgery.settings import IMPORTANCE, TradeoffSettings


@pytest.fixture(autouse=True)
def registry():
    with surgery.restore_importance():
        yield


@pytest.fixture(scope="module")
def chain() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    return surgery.trace(model.eval(), torch.rand(2, 3))


def bias(scored):
    (own,) = [one for one in scored.slices if one.member.name.endswith("bias")]
    return own.sum(own.weight[:, 0])


def kept(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return dict(surgery.recipe(module).steps[-1].indices)


def expected(chain: nn.Module, rate: float = 0.5) -> dict[str, tuple[int, ...]]:
    layers = {name: chain.get_submodule(name).bias.detach().numpy() for name in ("0", "2")}
    return {
        name: tuple(np.sort(np.argsort(-values)[: round(rate * len(values))]).tolist())
        for name, values in layers.items()
    }


def test_a_criterion_is_used_wherever_a_name_is(chain):
    assert surgery.importance("bias", words="those with the largest biases")(bias) is bias
    assert IMPORTANCE["bias"] == "those with the largest biases"
    slim = surgery.slim(chain, 0.5, importance="bias")
    assert kept(slim) == expected(chain)
    masks = surgery.split_masks(chain, 0.5, importance="bias")
    surgery.verify(slim, surgery.masked(chain, masks), torch.rand(3, 3)).raise_if_different()
    assert surgery.plan(chain, 0.5, importance="bias").step.indices == expected(chain)
    found = surgery.slim_to_budget(chain, macs=0.6, importance="bias")
    assert found.importance == "bias"
    assert kept(found.module) == kept(surgery.slim(chain, found.rates, importance="bias"))
    assert TradeoffSettings(importance="bias").importance == "bias"


@pytest.mark.parametrize("make", [lambda: bias, lambda: surgery.Importance(bias)], ids=["function", "importance"])
def test_a_function_needs_no_name(chain, make):
    assert kept(surgery.slim(chain, 0.5, importance=make())) == expected(chain)
    assert surgery.slim_to_budget(chain, macs=0.6, importance=make()).importance == "bias"


def test_scores_are_taken_themselves(chain):
    scores = surgery.unit_scores(chain, bias)
    assert kept(surgery.slim(chain, 0.5, importance=scores)) == expected(chain)
    assert kept(surgery.slim(chain, 0.5, importance={name: own.tolist() for name, own in scores.items()})) == expected(
        chain
    )
    assert surgery.slim_to_budget(chain, macs=0.6, importance=dict(scores)).importance == "scores"
    with pytest.raises(UsageError, match=r"no scores of group '2': surgery\.unit_scores has those of every group"):
        surgery.slim(chain, 0.5, importance={"0": scores["0"]})
    assert kept(surgery.slim(chain, {"0": 0.5}, importance={"0": scores["0"]}))["0"] == expected(chain)["0"]


def test_plans_score_once(chain):
    calls = []

    @surgery.importance("counted")
    def counted(scored):
        calls.append(scored.group.name)
        return np.arange(scored.group.units)

    list(surgery.plans(chain, [0.5, 0.25, {"0": 0.5}], importance="counted"))
    assert calls == ["0", "2"]
    surgery.slim_to_budget(chain, macs=0.4, importance="counted")
    assert calls == ["0", "2"] * 2


def test_a_taken_name_is_refused_unless_it_is_replaced(chain):
    with pytest.raises(UsageError, match="importance 'magnitude' exists: choose another name, or pass replace=True"):
        surgery.importance("magnitude")(bias)
    surgery.importance("magnitude", replace=True)(bias)
    assert kept(surgery.slim(chain, 0.5, importance="magnitude")) == expected(chain)


def test_what_is_registered_is_forgotten_again(chain):
    with surgery.restore_importance():
        surgery.importance("bias")(bias)
        surgery.importance("magnitude", replace=True)(bias)
    assert "bias" not in IMPORTANCE
    assert IMPORTANCE["magnitude"] == "those with the largest weights"
    with pytest.raises(UsageError, match="unknown importance 'bias'"):
        surgery.slim(chain, 0.5, importance="bias")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda scored: np.zeros(3), r"gives group '0' scores of shape \(3,\), not \(6,\): one for each unit"),
        (lambda scored: 1.0, r"gives group '0' scores of shape \(\), not \(6,\)"),
        (lambda scored: [np.nan] * scored.group.units, "gives group '0' scores that are not finite"),
        (lambda scored: [np.inf] * scored.group.units, "gives group '0' scores that are not finite"),
        (lambda scored: ["a"] * scored.group.units, "gives group '0' what are no numbers"),
        (lambda scored: None, r"gives group '0' scores"),
    ],
)
def test_scores_that_are_none_are_refused_by_the_name_of_the_criterion(chain, scores, message):
    surgery.importance("mine")(scores)
    with pytest.raises(UsageError, match=f"importance 'mine' {message}"):
        surgery.slim(chain, 0.5, importance="mine")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("magnitud", "unknown importance 'magnitud'; did you mean 'magnitude'"),
        (3, "importance is the name of a criterion, a function, a surgery.Importance or scores by group, not 3"),
        (None, "importance is the name of a criterion"),
    ],
)
def test_what_is_no_criterion_is_refused(chain, given, message):
    for call in (surgery.slim, surgery.split_masks, surgery.plan):
        with pytest.raises(UsageError, match=message):
            call(chain, 0.5, importance=given)
    with pytest.raises(UsageError, match=message):
        surgery.Importance(given)


def test_settings_of_a_criterion_are_checked():
    with pytest.raises(UsageError, match="seed must be a whole number of at least 0, not -1"):
        surgery.Importance("random", seed=-1)
    with pytest.raises(UsageError, match="unknown comparison across groups 'sum'"):
        surgery.importance("mine", across="sum")
    with pytest.raises(UsageError, match="a criterion has a name, not <function bias"):
        surgery.importance(bias)


def test_a_criterion_sees_the_weights_the_gradients_and_what_readers_are_given(chain):
    seen = {}
    x, labels = torch.rand(6, 3), torch.tensor([0, 1] * 3)

    @surgery.importance("looks")
    def looks(scored):
        seen[scored.group.name] = scored
        first, last = scored.slices[0], scored.slices[-1]
        assert (str(first.member), str(last.member)) in {("0.weight[0]", "2.weight[1]"), ("2.weight[0]", "4.weight[1]")}
        assert (first.weight == chain.get_parameter(first.member.name).detach().double().numpy()).all()
        assert (last.weight == chain.get_parameter(last.member.name).detach().double().numpy().T).all()
        assert scored.layer(first.member) is chain.get_submodule(scored.group.name)
        assert [one.member.name for one in scored.filters] == [first.member.name]
        own = sum(one.sum((one.weight * one.gradient).sum(1)) for one in scored.gradients)
        assert own == pytest.approx(scored.products[0], rel=1e-4, abs=1e-7)
        return own

    surgery.unit_scores(chain, surgery.Importance("looks", (x, labels)))
    assert seen.keys() == {"0", "2"}
    (reading,) = seen["0"].joint_readings
    given = chain.get_submodule("0")(x).relu().detach().double().numpy()
    assert reading.name == "2.weight"
    assert reading.products.numpy() / 6 == pytest.approx(np.cov(given.T, bias=True), abs=1e-7)
