"""The masked dense network leaves the reset-hypothesis out of all statistics and sums: the slim network is that."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery


class Net(nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.between = between
        self.a, self.b, self.v = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 6)
        self.layer, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.bare = nn.LayerNorm(8, elementwise_affine=False)
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.out, self.read = nn.Linear(8, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.between(self, x)


def layer_norm(net, x):
    return net.out(net.layer(net.a(x)))


def layer_norm_without_parameters(net, x):
    return net.out(net.bare(net.a(x)) + F.layer_norm(net.b(x), (8,)))


def functional_layer_norm(net, x):
    return net.out(F.layer_norm(net.a(x), (8,), net.weight, net.bias, 0.1))


def group_norm(net, x):
    return net.out(net.group(net.a(x).transpose(1, 2)).transpose(1, 2))


def functional_group_norm(net, x):
    return net.out(F.group_norm(net.a(x).transpose(1, 2), 2, net.weight, net.bias).transpose(1, 2))


def positive_products(net, x):
    """Linear attention: a channel that is switched off is elu(0) + 1 here, and would be added up."""
    q, k = F.elu(net.a(x)) + 1, torch.sigmoid(net.b(x))
    return net.read(q @ (k.transpose(1, 2) @ net.v(x)))


def length_of_positive_channels(net, x):
    return net.out(F.normalize(torch.sigmoid(net.a(x)), dim=-1))


CASES = [
    layer_norm,
    layer_norm_without_parameters,
    functional_layer_norm,
    group_norm,
    functional_group_norm,
    positive_products,
    length_of_positive_channels,
]


def traced(between):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    return surgery.trace(Net(between).double(), x), x


@pytest.mark.parametrize("between", CASES)
@pytest.mark.parametrize("rate", [0.5, 0.25])
def test_slim_is_masked(between, rate):
    module, x = traced(between)
    masked = surgery.masked(module, surgery.split_masks(module, rate))
    slim = surgery.slim(module, rate)
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in module.parameters())
    assert surgery.verify(slim, masked, x).max_rel <= 1e-12


@pytest.mark.parametrize("between", CASES)
def test_masks_are_neither_parameters_nor_in_the_state_dict(between):
    module, _ = traced(between)
    masked = surgery.masked(module, surgery.split_masks(module, 0.5))
    assert masked.state_dict().keys() == module.state_dict().keys()
    assert [n for n, _ in masked.named_parameters()] == [n for n, _ in module.named_parameters()]


@pytest.mark.parametrize("between", CASES)
def test_masks_that_keep_everything_change_nothing(between):
    module, x = traced(between)
    masked = surgery.masked(module, surgery.split_masks(module, 1.0))
    assert surgery.verify(masked, module, x).max_abs == 0
    assert type(masked.get_submodule("layer")) is type(module.get_submodule("layer"))


def test_wels_masks_leave_statistics_as_they_are():
    module, x = traced(layer_norm)
    masks = surgery.split_masks(module, 0.5, kind="wels", seed=0)
    masked = surgery.masked(module, masks)
    assert type(masked.get_submodule("layer")) is nn.LayerNorm
    assert not surgery.verify(masked, module, x).ok


@pytest.mark.parametrize("dump", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("between", [layer_norm, functional_layer_norm, group_norm, positive_products])
def test_a_masked_module_is_copied_and_pickled(between, dump):
    module, x = traced(between)
    masked = surgery.masked(module, surgery.split_masks(module, 0.5))
    twin = dump(masked)
    assert surgery.verify(twin, masked, x, train=True).max_abs == 0
    assert type(twin.get_submodule("layer")) is type(masked.get_submodule("layer"))
    assert surgery.recipe(twin) == surgery.recipe(masked)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in masked.parameters()}


def test_a_norm_that_is_called_twice_leaves_out_the_same_channels_each_time():
    module, x = traced(lambda net, x: net.out(net.layer(net.a(x)) + net.layer(net.a(x) + net.b(x))))
    masked = surgery.masked(module, surgery.split_masks(module, 0.5))
    assert surgery.verify(surgery.slim(module, 0.5), masked, x).max_rel <= 1e-12


def test_a_norm_that_would_leave_out_other_channels_in_another_call_is_refused():
    net = Net(lambda net, x: net.out(net.bare(net.a(x))) + net.other(net.bare(net.b(x))))
    net.other = nn.Linear(8, 3)
    module = surgery.trace(net, torch.randn(2, 5, 4))
    keep = torch.arange(8) < 4
    masks = {"a.weight": keep[:, None].expand(8, 4), "a.bias": keep}
    with pytest.raises(surgery.EditError, match="bare normalises over different channels in each of its calls"):
        surgery.masked(module, masks)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_a_length_of_channels_with_copies_is_the_length_of_one_of_each(p):
    def length(net, x):
        return net.out(F.normalize(net.a(x), p=p, dim=-1, eps=0.5))

    module, x = traced(length)
    wide = surgery.widen(module, 2.0)
    assert wide.get_parameter("a.weight").shape == (16, 4)
    for edited in (wide, surgery.widen(wide, 3.0)):
        assert surgery.verify(edited, module, x).max_rel <= 1e-12
    slim = surgery.slim(wide, 0.3)
    assert surgery.verify(slim, surgery.masked(wide, surgery.split_masks(wide, 0.3)), x).max_rel <= 1e-12
    with pytest.raises(surgery.EditError, match="only whole factors are exact"):
        surgery.widen(module, {"a": 12})


@pytest.mark.parametrize("between", CASES)
@pytest.mark.parametrize("kind", ["kels", "wels"])
def test_masked_is_saved_loaded_copied_and_replayed(between, kind, tmp_path):
    module, x = traced(between)
    masked = surgery.masked(module, surgery.split_masks(module, 0.5, kind=kind))
    surgery.save(masked, tmp_path / "masked")
    torch.manual_seed(1)
    loaded = surgery.load(tmp_path / "masked", model=Net(between).double())
    for twin in (loaded, copy.deepcopy(masked), surgery.apply(module, surgery.recipe(masked))):
        for inputs in (x, torch.randn(3, 5, 4, dtype=torch.float64)):
            assert torch.equal(twin(inputs), masked(inputs))
    assert surgery.recipe(loaded) == surgery.recipe(masked)
    surgery.save(loaded, tmp_path / "again")
    assert torch.equal(surgery.load(tmp_path / "again", model=Net(between).double())(x), masked(x))


@pytest.mark.parametrize("between", CASES)
def test_masked_is_edited_exactly_or_refused(between, tmp_path):
    """What is normalised over a part stays as it is; everything else is widened."""
    module, x = traced(between)
    masked = surgery.masked(module, surgery.split_masks(module, 0.5))
    wide = surgery.widen(masked, 2.0)
    assert surgery.verify(wide, masked, x).max_rel <= 1e-12
    surgery.save(wide, tmp_path / "wide")
    assert torch.equal(surgery.load(tmp_path / "wide", model=Net(between).double())(x), wide(x))
    for group in surgery.dimension_groups(masked):
        if group.editable:
            assert (
                surgery.verify(surgery.reindex(masked, {group.name: group.permutation()}), masked, x).max_rel <= 1e-12
            )
        elif "switched off" in group.reason:
            with pytest.raises(surgery.EditError, match="leaves channels that are switched off out of its statistics"):
                surgery.widen(masked, {group.name: 2 * group.size})


def test_slim_of_masked_is_slim():
    """Where no norm is in the way, the channels that are switched off can be left out."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    module = surgery.trace(layers, x)
    masked = surgery.masked(module, surgery.split_masks(module, 0.5))
    slim = surgery.slim(masked, 0.5)
    assert [type(step).__name__ for step in surgery.recipe(slim).steps] == ["SwitchOff", "Reindex"]
    assert surgery.verify(slim, masked, x).max_rel <= 1e-12
    assert surgery.verify(surgery.slim(module, 0.5), masked, x).max_rel <= 1e-12


