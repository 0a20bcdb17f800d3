"""Every rule of an op holds for its samples, and every row of the tables has some; `surgery.check_rule` finds lies.

Where ops share a rule it is tried in full for one of them, and for the others with every axis holding channels.
``SURGERY_EXAMPLES=1000 pytest tests/test_op_rules.py`` tries all of them in full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.graph import rule_table
from surgery.graph.rule_table import NodeEdit
from surgery.operations import rule_samples as probe
from surgery.operations.check_rule import _check
from tests.rules.samples import NO_SAMPLE, SAMPLES, Sample

EVERYTHING = int(os.environ.get("SURGERY_EXAMPLES", "0")) >= 1000


def case(k: int, sample: Sample) -> Any:
    marks = [pytest.mark.xfail(reason=sample.wrong, strict=True)] if sample.wrong else []
    return pytest.param(sample, id=f"{sample.name}-{k}", marks=marks)


@pytest.mark.parametrize("sample", [case(k, s) for k, s in enumerate(SAMPLES)])
@pytest.mark.filterwarnings("ignore")
def test_a_rule_holds_for_its_samples(sample):
    with numbers_in_new_memory("empty" in sample.name):
        if first_of_its_rule(sample) or sample.wrong or EVERYTHING:
            check = surgery.check_rule(sample.op, *sample.args, **sample.kwargs)
            assert sample.free <= check.free, {axis: check.frozen.get(axis) for axis in sample.free - check.free}
        else:
            _check(probe.Sample(sample.op, sample.args, sample.kwargs), probe.Variant())


def first_of_its_rule(sample: Sample) -> bool:
    """Whether the op is the first one that has samples among those that share a rule."""
    return sample.target is next(s.target for s in SAMPLES if rule_of(s) is rule_of(sample))


def rule_of(sample: Sample) -> Any:
    tables: tuple[dict[Any, rule_table.Rule], ...] = (rule_table._FUNCTIONS, rule_table._METHODS, rule_table._MODULES)
    return next((rows[sample.target].relate for rows in tables if sample.target in rows), None)


def test_every_rule_has_a_sample():
    sampled = [s.target for s in SAMPLES]
    rows = [*rule_table._FUNCTIONS, *rule_table._METHODS, *rule_table._MODULES]
    assert [row for row in rows if row not in sampled and row not in NO_SAMPLE] == []


@contextmanager
def numbers_in_new_memory(wanted: bool) -> Iterator[None]:
    """Uninitialised tensors are all NaN, so that two of them can be compared."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------------------
# Several ops of the table in a row


class Chain(nn.Module):
    """A convolution, some movements, and a layer that reads what they give."""

    def __init__(self, move, last):
        super().__init__()
        self.a, self.b, self.last, self.move = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), last, move

    def forward(self, x):
        return self.last(self.move(self.a(x).relu(), self.b(x)))


