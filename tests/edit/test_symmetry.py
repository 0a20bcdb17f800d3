"""Copies that learn different things: uneven shares and zero-sum noise are exact, the paper's noise is not."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import models as catalogue
from tests.random_graphs import PLAIN, build
from tests.zoo import build_family, randomised

EXACT = 1e-10
WAYS = [None, "uneven", "zero-sum"]
FACTORS = [math.sqrt(2), 2.0]
STEPS = st.lists(st.tuples(st.sampled_from(PLAIN), st.integers(0, 69), st.integers(0, 69)), min_size=2, max_size=9)


def without_dropout(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.p = 0.0
    return module


@pytest.fixture(scope="module", params=["googlenet", "inception_v3", "resnext50_32x4d"])
def convolutional(request):
    """A narrow model with all its branches and auxiliary heads, and its inputs."""
    family = build_family(request.param)
    return without_dropout(family.traced).float(), family.x.float()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", FACTORS)
def test_concatenations_residuals_and_auxiliary_heads_widen_exactly_in_every_way(convolutional, factor, way):
    traced, x = convolutional
    wide = surgery.widen(traced, factor, break_symmetry=way, seed=3)  # float32; in float64 rounding is told from errors
    grown = surgery.recipe(wide).steps[-1].indices
    assert set(grown) == {g.name for g in surgery.dimension_groups(traced) if g.editable}
    for train in (False, True):
        assert surgery.verify(wide, traced, x, dtype=torch.float64, train=train).max_rel <= EXACT


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["vision transformer", "swin"])
def test_transformers_widen_exactly_in_every_way(name, factor, way):
    family = build_family(name)
    net = without_dropout(family.traced)
    wide = surgery.widen(net, factor, break_symmetry=way, mapping="balanced", seed=3)
    (step,) = surgery.recipe(wide).steps
    assert any(-1 in index for index in step.indices.values()) is (factor < 2)
    for train in (False, True):
        assert surgery.verify(wide, net, family.x, train=train, seed=1).max_rel <= EXACT


def test_a_float32_transformer_of_twice_the_width_is_exact_as_float64_shows():
    family = build_family("vision transformer")
    net = copy.deepcopy(family.traced).float()
    for way in ("uneven", "zero-sum"):
        wide = surgery.widen(net, 2.0, break_symmetry=way)
        assert surgery.verify(wide, net, family.x, dtype=torch.float64).max_rel <= EXACT


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("way", ["uneven", "zero-sum"])
def test_every_kind_of_step_keeps_its_function(kind, way):
    net, inputs = build([("conv", 1, 48), (kind, 0, 41), ("conv", 0, 20)])
    traced = surgery.trace(net, inputs)
    wide = surgery.widen(traced, 2.0, break_symmetry=way)
    assert surgery.verify(wide, net, inputs).max_rel <= EXACT
    doubled = [new for new, old in zip(wide.heads, net.heads, strict=True) if new.in_features == 2 * old.in_features]
    assert doubled
    for head in doubled:
        assert not torch.equal(*head.weight.unflatten(1, (2, -1)).unbind(1))


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(STEPS)
def test_a_random_network_is_widened_exactly_in_every_way(steps):
    net, inputs = build(steps)
    traced = surgery.trace(net, inputs)
    for way in ("uneven", "zero-sum"):
        wide = surgery.widen(traced, [1.6, 2.5][len(steps) % 2], mapping="balanced", break_symmetry=way)
        for train in (False, True):
            assert surgery.verify(wide, net, inputs, train=train).max_rel <= EXACT


class Bilinear(nn.Module):
    """A weight that is contracted over both its axes, and one that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(5, 4)
        self.form = nn.Parameter(torch.randn(4, 6))
        self.out, self.again = nn.Linear(4, 3), nn.Linear(4, 3)
        self.again.weight = self.out.weight

    def forward(self, x):
        mixed = torch.einsum("ni,ij,nj->n", self.a(x), self.form, self.b(x))
        return mixed, self.out(self.c(x).tanh()) + self.again(self.c(x).relu())


