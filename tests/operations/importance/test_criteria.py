"""Each criterion against a computation by hand, and under permutations of the channels."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery.errors import ImportanceWarning, UsageError
from surgery.settings import IMPORTANCE, RANKINGS

ON_DATA = ("taylor", "variance", "reconstruction")
DATA = [
    (torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64), torch.arange(n) % 3)
    for n in (24, 20, 28)
]


class Net(nn.Module):
    """A convolution with a norm, a grouped and a depthwise one, a residual stream, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 6, 1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.hidden, self.head = nn.Linear(6 * 4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.grouped(self.norm(self.conv(x)).relu()).relu()).relu()
        x = self.point(x)
        x = x + self.branch(x).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(1)
    model = Net().double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.2 if tensor.ndim == 1 else torch.randn_like(tensor))
    return surgery.trace(model, DATA[0][0][:2])


def scores(module: nn.Module, name: str, **options) -> surgery.UnitScores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportanceWarning)
        return surgery.unit_scores(module, surgery.Importance(name, DATA if name in ON_DATA else None, **options))


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def halves(x: np.ndarray) -> np.ndarray:
    """The values of units, which the grouped convolution reads at two positions each."""
    return x[:4] + x[4:]


def distances(rows: np.ndarray) -> np.ndarray:
    found = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in rows] for a in rows]).sum(1)
    return found / found.mean()


def shares(squares: np.ndarray) -> np.ndarray:
    return np.array([own / squares[squares >= own].sum() for own in squares])


def test_magnitude_is_the_mean_of_squares_over_all_members_buffers_among_them(net):
    w = weights(net)
    rows = [(w["hidden.weight"] ** 2).sum(1), w["hidden.bias"] ** 2, (w["head.weight"] ** 2).sum(0)]
    expected = sum(row / row.mean() for row in rows) / 3
    assert scores(net, "magnitude")["hidden"] == pytest.approx(expected, rel=1e-12)
    rows = [
        halves((w["conv.weight"] ** 2).sum((1, 2, 3))),
        *(halves(w[name] ** 2) for name in ("conv.bias", "norm.weight", "norm.bias")),
        (w["grouped.weight"] ** 2).sum((0, 2, 3)),
    ]
    expected = sum(row / row.mean() for row in rows) / 7  # with the norm's two buffers
    assert scores(net, "magnitude")["conv"] == pytest.approx(expected, rel=1e-12)


def test_bn_scale_is_the_mean_of_absolute_factors(net):
    with torch.no_grad():
        net.get_parameter("norm.weight")[2] *= -1
    expected = halves(abs(weights(net)["norm.weight"])) / 2
    assert scores(net, "bn-scale")["conv"] == pytest.approx(expected, rel=1e-12)


def test_what_has_no_norm_is_ranked_by_magnitude_and_that_is_said(net):
    with pytest.warns(ImportanceWarning, match="'bn-scale' cannot score 3 of 4 groups.*hidden by magnitude: no norm"):
        found = surgery.unit_scores(net, "bn-scale")
    assert found.instead.keys() == {"grouped", "point", "hidden"}
    assert (found["hidden"] == scores(net, "magnitude")["hidden"]).all()


def test_fpgm_is_the_sum_of_distances_to_the_other_filters(net):
    w, found = weights(net), scores(net, "fpgm")
    assert found["hidden"] == pytest.approx(distances(w["hidden.weight"]), rel=1e-9)
    assert found["conv"] == pytest.approx(halves(distances(w["conv.weight"].reshape(8, -1))) / 2, rel=1e-9)
    both = (distances(w["point.weight"].reshape(6, -1)) + distances(w["branch.weight"].reshape(6, -1))) / 2
    assert found["point"] == pytest.approx(both, rel=1e-9)


def test_a_filter_at_the_geometric_median_is_the_first_to_go():
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 9.0], [9.0, 11.0], [10.0, 10.0], [11.0, 9.0], [11.0, 11.0]]))
    traced = surgery.trace(model, torch.rand(2, 2))
    assert surgery.recipe(surgery.slim(traced, 0.8, importance="fpgm")).steps[-1].indices == {"0": (0, 1, 3, 4)}