CHAINS = {
    "factors to the end": (lambda a, b: a.unflatten(1, (2, 3)).permute(0, 3, 4, 1, 2).flatten(3), nn.Linear(6, 2)),
    "factors turned": (lambda a, b: a.unflatten(1, (2, 3)).permute(0, 4, 3, 2, 1).flatten(3), nn.Linear(6, 2)),
    "some channels at one place": (lambda a, b: a[:, 1:5, 0, 1], nn.Linear(4, 2)),
    "some channels at some places": (lambda a, b: a[:, 1:5, None, :1, 1:], nn.Conv3d(4, 2, 1)),
    "the size of another": (lambda a, b: a.flatten(2).view_as(b) * 2, nn.Conv2d(6, 2, 1)),
    "as large as another": (lambda a, b: a.mean(3, keepdim=True).expand_as(b), nn.Conv2d(6, 2, 1)),
    "the largest, by name": (lambda a, b: a.max(3).values.select(-1, 0), nn.Linear(6, 2)),
    "turned by an attribute": (lambda a, b: a.mean(3).mT.data, nn.Linear(6, 2)),
    "on another device": (lambda a, b: a.cpu().to("cpu").to(device=b.device), nn.Conv2d(6, 2, 1)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_movements_follows_every_edit(name):
    move, last = CHAINS[name]
    torch.manual_seed(0)
    net, inputs = Chain(move, last).double(), torch.randn(2, 3, 4, 5).double()
    traced = surgery.trace(net, inputs)
    group = next(g for g in surgery.dimension_groups(traced) if g.name == "a")
    assert group.editable, group.reason
    for edited in (
        surgery.widen(traced, {"a": 2.0}, seed=0),
        surgery.widen(traced, {"a": 8}, seed=1),
        surgery.reindex(traced, {"a": group.permutation(seed=1)}),
    ):
        assert surgery.verify(edited, net, inputs).max_rel <= 1e-10
        assert surgery.verify(edited, net, inputs[:1, :, :3, :4]).max_rel <= 1e-10
    slim = surgery.slim(traced, {"a": 0.5})
    kept = surgery.masked(traced, surgery.split_masks(traced, {"a": 0.5}))
    assert surgery.verify(slim, kept, inputs).max_rel <= 1e-10


class Turned(nn.Module):
    """Python that is not traced reads an attribute of a tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x if x.sum() < 1e9 else -x)
        return self.b(y.mT.contiguous().mT.data)


def test_an_attribute_that_turns_axes_is_followed_outside_graphs_too():
    net, inputs = Turned().double(), torch.randn(2, 4, 3).double()
    traced = surgery.trace(net, inputs)
    assert surgery.verify(surgery.widen(traced, {"a": 2.0}), net, inputs).max_rel <= 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# The checker


@pytest.fixture
def rule():
    """`surgery.oprule`, undone after the test."""
    with rule_table.restore_rules():
        yield surgery.oprule


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mixing(x):
    return x + x.mean(1, keepdim=True)


def test_a_user_adds_and_checks_a_rule_in_a_few_lines(rule):
    @rule(torch.special.expit)
    def expit(op, input):
        return op.elementwise(input)

    assert surgery.check_rule(torch.special.expit, x(2, 3, 4)).free == {("0", 0), ("0", 1), ("0", 2)}


def _gated(x, gain):
    return torch.logcumsumexp(x[None], 0)[0] * gain[:, None, None]


@torch.fx.wrap
def wrapped(x, gain):
    return _gated(x, gain)


class Gated(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.gain, self.b = nn.Conv2d(3, 6, 1), nn.Parameter(torch.rand(6)), nn.Conv2d(6, 2, 1)
        self.function = function

    def forward(self, x):
        y = self.a(x)
        return self.b(_gated(y, self.gain) if self.function == "plain" else wrapped(y, gain=self.gain))


@pytest.mark.parametrize("function", ["plain", "wrapped"])
def test_a_python_function_with_a_rule_is_called_as_a_whole(rule, function):
    net, inputs = Gated(function).double(), x(2, 3, 4, 5).double()

    def group():
        traced = surgery.trace(net, inputs)
        return traced, next(g for g in surgery.dimension_groups(traced) if g.name == "a")

    assert not group()[1].editable
    before = _gated, wrapped

    @rule(_gated, wrapped)
    def gated(op, x, gain):
        op.per_position(x, 1, gain.at(0))
        return x.fields

    traced, found = group()
    assert (_gated, wrapped) == before
    assert found.editable, found.reason
    assert not found.frozen.any()
    assert surgery.verify(surgery.widen(traced, {"a": 2.0}), net, inputs).max_rel <= 1e-10


def test_an_op_that_mixes_channels_is_not_elementwise(rule):
    rule(mixing)(lambda op, x: op.elementwise(x))
    with pytest.raises(
        surgery.VerificationError,
        match=r"the rule of mixing is wrong: changing position 0 on axis 1 of argument 0 changes its result at "
        r"\(0, 1, 0\), which the rule does not label with that channel",
    ):
        surgery.check_rule(mixing, x(2, 3, 4))


def test_a_rule_that_freezes_what_is_mixed_is_true_and_says_so(rule):
    rule(mixing)(lambda op, x: op.keep(x, [1], "mixing takes a mean over it"))
    check = surgery.check_rule(mixing, x(2, 3, 4))
    assert check.free == {("0", 0), ("0", 2)}
    assert check.frozen == {("0", 1): "mixing takes a mean over it"}


def weighted(x):
    return x * torch.arange(1.0, x.shape[1] + 1, device=x.device)[:, None]


def test_channels_with_weights_of_their_own_cannot_be_exchanged(rule):
    rule(weighted)(lambda op, x: op.elementwise(x))
    with pytest.raises(
        surgery.VerificationError,
        match=r"with channels permuted along axis 0 of argument 0, axis 1 of argument 0, axis 2 of argument 0 its "
        r"result at \(0, 0, 0\) is not what the rule's labels say",
    ):
        surgery.check_rule(weighted, x(2, 3, 4))


def reverse(x):
    return x.flip(1)


def test_a_movement_that_goes_elsewhere_than_its_labels_is_found(rule):
    rule(reverse, movement=True)(lambda op, x: x.fields)
    with pytest.raises(surgery.VerificationError, match=r"position 0 on axis 1 .* changes its result at \(0, 2\)"):
        surgery.check_rule(reverse, x(2, 3))


def gained(x, gain):
    return x * gain


def test_an_axis_that_another_tensor_has_without_channels_is_not_free(rule):
    @rule(gained)
    def one_sided(op, x, gain):
        for f, g in zip(x.fields, gain.fields, strict=False):
            op.tie(f, g)
        return x.fields

    with pytest.raises(surgery.VerificationError, match=r"position 0 on axis 0 of argument 1 .*holding none"):
        surgery.check_rule(gained, x(3, 4), x(3, 4))
    rule(gained)(lambda op, x, gain: op.elementwise(x, gain))
    assert len(surgery.check_rule(gained, x(3, 4), x(3, 4)).free) == 4


class Dense(nn.Module):
    """A linear layer of one's own, with a size among its attributes."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.outputs = outputs
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return (x @ self.kernel).view(*x.shape[:-1], self.outputs)


def dense(op, x):
    kernel = op.param("kernel")
    read, rest = op.axis(x, -1)
    op.consumes(kernel.at(0))
    op.tie(read, kernel.at(0))
    op.produces(kernel.at(1))
    return (*rest, type(kernel.at(1))((x.ndim - 1,), kernel.at(1).ids))


def resized(site: NodeEdit) -> None:
    site.module.outputs = site.module.kernel.shape[1]


def test_a_layer_of_ones_own_is_checked_with_its_parameters(rule):
    rule(Dense, rewrite=resized)(dense)
    check = surgery.check_rule(Dense(3, 4), x(2, 3))
    assert check.free == {("0", 0), ("0", 1), ("kernel", 0), ("kernel", 1)}


def test_a_forgotten_rewrite_is_found(rule):
    rule(Dense)(dense)
    with pytest.raises(surgery.VerificationError, match="a network around it cannot be run when widened"):
        surgery.check_rule(Dense(3, 4), x(2, 3))


def test_a_consumer_that_is_called_something_else_is_found(rule):
    def careless(op, x):
        op.per_channel(op.param("kernel").at(0))
        op.claimed.clear()
        fields = dense(op, x)
        op._ledger.findings.axes["op.kernel", 0].roles.discard("consumer")
        return fields

    rule(Dense, rewrite=resized)(careless)
    with pytest.raises(surgery.VerificationError, match="position 0 on axis 1 of argument 0"):
        surgery.check_rule(Dense(3, 4), x(2, 3))


def test_an_op_without_a_rule_is_an_error_that_says_what_to_do():
    with pytest.raises(surgery.UsageError, match=r"logcumsumexp has no rule: register one with surgery\.oprule"):
        surgery.check_rule(torch.logcumsumexp, x(2, 3), 1)