@pytest.mark.parametrize("way", ["uneven", "zero-sum"])
def test_a_weight_that_is_read_along_two_axes_or_by_two_layers_keeps_the_function(way):
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    traced = surgery.trace(Bilinear(), x)
    wide = surgery.widen(traced, {"a": 9, "b": 2.5, "c": 3.0}, break_symmetry=way)
    assert wide.get_parameter("form").shape == (9, 15)
    assert wide.get_submodule("out").weight is wide.get_submodule("again").weight
    assert surgery.verify(wide, traced, x, dtype=torch.float64).max_rel <= EXACT


# ---- what the copies do in training


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.inner_bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.outer, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16 * 16, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x + self.outer(self.inner_bn(self.inner(x)).relu())
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


def halves(wide: nn.Module, name: str, axis: int, *, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The old channels of a parameter and their copies, of a model widened to twice its width."""
    index = torch.tensor(surgery.recipe(wide).steps[0].indices["stem" if name == "stem.weight" else "inner"])
    order = torch.argsort(index, stable=True).view(size, 2)
    weight = wide.get_parameter(name).detach()
    return weight.index_select(axis, order[:, 0]), weight.index_select(axis, order[:, 1])


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return surgery.trace(randomised(Residual()).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))


def trained(wide: nn.Module, steps: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(wide.train().parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        optimiser.zero_grad()
        x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        nn.functional.cross_entropy(wide(x), torch.arange(8) % 4).backward()
        optimiser.step()
    return wide


def test_without_symmetry_breaking_balanced_copies_stay_equal(residual):
    wide = trained(surgery.widen(residual, 2.0, mapping="balanced"), steps=5)
    for name, axis in (("stem.weight", 0), ("inner.weight", 0), ("outer.weight", 1)):
        old, new = halves(wide, name, axis)
        assert (old - new).abs().max() <= 1e-15  # kernels round: the order in which they add up differs
    assert (halves(wide, "stem.weight", 0)[0] - residual.get_parameter("stem.weight")).abs().max() > 1e-3


@pytest.mark.parametrize("way", [None, "uneven"])
def test_where_nothing_is_rounded_they_stay_equal_bit_for_bit(way):
    """Weights and inputs of few binary digits: one step is exact in whatever order numbers are added up."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    for parameter in net.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape).double() / 4
    x = torch.randint(-3, 4, (5, 6)).double()
    wide = surgery.widen(surgery.trace(net, x), 2.0, mapping="balanced", break_symmetry=way)
    before = wide.get_parameter("2.weight").detach().clone()
    optimiser = torch.optim.SGD(wide.parameters(), lr=2.0**-8)
    wide(x).square().sum().backward()
    optimiser.step()
    after = wide.get_parameter("2.weight").detach()
    assert not torch.equal(after, before)
    order = torch.argsort(torch.tensor(surgery.recipe(wide).steps[0].indices["2"]), stable=True).view(16, 2)
    assert torch.equal(after[order[:, 0]], after[order[:, 1]]) is (way is None)


@pytest.mark.parametrize("way", ["uneven", "zero-sum"])
def test_with_it_every_copy_differs_after_one_step(residual, way):
    wide = surgery.widen(residual, 2.0, mapping="balanced", break_symmetry=way)
    assert torch.equal(*halves(wide, "stem.weight", 0))
    trained(wide, steps=1)
    for name in ("stem.weight", "inner.weight"):
        old, new = halves(wide, name, 0)
        assert (old != new).flatten(1).any(1).all()


def test_plain_noise_changes_the_function_and_all_copies_but_the_first(residual):
    wide = surgery.widen(residual, {"stem": 2.0}, mapping="balanced", break_symmetry="noise", noise=0.1, seed=4)
    before = residual.get_parameter("stem.weight")
    old, new = halves(wide, "stem.weight", 0)
    assert torch.equal(old, before)
    assert (new - old).std().item() == pytest.approx(0.1 * before.std().item(), rel=0.1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert surgery.verify(wide, residual, x).max_rel > 1e-6
    (step,) = surgery.recipe(wide).steps
    assert step.noise == surgery.Noise("plain", 0.1, 4)


def test_plain_noise_leaves_means_alone():
    family = build_family("vision transformer")
    wide = surgery.widen(family.traced, math.sqrt(2), break_symmetry="noise")
    even = surgery.widen(family.traced, math.sqrt(2))
    differs = (wide.get_parameter("conv_proj.weight") != even.get_parameter("conv_proj.weight")).flatten(1).any(1)
    assert not differs.any()  # 24 channels and 10 means of them: no copies
    double = surgery.widen(family.traced, {"conv_proj": 52}, break_symmetry="noise")
    even = surgery.widen(family.traced, {"conv_proj": 52})
    differs = (double.get_parameter("conv_proj.weight") != even.get_parameter("conv_proj.weight")).flatten(1).any(1)
    assert differs.nonzero().flatten().tolist() == list(range(24, 48))


def test_zero_sum_noise_has_the_spread_asked_for_and_is_each_weights_own(residual):
    width = {"stem": 3.0, "inner": 2.0}
    even = surgery.widen(residual, width, mapping="balanced")
    wide = surgery.widen(residual, width, mapping="balanced", break_symmetry="zero-sum", noise=0.01)
    added = wide.get_parameter("outer.weight") - even.get_parameter("outer.weight")
    assert added.std().item() == pytest.approx(0.01 * residual.get_parameter("outer.weight").std().item(), rel=0.1)
    stream = torch.tensor(surgery.recipe(wide).steps[0].indices["stem"])
    first, second = (added[(stream == 0).nonzero().flatten()[k]] for k in (0, 1))
    assert (first != second).double().mean() > 0.8  # two copies of one row; the noise of small weights is limited


def test_balanced_copies_differ_in_number_by_one_at_most(residual):
    for seed in range(3):
        wide = surgery.widen(residual, {"inner": 41}, mapping="balanced", seed=seed)
        index = surgery.recipe(wide).steps[0].indices["inner"]
        assert index[:16] == tuple(range(16))
        assert np.bincount(index).tolist().count(3) == 9
        assert set(np.bincount(index)) == {2, 3}
    other = surgery.recipe(surgery.widen(residual, {"inner": 41}, mapping="balanced", seed=9)).steps[0]
    assert set(other.indices["inner"][32:]) != set(index[32:])


def test_uneven_shares_add_up_exactly_and_are_none_of_them_near_nothing(residual):
    wide = surgery.widen(residual, {"inner": 100}, break_symmetry="uneven")
    (step,) = surgery.recipe(wide).steps
    index, shares = np.array(step.indices["inner"]), np.array(step.shares["inner"])
    copies = np.bincount(index)
    assert (np.bincount(index, weights=shares) == 1).all()
    assert (shares * copies[index] > 0.3).all()
    for unit in np.flatnonzero(copies > 1):
        assert len(set(shares[index == unit])) > 1


# ---- as data


@pytest.mark.parametrize("way", [*WAYS, "noise"])
def test_a_recipe_replays_to_the_bit_wherever_it_came_from(residual, way):
    state = torch.get_rng_state()
    wide = surgery.widen(residual, 1.5, break_symmetry=way, mapping="balanced", noise=0.02, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    read = surgery.Recipe.from_json(surgery.recipe(wide).to_json())
    assert read == surgery.recipe(wide)
    again = surgery.apply(residual, read)
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_recipes_without_noise_are_written_and_read_as_ever(residual):
    (step,) = json.loads(surgery.recipe(surgery.widen(residual, 2.0)).to_json())["steps"]
    assert set(step) == {"step", "indices"}
    text = '{"schema": 1, "source": null, "steps": [{"step": "Reindex", "indices": {"inner": ["0:16", 3]}}]}'
    assert surgery.Recipe.from_json(text).steps[0].noise is None


def test_other_seeds_draw_other_noise(residual):
    first, second = (
        surgery.widen(residual, 2.0, mapping="balanced", break_symmetry="zero-sum", seed=seed) for seed in (0, 1)
    )
    assert not torch.equal(first.get_parameter("outer.weight"), second.get_parameter("outer.weight"))


@pytest.mark.parametrize("way", ["uneven", "zero-sum"])
def test_what_was_widened_is_saved_loaded_widened_again_and_slimmed(tmp_path, way):
    net = catalogue.build("squeezenet1_1?num_classes=10", seed=0).eval()
    x = torch.randn(2, 3, 40, 40)
    traced = surgery.trace(net, x, source="torchvision:squeezenet1_1?num_classes=10")
    wide = surgery.widen(traced, 1.5, break_symmetry=way)
    surgery.save(wide, tmp_path / "wide")
    loaded = surgery.load(tmp_path / "wide")
    assert surgery.verify(loaded, wide, x).max_abs == 0
    again = surgery.widen(loaded, math.sqrt(2), break_symmetry=way, seed=1)
    assert len(surgery.recipe(again).steps) == 2
    assert surgery.verify(again, traced, x, dtype=torch.float64).max_rel <= EXACT
    masks = surgery.split_masks(again, 0.5)
    assert surgery.verify(surgery.slim(again, 0.5), surgery.masked(again, masks), x, dtype=torch.float64).ok


def test_a_model_without_data_is_widened_with_noise_too(residual):
    meta = copy.deepcopy(residual).to("meta")
    wide = surgery.widen(meta, 2.0, break_symmetry="zero-sum")
    assert wide.get_parameter("outer.weight").shape == (32, 32, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "even"}, "mapping must be 'random' or 'balanced', not 'even'"),
        ({"break_symmetry": "nose"}, "break_symmetry must be 'uneven', 'zero-sum', 'noise' or None, not 'nose'"),
        ({"break_symmetry": "zero-sum", "noise": 0}, "noise must be a number above 0, not 0.0"),
        ({"break_symmetry": "noise", "noise": float("nan")}, "noise must be a number above 0, not nan"),
        ({"break_symmetry": "zero-sum", "noise": "much"}, "noise is a number, not 'much'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": None}, "seed must be a whole number of at least 0, not None"),
    ],
)
def test_options_that_do_not_exist_are_refused(residual, options, message):
    with pytest.raises(surgery.UsageError, match=message):
        surgery.widen(residual, 2.0, **options)