def test_lamp_is_the_share_among_those_that_are_not_smaller(net):
    w, found = weights(net), scores(net, "lamp")
    assert found["hidden"] == pytest.approx(shares((w["hidden.weight"] ** 2).sum(1)), rel=1e-12)
    assert found["conv"] == pytest.approx(shares(halves((w["conv.weight"] ** 2).sum((1, 2, 3)))), rel=1e-12)
    both = [shares((w[f"{name}.weight"] ** 2).sum((1, 2, 3))) for name in ("point", "branch")]
    assert found["point"] == pytest.approx((both[0] + both[1]) / 2, rel=1e-12)
    assert found["hidden"].max() == 1


def test_equal_units_have_equal_lamp_scores():
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0], [1.0], [2.0], [1.0]]))
    traced = surgery.trace(model, torch.rand(2, 1))
    assert surgery.unit_scores(traced, "lamp")["0"] == pytest.approx([4 / 8, 1 / 10, 4 / 8, 1 / 10])


def test_taylor_is_the_squared_sum_of_weights_times_gradients_in_each_batch(net):
    model = Net().double().eval()
    model.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()})
    batches = []
    for x, labels in DATA:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        batches.append({name: (p * p.grad).detach().numpy() for name, p in model.named_parameters()})
    expected = np.mean(
        [(b["hidden.weight"].sum(1) + b["hidden.bias"] + b["head.weight"].sum(0)) ** 2 for b in batches], axis=0
    )
    found = scores(net, "taylor")
    assert found["hidden"] == pytest.approx(expected, rel=1e-9)
    expected = np.mean(
        [
            (
                sum(b[f"{n}.weight"].sum((1, 2, 3)) + b[f"{n}.bias"] for n in ("point", "branch"))
                + b["branch.weight"].sum((0, 2, 3))
                + b["hidden.weight"].sum(0).reshape(6, 4).sum(1)
            )
            ** 2
            for b in batches
        ],
        axis=0,
    )
    assert found["point"] == pytest.approx(expected, rel=1e-9)
    conv = np.mean(
        [
            (
                halves(b["conv.weight"].sum((1, 2, 3)) + b["conv.bias"] + b["norm.weight"] + b["norm.bias"])
                + b["grouped.weight"].sum((0, 2, 3))
            )
            ** 2
            for b in batches
        ],
        axis=0,
    )
    assert found["conv"] == pytest.approx(conv, rel=1e-9)


def test_taylor_takes_another_loss(net):
    def loss(outputs, batch):
        return outputs.square().mean() + 0 * batch[1].sum()

    found = surgery.unit_scores(net, surgery.Importance("taylor", DATA, loss=loss))
    first, last = DATA[0][0][:3], DATA[0][1][:3]
    half = surgery.unit_scores(
        net, surgery.Importance("taylor", [(first, last)], loss=lambda outputs, batch: loss(outputs, batch) / 2)
    )
    whole = surgery.unit_scores(net, surgery.Importance("taylor", [(first, last)], loss=loss))
    assert half["hidden"] == pytest.approx(whole["hidden"] / 4, rel=1e-9)
    assert not np.allclose(found["hidden"], scores(net, "taylor")["hidden"])


def inputs_of(net: nn.Module) -> dict[str, np.ndarray]:
    """What layers of the network read on all data, (images, channels, ...)."""
    model = Net().double().eval()
    model.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()})
    seen: dict[str, np.ndarray] = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].detach().numpy()}))
    model(torch.cat([x for x, _ in DATA]))
    return seen


def test_variance_is_that_of_what_readers_are_given(net):
    seen, found = inputs_of(net), scores(net, "variance")
    assert found["hidden"] == pytest.approx(seen["head"].var(0), rel=1e-9)
    assert found["conv"] == pytest.approx(halves(seen["grouped"].var((0, 2, 3))) / 2, rel=1e-9)
    by_place = seen["hidden"].var(0).reshape(6, 4)  # channels, then the places of a flatten
    both = (seen["branch"].var((0, 2, 3)) + by_place.sum(1)) / 5
    assert found["point"] == pytest.approx(both, rel=1e-9)