def test_masks_of_a_module_whose_norms_are_masked_are_refused():
    for between in (layer_norm, functional_group_norm):
        module, _ = traced(between)
        masked = surgery.masked(module, surgery.split_masks(module, 0.5))
        with pytest.raises(
            surgery.EditError, match=r"already left out of the statistics of .*: mask the module from before"
        ):
            surgery.masked(masked, surgery.split_masks(module, 0.25))


def test_states_follow_weights_that_are_switched_off():
    module, x = traced(layer_norm)
    masked = surgery.masked(module, surgery.split_masks(module, 0.5))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(x).square().sum().backward()
    optimizer.step()
    moved = surgery.transfer_optimizer(optimizer, module, masked)
    for name, parameter in module.named_parameters():
        if parameter in optimizer.state:
            state = moved.state[masked.get_parameter(name)]
            assert torch.equal(state["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nothing": ":"}, "nothing"),
        ({"a.weight": "0:9 x :"}, r"the mask of 'a\.weight' is not one for its shape \(8, 4\)"),
    ],
)
def test_a_switch_off_that_does_not_fit_is_refused(keep, message):
    module, _ = traced(layer_norm)
    with pytest.raises(surgery.UsageError, match=message):
        surgery.apply(module, surgery.SwitchOff(keep))


