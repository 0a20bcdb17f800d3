"""Gradients of a traced model are those of the model, whatever its Python says about them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import surgery

D = torch.float64


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad * ctx.scale, None


class Rounded(torch.autograd.Function):
    """In the newer form, with two outputs."""

    @staticmethod
    def forward(x):
        return x.mul(4).round() / 4, x.sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, grad, sums):
        return grad + sums.unsqueeze(-1).expand(ctx.shape)


reverse = Reversed.apply


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)


class Reversal(Two):
    def forward(self, x):
        return self.b(reverse(self.a(x).relu(), 0.5))


class StraightThrough(Two):
    def forward(self, x):
        rounded, sums = Rounded.apply(self.a(x))
        return self.b(rounded) * sums.unsqueeze(-1)


class NoGrad(Two):
    def forward(self, x):
        with torch.no_grad():
            y = self.a(x).relu()
            with torch.enable_grad():
                z = self.a(x).sigmoid()
        return self.b(y + z)


class Decorated(Two):
    @torch.no_grad()
    def features(self, x):
        return self.a(x).relu()

    def forward(self, x):
        return self.b(self.features(x) + x.sum(-1, keepdim=True))


class DecoratedForward(Two):
    @torch.set_grad_enabled(False)
    def inner(self, x):
        return self.a(x)

    @torch.enable_grad()
    def forward(self, x, scale=None):
        return self.b(self.inner(x) * self.a(x))


class Switched(Two):
    def forward(self, x):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = self.a(x)
        torch.set_grad_enabled(before)
        return self.b(y + self.a(x))


class SwitchedByMode(Two):
    def forward(self, x):
        with torch.set_grad_enabled(not self.training):
            y = self.a(x)
        return self.b(y)


class Inference(Two):
    def forward(self, x):
        with torch.inference_mode():
            y = self.a(x).relu()
        return self.b(y.clone())


class Half(Two):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x.float())
            with torch.autocast("cpu", enabled=False):
                z = self.a(x.float())
        return self.b(y.float() * z).double()


class Detached(Two):
    def forward(self, x):
        y = self.a(x)
        return self.b(y.detach() * y + y.data)


class Checkpointed(Two):
    def forward(self, x):
        y = checkpoint(self.a, x * 2, use_reentrant=False)
        return checkpoint(lambda v: self.b(v.relu()), y, use_reentrant=True)


class Hooked(Two):
    def forward(self, x):
        y = self.a(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 3)
        return self.b(y)


MODELS = [
    *(Reversal, StraightThrough, NoGrad, Decorated, DecoratedForward, Switched, SwitchedByMode, Inference, Detached),
    *(Checkpointed, Hooked),
]


def gradients(model, x, dtype=D):
    x = x.clone().requires_grad_()
    model = copy.deepcopy(model)
    result = model(x)
    result.square().sum().backward()
    return {"output": result.detach(), "input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def make(cls):
    torch.manual_seed(0)
    return cls().double().train()


def assert_same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0, msg=name)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("cls", MODELS)
def test_gradients_of_inputs_and_parameters_are_the_models(cls):
    model = make(cls)
    traced = surgery.trace(model, torch.rand(3, 4, dtype=D))
    for batch in (3, 2):
        x = torch.randn(batch, 4, dtype=D)
        for training in (True, False):
            assert_same(gradients(traced.train(training), x), gradients(model.train(training), x))
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
        assert traced(x).requires_grad == model(x).requires_grad
    assert torch.is_grad_enabled()


def test_autocast_is_kept_in_the_precision_of_results():
    torch.manual_seed(0)
    model = Half()
    traced = surgery.trace(model, torch.rand(3, 4))
    x = torch.randn(2, 4)
    assert_same(gradients(traced, x), gradients(model, x))
    model.a.bfloat16(), traced.a.bfloat16()


@pytest.mark.parametrize("which", ["mode flag", "size"])
def test_autocast_that_python_switches_is_a_graph_that_switches_it(which, capfd):
    class Switched(Two):
        def forward(self, x):
            enabled = self.training if which == "mode flag" else x.shape[1] > 3
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                y = self.a(x)
            return self.b(y.to(x.dtype))

    torch.manual_seed(0)
    model = Switched()
    traced = surgery.trace(model, torch.rand(3, 4))
    assert isinstance(traced, torch.fx.GraphModule)
    assert capfd.readouterr() == ("", "")
    x = torch.randn(2, 4)
    for training in (True, False):
        assert_same(gradients(traced.train(training), x), gradients(model.train(training), x))


@pytest.mark.parametrize("cls", [Reversal, NoGrad, Inference, DecoratedForward])
def test_modes_survive_copies_edits_and_dead_code_elimination(cls):
    model, x = make(cls), torch.randn(3, 4, dtype=D)
    traced = surgery.trace(model, x)
    assert isinstance(traced, torch.fx.GraphModule)
    for twin in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        twin.graph.eliminate_dead_code()
        twin.recompile()
        assert_same(gradients(twin, x), gradients(model, x))
    if cls is not Reversal:  # a function without a rule freezes what it takes
        wide = surgery.widen(traced, {"a": 2.0})
        assert wide.a.out_features == 16
        found, expected = gradients(wide, x), gradients(model, x)
        assert_same({k: found[k] for k in ("output", "input", "b.bias")},
                    {k: expected[k] for k in ("output", "input", "b.bias")}, 1e-12)  # fmt: skip
        assert (found["a.weight"] is None) == (expected["a.weight"] is None)
    else:
        assert not any(g.editable for g in surgery.dimension_groups(traced))


def test_an_error_inside_a_region_leaves_gradients_as_they_were():
    traced = surgery.trace(make(NoGrad), torch.rand(3, 4, dtype=D))
    with pytest.raises(RuntimeError):
        traced(torch.rand(3, 5, dtype=D))
    assert torch.is_grad_enabled()


def test_a_model_that_leaves_gradients_off_stays_python():
    class Leaves(Two):
        def forward(self, x):
            torch.set_grad_enabled(False)
            return self.b(self.a(x))

    with torch.enable_grad():
        surgery.trace(make(Leaves), torch.rand(3, 4, dtype=D))
        assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [NoGrad, Reversal])
def test_kept_modes_compile_and_export(cls):
    model, x = make(cls), torch.randn(3, 4, dtype=D)
    traced = surgery.trace(model, x)
    found, expected = gradients(torch.compile(traced, backend="aot_eager"), x), gradients(model, x)
    assert_same({k.removeprefix("_orig_mod."): v for k, v in found.items()}, expected, 1e-12)
    exported = torch.export.export(traced.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_gradient_hooks_on_parameters_are_refused():
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        model = make(Reversal)
        getattr(model.a.weight, hook)(lambda grad: None)
        with pytest.raises(surgery.UsageError, match=r"'a.weight' has a gradient hook"):
            surgery.trace(model, torch.rand(3, 4, dtype=D))