def left_over(x: np.ndarray, w: np.ndarray, kept: list[int]) -> float:
    """The share of the outputs ``x w`` that the best affine map from the kept columns leaves."""
    y = x @ w
    rows = np.column_stack([np.ones(len(x)), x[:, kept]])
    rest = y - rows @ np.linalg.lstsq(rows, y, rcond=None)[0]
    return (rest**2).sum() / ((y - y.mean(0)) ** 2).sum()


def greedy(problems: list[tuple[np.ndarray, np.ndarray, np.ndarray]], units: int) -> np.ndarray:
    """The share that is left before each unit is taken. A problem: rows, weights, and the unit of each column."""
    found, kept = np.zeros(units), []

    def left(chosen: list[int]) -> float:
        return np.mean([left_over(x, w, np.flatnonzero(np.isin(of, chosen)).tolist()) for x, w, of in problems])

    while len(kept) < units:
        rest = [u for u in range(units) if u not in kept]
        best = min(rest, key=lambda u: left([*kept, u]))
        found[best] = left(kept)
        kept.append(best)
    return found


def test_reconstruction_is_greedy_by_what_readers_can_not_restore(net):
    seen, w, found = inputs_of(net), weights(net), scores(net, "reconstruction")
    expected = greedy([(seen["head"], w["head.weight"].T, np.arange(5))], 5)
    assert found["hidden"] == pytest.approx(expected, abs=1e-8)
    point = seen["point"].transpose(0, 2, 3, 1).reshape(-1, 8)
    expected = greedy([(point, w["point.weight"].reshape(6, 8).T, np.tile(np.arange(4), 2))], 4)
    assert found["grouped"] == pytest.approx(expected, abs=1e-8)
    rows = seen["branch"].transpose(0, 2, 3, 1).reshape(-1, 6)
    taps = w["branch.weight"].transpose(1, 0, 2, 3).reshape(6, -1)
    flat = (seen["hidden"], w["hidden.weight"].T, np.repeat(np.arange(6), 4))
    assert found["point"] == pytest.approx(greedy([(rows, taps, np.arange(6)), flat], 6), abs=1e-8)


def test_reconstruction_of_a_grouped_convolution_takes_each_conv_group_for_itself(net):
    seen, w = inputs_of(net), weights(net)
    rows = seen["grouped"].transpose(0, 2, 3, 1).reshape(-1, 2, 4)
    parts = w["grouped.weight"].reshape(2, 4, 4, 3, 3).transpose(0, 2, 1, 3, 4).reshape(2, 4, -1)
    expected = greedy([(rows[:, k], parts[k], np.arange(4)) for k in range(2)], 4)
    assert scores(net, "reconstruction")["conv"] == pytest.approx(expected, abs=1e-8)


def test_channels_that_follow_from_others_go_first_and_are_restored_by_a_compensation():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).double()  # six channels of four dimensions
    traced, x = surgery.trace(model, torch.randn(2, 4).double()), torch.randn(64, 4).double()
    found = surgery.unit_scores(traced, surgery.Importance("reconstruction", x))["0"]
    assert (found > 1e-9).sum() == 4
    slim = surgery.slim(traced, 4 / 6, importance={"0": found}, calibration=x)
    assert surgery.verify(slim, traced, x, dtype=torch.float64).max_rel < 1e-5


def test_random_follows_from_its_seed_and_differs_between_groups(net):
    one, same, other = (scores(net, "random", seed=seed) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() and (one[name] != other[name]).any() for name in one)
    assert not np.allclose(one["conv"], one["grouped"])


@pytest.mark.parametrize("name", [name for name in IMPORTANCE if name not in ("prefix", "random")])
def test_scores_move_with_the_channels(net, name):
    before = scores(net, name)
    for group in surgery.dimension_groups(net):
        if group.editable:
            order = group.permutation(3)
            after = scores(surgery.reindex(net, {group.name: order}), name)
            for other, own in after.items():
                expected = before[other][order] if other == group.name else before[other]
                assert own == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", IMPORTANCE)
