"""One op has one record, however it is spelled: what is known of a layer is known of the function too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery.graph import rule_table

ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu, torch.relu, lambda x: x.relu()),
    "relu6": (nn.ReLU6(), F.relu6),
    "celu": (nn.CELU(0.7), lambda x: F.celu(x, 0.7), lambda x: torch.celu(x, alpha=0.7)),
    "softplus": (nn.Softplus(2.0, 15.0), lambda x: F.softplus(x, 2.0, threshold=15.0)),
    "softsign": (nn.Softsign(), F.softsign),
    "logsigmoid": (nn.LogSigmoid(), F.logsigmoid),
    "tanhshrink": (nn.Tanhshrink(), F.tanhshrink),
    "hardtanh": (nn.Hardtanh(-0.5, 0.8), lambda x: F.hardtanh(x, -0.5, 0.8), lambda x: F.hardtanh_(x, -0.5, 0.8)),
    "threshold": (nn.Threshold(0.1, 0.3), lambda x: F.threshold(x, 0.1, 0.3, inplace=True)),
    "rrelu": (nn.RReLU(0.2, 0.4), lambda x: F.rrelu(x, 0.2, 0.4)),
    "elu": (nn.ELU(0.6), lambda x: F.elu(x, alpha=0.6)),
    "leaky_relu": (nn.LeakyReLU(0.3), lambda x: F.leaky_relu(x, 0.3)),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid_()),
}


class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(3, 6), nn.Linear(6, 2), act

    def forward(self, x):
        return self.b(self.act(self.a(x)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_regressor_ends_in_the_hints_activation_however_it_is_spelled(name):
    x = torch.randn(5, 3)
    student = surgery.trace(Net(nn.Tanh()), x)
    for act in ACTIVATIONS[name]:
        hint = surgery.attach_hint(student, surgery.trace(Net(act), x), "a", "a")
        assert [repr(layer) for layer in hint.regressor] == [
            "Linear(in_features=6, out_features=6, bias=True)",
            repr(ACTIVATIONS[name][0]),
        ]


@pytest.mark.parametrize("name", ["softplus", "celu", "hardtanh", "threshold"])
def test_a_network_is_deepened_alike_however_its_activation_is_spelled(name):
    x = torch.randn(5, 3, dtype=torch.float64)
    steps = []
    for act in ACTIVATIONS[name][:2]:
        net = Net(act).double()
        deep = surgery.deepen(surgery.trace(net, x), ["a"])
        assert surgery.verify(deep, net, x).max_rel <= 1e-10
        steps.append(surgery.recipe(deep).steps)
    assert steps[0] == steps[1]


def test_every_activation_makes_the_layer_that_its_name_says():
    for rule in {id(r): r for r in rule_table._FUNCTIONS.values() if r.activation}.values():
        assert rule_table.activation_named(rule.name) is rule
        assert rule.layer is getattr(nn, rule.name)


def test_bounds_are_kept_by_what_is_bounded():
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    checked = 0
    for target, rule in rule_table._FUNCTIONS.items():
        if rule.activation and isinstance(rule.within, tuple):
            least, greatest = rule.within
            y = target(x.clone())
            assert ((least <= y) & (y <= greatest)).all(), target
            checked += 1
        if rule.kind == "idempotent":
            once = target(x.clone())
            assert torch.equal(target(once.clone()), once), target
    assert checked > 8


def test_unknown_words_are_refused_with_those_there_are():
    with pytest.raises(surgery.UsageError, match="unknown word 'bach norm' for the kind of an op: one of 'act"):
        surgery.oprule(torch.special.expit, kind="bach norm")


RMS_NORMS = {
    "layer": lambda: nn.RMSNorm(6, eps=1e-3),
    "without eps": lambda: nn.RMSNorm(6),
    "without weight": lambda: nn.RMSNorm(6, elementwise_affine=False),
    "function": lambda: Scaled(lambda x, w: F.rms_norm(x, (6,), w, 1e-3)),
    "function of the size it finds": lambda: Scaled(lambda x, w: F.rms_norm(x, x.shape[-1:], weight=w)),
}


class Scaled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.gain, self.function = nn.Parameter(torch.ones(6)), function

    def forward(self, x):
        return self.function(x, self.gain)


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norm_is_permuted_widened_and_slimmed_exactly(name):
    torch.manual_seed(1)
    net = Net(RMS_NORMS[name]()).double()
    for parameter in net.parameters():
        parameter.data.uniform_(0.2, 1.5).mul_(torch.randn(parameter.shape).sign())
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    traced = surgery.trace(net, x)
    group = next(g for g in surgery.dimension_groups(traced) if g.name == "a")
    assert group.editable, group.reason
    assert group.mixed
    wide, same = surgery.widen(traced, 2.0, seed=0), surgery.reindex(traced, {"a": group.permutation(seed=1)})
    slim, kept = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    for batch in (x, x[:1], torch.randn(3, 7, 3, dtype=torch.float64)):
        assert surgery.verify(wide, net, batch, train=True).max_rel <= 1e-10
        assert surgery.verify(same, net, batch, train=True).max_rel <= 1e-10
        assert surgery.verify(slim, kept, batch).max_rel <= 1e-10
        if name == "layer":
            assert torch.allclose(kept(batch), three_channels(net, batch), rtol=1e-10, atol=1e-12)


def three_channels(net, x):
    """The first three channels alone, written out."""
    y = x @ net.a.weight[:3].T + net.a.bias[:3]
    y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-3) * net.act.weight[:3]
    return y @ net.b.weight[:, :3].T + net.b.bias


class Greatest(nn.Module):
    """Returns the greatest channels with their positions."""

    def __init__(self, find, python):
        super().__init__()
        self.a, self.find, self.python = nn.Linear(3, 6), find, python

    def forward(self, x):
        y = self.a(x)
        return self.find(y if not self.python or y.sum() > -1e9 else -y)


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("find", [lambda y: y.max(-1), lambda y: torch.min(y, -1), lambda y: {"all": y.max(dim=-1)}])
def test_channels_whose_positions_are_returned_are_left_alone(find, python):
    traced = surgery.trace(Greatest(find, python).double(), torch.rand(2, 3, dtype=torch.float64))
    assert not any(g.editable for g in surgery.dimension_groups(traced) if g.name == "a")


class Measured(nn.Module):
    """Divided by a length of itself."""

    def __init__(self, length):
        super().__init__()
        self.length = length
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x)
        return self.b(y / self.length(y))


LENGTHS = {
    "of channels": (lambda y: torch.linalg.norm(y, ord=3, dim=-1, keepdim=True), True),
    "of channels, by their number": (lambda y: torch.linalg.norm(y, ord=1, dim=(-1,), keepdim=True), True),
    "of all": (lambda y: torch.linalg.norm(y), True),
    "of a matrix": (lambda y: torch.linalg.norm(y, ord=1, dim=(1, 2), keepdim=True), False),
    "greatest": (lambda y: torch.linalg.norm(y, ord=float("-inf"), dim=-1, keepdim=True), False),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_of_vectors_follow_an_edit_and_those_of_matrices_are_left_alone(name):
    length, editable = LENGTHS[name]
    model = Measured(length).double().eval()
    traced = surgery.trace(model, torch.randn(2, 5, 4, dtype=torch.float64))
    group = next(g for g in surgery.dimension_groups(traced) if g.name == "a")
    assert group.editable == editable
    wide, slim = surgery.widen(traced, 2.0 if editable else {}), surgery.slim(traced, {"a": 0.5} if editable else {})
    masked = surgery.masked(traced, surgery.split_masks(traced, {"a": 0.5} if editable else {}))
    assert (wide.a.out_features, slim.a.out_features) == ((12, 3) if editable else (6, 6))
    for batch in (1, 3):
        x = torch.randn(batch, 5, 4, dtype=torch.float64)
        torch.testing.assert_close(wide(x), model(x), rtol=1e-10, atol=0)
        torch.testing.assert_close(slim(x), masked(x), rtol=1e-10, atol=0)


def test_what_a_product_is_added_to_is_written_by_its_bias():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            return self.last(torch.addmm(self.bias, x, self.weight))

    traced = surgery.trace(Added().double(), torch.randn(5, 4, dtype=torch.float64))
    roles = {m.name: m.role for g in surgery.dimension_groups(traced) for m in g.members if g.size == 6}
    assert roles == {"weight": "producer", "bias": "producer", "last.weight": "consumer"}
