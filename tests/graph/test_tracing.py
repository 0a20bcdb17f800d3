"""Tracing: faithful in both modes, and nothing of the original touched."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery.graph.tracing import info


class DropPath(nn.Module):
    """As users write it: Python that branches on the module's own flag."""

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.5, dtype=x.dtype)) / 0.5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.drop_path = DropPath()
        self.inner = Inner()
        self.fc = nn.Linear(8, 5)
        self.spare = nn.Linear(2, 2)  # never used
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))

    def forward(self, x, scale: float = 1.0):
        x = self.drop_path(F.relu(self.bn(self.conv(x)))) + self.shift * 2
        return self.fc(self.inner(x).mean((2, 3))) * scale


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return F.dropout(self.conv(x), 0.5, training=self.training)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def same(a, b, train):
    return surgery.verify(a, b, X, train=train, seed=5).max_abs == 0.0


@pytest.mark.parametrize("train", [False, True])
def test_dropout_droppath_and_functional_flags_follow_the_mode(net, train):
    traced = surgery.trace(net, X)
    assert same(traced, net, train)
    outputs = {t: traced.train(t)(X) for t in (False, True)}
    assert not torch.equal(outputs[False], outputs[True])


def test_a_submodule_frozen_in_eval_stays_frozen_while_the_rest_trains(net):
    net.train()
    net.bn.eval()
    net.inner.eval()
    net.drop_path.eval()
    traced = surgery.trace(net, X)
    assert [m.training for m in (traced, traced.bn, traced.inner, traced.drop_path)] == [True, False, False, False]
    before = traced.bn.running_mean.clone()
    assert torch.equal(traced(X), net(X))  # no randomness is left
    assert torch.equal(traced.bn.running_mean, before)
    wide = surgery.widen(traced, 2.0)
    assert [m.training for m in (wide, wide.bn, wide.inner, wide.drop_path)] == [True, False, False, False]


def test_tracing_leaves_the_model_and_the_random_state_as_they_were(net):
    net.train()
    net.bn.eval()
    handle = net.conv.register_forward_hook(lambda m, i, o: None)
    state = copy.deepcopy(net.state_dict())
    classes = [type(m) for m in net.modules()]
    modes = [m.training for m in net.modules()]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    surgery.slim(surgery.trace(net, X), 0.5)
    assert torch.equal(torch.rand(1), expected)
    assert [type(m) for m in net.modules()] == classes
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert list(net.conv._forward_hooks) == [handle.id]


def test_names_unused_parameters_and_storage_are_the_results_own(net):
    traced = surgery.trace(net, X)
    assert list(traced.state_dict()) == list(net.state_dict())
    theirs = {t.untyped_storage().data_ptr() for t in net.state_dict().values()}
    assert not theirs & {t.untyped_storage().data_ptr() for t in traced.state_dict().values()}


def test_a_traced_module_survives_deepcopy_and_pickle(net):
    traced = surgery.trace(net, X)
    for twin in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert same(twin, traced, False)
        assert same(twin, traced, True)
        assert list(twin.state_dict()) == list(traced.state_dict())
        assert info(twin) == info(traced)


def test_buffers_are_read_when_the_module_runs_not_when_it_is_traced(net):
    traced = surgery.trace(net.eval(), X)
    before = traced(X)
    traced.shift.add_(1.0)
    assert not torch.allclose(traced(X), before)


def test_arguments_that_are_no_tensors_become_constants(net):
    traced = surgery.trace(net.eval(), X, kwargs={"scale": 3.0})
    assert torch.equal(traced(X, 3.0), net(X, 3.0))


def test_other_batch_and_image_sizes_run(net):
    traced = surgery.trace(net.eval(), X)
    x = torch.randn(1, 3, 9, 7, dtype=torch.float64)
    assert torch.equal(traced(x), net(x))


def test_shared_layers_stay_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.c = nn.Linear(4, 4)
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    model = Shared().double()
    x = torch.randn(2, 4, dtype=torch.float64)
    traced = surgery.trace(model, x)
    assert traced.a is traced.b
    assert traced.a.weight is traced.c.weight
    assert surgery.verify(traced, model, x).max_abs == 0.0


def test_a_model_that_cannot_be_traced_says_where():
    class Loop(nn.Module):
        def forward(self, x):
            while x.sum() > 1:
                x = x / 2
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.loop = Loop()

        def forward(self, x):
            return self.loop(x)

    with pytest.raises(surgery.TraceError, match=r"Outer cannot be traced.*in 'loop'"):
        surgery.trace(Outer(), torch.ones(3))


def test_inputs_that_do_not_fit_are_refused(net):
    with pytest.raises(surgery.UsageError, match=r"example_inputs do not fit Net\.forward"):
        surgery.trace(net, (X, 1.0, X))


def test_what_was_not_traced_is_refused(net):
    with pytest.raises(surgery.UsageError, match=r"pass it through surgery\.trace first"):
        surgery.dimension_groups(net)
    with pytest.raises(surgery.UsageError, match=r"pass it through surgery\.trace first"):
        surgery.slim(net, 0.5)


@pytest.mark.filterwarnings("ignore")
def test_results_compile_and_export(net):
    slim = surgery.slim(surgery.trace(net, X), 0.5).eval()
    expected = slim(X)
    assert torch.allclose(torch.compile(slim, backend="eager")(X), expected)
    assert torch.allclose(torch.export.export(slim, (X,)).module()(X), expected)


def test_modules_that_nobody_holds_are_freed_with_their_analysis(net):
    traced = surgery.trace(net, X)
    slim = surgery.slim(traced, 0.5)
    surgery.dimension_groups(slim)
    watched = [weakref.ref(traced), weakref.ref(slim), weakref.ref(slim.conv.weight)]
    del traced, slim
    gc.collect()
    assert [w() for w in watched] == [None, None, None]


def test_example_inputs_repeat_the_traced_shapes_with_another_batch(net):
    traced = surgery.trace(net, X)
    state = torch.random.get_rng_state()
    (x,), kwargs = surgery.example_inputs(traced, batch_size=7)
    assert x.shape == (7, 3, 6, 6)
    assert x.dtype == torch.float64
    assert kwargs == {}
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="torch was built without int8 kernels")
def test_a_model_converted_to_int8_is_refused_with_what_to_do_instead():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    converted = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    with pytest.raises(surgery.UsageError, match=r"'0' is converted to int8.*in its float form, then quantize"):
        surgery.trace(converted, torch.randn(2, 4))
    surgery.trace(net, torch.randn(2, 4))