def test_slim_is_the_masked_dense_network(net, name, ranking):
    if name == "prefix" and ranking != "local":
        with pytest.raises(UsageError, match="does not compare channels of different groups: take ranking='local'"):
            surgery.slim(net, 0.5, importance=name, ranking=ranking)
        return
    found = scores(net, name)
    carved = surgery.slim(net, 0.5, importance=found, ranking=ranking)
    switched_off = surgery.masked(net, surgery.split_masks(net, 0.5, importance=found, ranking=ranking))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 2, 2, dtype=torch.float64)
        surgery.verify(carved, switched_off, x, dtype=torch.float64, train=batch > 1).raise_if_different()


@pytest.mark.parametrize("name", IMPORTANCE)
def test_scores_are_the_same_each_time_and_leave_the_module_and_random_numbers_alone(net, name):
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    random, training = torch.get_rng_state(), net.training
    one, other = scores(net, name), scores(net, name)
    assert all((one[group] == other[group]).all() for group in one)
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training == training
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert one.on_data == (name in ON_DATA)


@pytest.mark.parametrize("name", ON_DATA)
def test_a_criterion_on_data_has_to_have_some(net, name):
    with pytest.raises(UsageError, match=f"'{name}' looks at data: pass surgery.Importance\\('{name}', data\\)"):
        surgery.slim(net, 0.5, importance=name)
    with pytest.raises(UsageError, match=f"importance '{name}' has no inputs"):
        surgery.slim(net, 0.5, importance=surgery.Importance(name, []))
    with pytest.raises(UsageError, match=f"does not run on the data of importance '{name}'"):
        surgery.slim(net, 0.5, importance=surgery.Importance(name, [(torch.rand(4, 7, 2, 2), torch.zeros(4).long())]))


def test_taylor_has_to_have_labels_or_a_loss(net):
    with pytest.raises(UsageError, match="cross-entropy of logits and labels, so its data are batches of"):
        surgery.unit_scores(net, surgery.Importance("taylor", DATA[0][0]))
    with pytest.raises(UsageError, match="loss of importance 'taylor' must return a scalar tensor"):
        surgery.unit_scores(net, surgery.Importance("taylor", DATA, loss=lambda outputs, batch: outputs))


def test_parts_of_a_concatenation_are_scored_by_the_layers_that_write_them():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 9)
            self.out = nn.Linear(9, 2)

        def forward(self, x):
            y = torch.cat([self.a(x), self.b(x)], 1)
            return self.out((y + self.c(y)).relu())

    traced = surgery.trace(Joined().double(), torch.rand(2, 3).double())
    (name,) = surgery.unit_scores(traced, "lamp")
    w = weights(traced)
    alone = np.concatenate([shares((w[f"{part}.weight"] ** 2).sum(1)) for part in "ab"])
    both = (alone + shares((w["c.weight"] ** 2).sum(1))) / 2
    assert surgery.unit_scores(traced, "lamp")[name] == pytest.approx(both, rel=1e-12)
    alone = np.concatenate([distances(w[f"{part}.weight"]) for part in "ab"])
    both = (alone + distances(w["c.weight"])) / 2
    assert surgery.unit_scores(traced, "fpgm")[name] == pytest.approx(both, rel=1e-9)


@pytest.mark.parametrize("name", ON_DATA)
def test_a_module_in_training_mode_is_scored_in_eval_mode_and_stays_as_it_is(net, name):
    module = copy.deepcopy(net).train()
    frozen = module.get_parameter("conv.weight").requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    found, expected = scores(module, name), scores(net, name)
    assert all((found[group] == expected[group]).all() for group in expected)
    assert module.training
    assert module.get_submodule("norm").training
    assert not frozen.requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_a_layer_that_reads_very_many_numbers_is_looked_at_by_channels(net, monkeypatch):
    monkeypatch.setattr("surgery.operations.importance.observed._FOLDED", 10)
    seen, w = inputs_of(net), weights(net)
    rows = seen["branch"].transpose(0, 2, 3, 1).reshape(-1, 6)
    taps = w["branch.weight"].transpose(1, 0, 2, 3).reshape(6, -1)
    places = seen["hidden"].reshape(-1, 6, 4).transpose(0, 2, 1).reshape(-1, 6)
    folded = (places, w["hidden.weight"].T.reshape(6, -1), np.arange(6))
    expected = greedy([(rows, taps, np.arange(6)), folded], 6)
    assert scores(net, "reconstruction")["point"] == pytest.approx(expected, abs=1e-8)