def test_noise_of_an_unknown_kind_is_no_recipe():
    text = '{"schema": 1, "source": null, "steps": [{"step": "Reindex", "indices": {}, "noise": {"kind": "pink"%s}}]}'
    with pytest.raises(surgery.UsageError, match="unknown kind of noise 'pink'"):
        surgery.Recipe.from_json(text % ', "scale": 0.1')
    with pytest.raises(surgery.UsageError, match=r"'noise' of step Reindex lacks the field 'scale'"):
        surgery.Recipe.from_json(text % "")


def test_shares_are_given_with_means_which_have_none():
    family = build_family("vision transformer")
    index = [*range(24), *range(24), -1, -1]
    shares = [0.25] * 24 + [0.75] * 24 + [0.0, 0.0]
    wide = surgery.reindex(family.traced, {"conv_proj": index}, shares={"conv_proj": shares})
    assert surgery.verify(wide, family.traced, family.x).max_rel <= EXACT
    even = surgery.reindex(family.traced, {"conv_proj": index})
    names = [n for n, p in wide.named_parameters() if not torch.equal(p, even.get_parameter(n))]
    assert "heads.head.weight" in names
    with pytest.raises(surgery.UsageError, match="the share of a mean must be 0"):
        surgery.reindex(family.traced, {"conv_proj": index}, shares={"conv_proj": [*shares[:-1], 0.1]})
    with pytest.raises(surgery.UsageError, match="48 shares for 50 units"):
        surgery.reindex(family.traced, {"conv_proj": index}, shares={"conv_proj": shares[:48]})