def test_masked_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    module, _ = traced(layer_norm)
    masked = surgery.masked(module, surgery.split_masks(module, 0.5)).float()
    surgery.export_onnx(masked, tmp_path / "masked.onnx")


POLES = {
    "own length": lambda y: y / y.norm(dim=1, keepdim=True),
    "own spread": lambda y: torch.div((y - y.mean(1, keepdim=True)), other=y.std(1, keepdim=True)),
    "reciprocal": lambda y: y.reciprocal() + 1 / y,
    "log": lambda y: torch.log(y.square()),
    "root": lambda y: y.square().sum(1, keepdim=True).sqrt() + torch.rsqrt(y.square()),
    "power": lambda y: y.square() ** -0.5 + torch.pow(y.abs(), 0.5),
    "remainder": lambda y: y % y.mul(2).exp() + y % y.abs(),
    "by itself": lambda y: y * (y / y),
    "addcdiv": lambda y: torch.addcdiv(y, y, y),
    "logit": lambda y: torch.logit(y.abs() / (1 + y.abs())) + torch.special.ndtri(y.sin() ** 2),
    "area": lambda y: torch.acosh((y * 100).abs() + (y / y)) + y.abs().log2() + y.abs().log10(),
    "gamma": lambda y: y.abs().lgamma() + torch.digamma(y.abs()) + torch.special.entr(y.abs()),
    "by another": lambda y: torch.fmod(y.exp(), y) + torch.xlogy(y, y.abs()) + y.atan2(y) + torch.hypot(y, y),
    "power of floats": lambda y: torch.float_power(y.abs(), 0.3) + y.abs().sqrt_(),
    "in place, by its own length": lambda y: (y * 2).div_(y.norm(dim=1, keepdim=True)),
}
"""What is not finite where a channel is 0, or has no gradient there."""


class Pole(nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.between = between
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


@pytest.mark.parametrize("between", POLES)
def test_a_channel_that_is_divided_by_itself_can_be_switched_off(between):
    model = Pole(POLES[between]).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    traced = surgery.trace(model, x)
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert slim.first.out_features == 4
    found = surgery.verify(slim, masked, x, train=True)
    assert found.max_rel <= 1e-10, found
    expected, given = x.clone().requires_grad_(), x.clone().requires_grad_()
    masked(expected).square().sum().backward()
    slim(given).square().sum().backward()
    torch.testing.assert_close(given.grad, expected.grad, rtol=1e-9, atol=1e-12)
    for name, parameter in masked.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name


IN_PLACE = {
    "sqrt": lambda z: z.sqrt_(),
    "log": torch.log_,
    "power": lambda z: z.pow_(0.5),
    "reciprocal": lambda z: z.reciprocal_(),
    "hypotenuse": lambda z: z.hypot_(z * 2),
    "logit": lambda z: torch.logit_(z, 1e-3),
    "area": lambda z: z.add_(1.5).acosh_(),
    "gamma": lambda z: z.lgamma_(),
    "through a view": lambda z: z.view_as(z).log2_(),
    "remainder": lambda z: z.fmod_(0.3),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_what_an_op_with_a_pole_changes_in_place_is_known_by_its_old_name(change):
    def between(y):
        z = y.square()
        IN_PLACE[change](z)
        return z * y

    model = Pole(between).double()
    traced = surgery.trace(model, torch.randn(2, 5, 4, dtype=torch.float64))
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert slim.first.out_features == 4
    for batch in (1, 3):
        x = torch.randn(batch, 5, 4, dtype=torch.float64)
        first = model.first(x)[..., :4]  # switched off by hand
        expected = F.linear(between(first), model.last.weight[:, :4], model.last.bias)
        torch.testing.assert_close(slim(x), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(masked(x), expected, rtol=1e-10, atol=1e-12)


def test_what_is_divided_in_place_by_itself_is_known_by_its_old_name():
    def between(y):
        z = y * 2
        z.div_(z)  # torch has no gradient for it
        return z * y

    model = Pole(between).double()
    traced = surgery.trace(model, torch.randn(2, 5, 4, dtype=torch.float64))
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    with torch.no_grad():
        for batch in (1, 3):
            x = torch.randn(batch, 5, 4, dtype=torch.float64)
            torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)
