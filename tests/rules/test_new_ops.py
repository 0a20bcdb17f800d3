"""An activation, a norm and a concatenation of one's own cost one row of the table each, and a sample to check it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.graph.rule_table import restore_rules


def clip(x, high=1.0):
    """Idempotent, and a function alone."""
    return torch.minimum(torch.maximum(x, x.new_zeros(())), x.new_tensor(high))


class Bump(nn.Module):
    """Not idempotent, and a layer alone."""

    def __init__(self, sharpness=1.5):
        super().__init__()
        self.sharpness = sharpness

    def forward(self, x):
        return x * torch.exp(-self.sharpness * x.square())


class MeanNorm(nn.Module):
    """Divides by the mean of absolute values over channels."""

    def __init__(self, width):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-3

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.gain


def mean_norm_over(input, keep, gain, eps):
    factor = keep.to(input.dtype)
    return input / ((input.abs() * factor).sum(-1, keepdim=True) / factor.sum() + eps) * gain * factor


def join(parts, dim):
    return torch.cat([part.clone() for part in parts], dim)


torch.fx.wrap("clip")
torch.fx.wrap("join")


@pytest.fixture
def own_rows():
    """One row for each op."""
    with restore_rules():

        @surgery.oprule(clip, kind="idempotent", within=(0.0, 1.0))
        @surgery.oprule(Bump, kind="activation")
        def _activation(op, x, *settings):
            return op.elementwise(x)

        @surgery.oprule(MeanNorm, kind="norm", zeros=("gain",), over=mean_norm_over)
        def _mean_norm(op, x):
            op.mixes(op.per_position(x, x.ndim - 1, op.param("gain").at(0)), x.ndim - 1, x.ndim - 1)
            return x.fields

        @surgery.oprule(join, kind="concatenation")
        def _join(op, parts, dim):
            return op.concatenates(parts, dim)

        yield


def t(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


SAMPLES = {
    "clip": (clip, (t(3, 4),), {("0", 0), ("0", 1)}),
    "Bump": (Bump(), (t(3, 4),), {("0", 0), ("0", 1)}),
    "MeanNorm": (MeanNorm(4), (t(2, 4),), {("0", 0), ("0", 1), ("gain", 0)}),
    "join": (join, ([t(2, 3), t(2, 4)], 1), {("0.0", 0), ("0.0", 1), ("0.1", 0), ("0.1", 1)}),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_row_is_checked_by_a_sample(own_rows, name):
    op, args, free = SAMPLES[name]
    assert surgery.check_rule(op, *args).free == free


class Net(nn.Module):
    """A stem, a dense block of two layers that are joined, a norm, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(10, 4)
        self.bump, self.norm, self.head = Bump(), MeanNorm(14), nn.Linear(14, 2)

    def forward(self, x):
        x = clip(self.stem(x))
        y = join([x, self.bump(self.one(x))], -1)
        return self.head(self.norm(join([y, self.bump(self.two(y))], -1)))


@pytest.fixture
def traced(own_rows):
    torch.manual_seed(0)
    net = Net().double()
    for parameter in net.parameters():
        parameter.data.uniform_(0.3, 1.2).mul_(torch.randn(parameter.shape).sign())
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    traced = surgery.trace(net, x)
    assert surgery.verify(traced, net, x, train=True).max_rel <= 1e-10
    return net, traced, (x, torch.randn(3, 4, 3, dtype=torch.float64))


def test_every_group_is_editable_permuted_and_widened(traced):
    net, traced, batches = traced
    groups = [g for g in surgery.dimension_groups(traced) if "network" not in g.reason]
    assert [g.name for g in groups if not g.editable] == []
    assert {g.name for g in groups} == {"stem", "one", "two"}
    same = surgery.reindex(traced, {g.name: g.permutation(seed=1) for g in groups})
    wide = surgery.widen(traced, 2.0, seed=0)
    assert wide.get_submodule("norm").gain.shape == (28,)
    for x in batches:
        assert surgery.verify(same, net, x, train=True).max_rel <= 1e-10
        assert surgery.verify(wide, net, x, train=True).max_rel <= 1e-10


def test_slim_equals_masked(traced):
    net, traced, batches = traced
    slim, kept = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert slim.get_submodule("norm").gain.shape == (7,)
    for x in batches:
        assert surgery.verify(slim, kept, x).max_rel <= 1e-10
        assert surgery.verify(kept, net, x).max_rel > 1e-3


def test_an_idempotent_activation_is_put_behind_an_identity_layer(traced, tmp_path):
    net, traced, batches = traced
    deep = surgery.deepen(traced, ["stem"])
    step = surgery.recipe(deep).steps[0]
    assert (step.form, step.activation) == ("layer", f"{__name__}.clip")
    surgery.save(deep, tmp_path / "deep")
    again = surgery.load(tmp_path / "deep", model=Net().double())
    for x in batches:
        assert surgery.verify(deep, net, x).max_rel <= 1e-10
        assert surgery.verify(again, deep, x).max_rel <= 1e-10


def test_another_activation_gets_a_residual_layer(traced):
    net, traced, batches = traced
    deep = surgery.deepen(traced, ["one"])
    step = surgery.recipe(deep).steps[0]
    assert (step.form, step.activation) == ("residual", f"{__name__}.Bump")
    assert any(isinstance(m, Bump) for n, m in deep.named_modules() if n.startswith(step.name))
    for x in batches:
        assert surgery.verify(deep, net, x).max_rel <= 1e-10


def test_a_hint_ends_in_the_activation(own_rows):
    x = t(2, 3)
    pair = surgery.attach_hint(surgery.trace(Net().double(), x), surgery.trace(Net().double(), x), "stem", "one")
    assert repr(pair.regressor[-1]) == "Bump()"
    pair = surgery.attach_hint(surgery.trace(Net().double(), x), surgery.trace(Net().double(), x), "one", "stem")
    assert repr(pair.regressor[-1]) == "Applied(clip)"


def test_a_layer_of_a_dense_block_is_added_where_joins_are_known(own_rows):
    torch.manual_seed(0)
    net = Dense().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    traced = surgery.trace(net, x)
    deep = surgery.deepen(traced, ["block"])
    assert [type(s).__name__ for s in surgery.recipe(deep).steps] == ["InsertDense"]
    assert surgery.verify(deep, net, x).max_rel <= 1e-10


class Layer(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.linear, self.act = nn.Linear(inputs, 3), Bump()

    def forward(self, parts):
        return self.act(self.linear(join(parts, 1)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(3, 4), Block(), nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = Layer(4), Layer(7)

    def forward(self, x):
        parts = [x]
        for layer in (self.layer1, self.layer2):
            parts.append(layer(parts))
        return join(parts, 1)
