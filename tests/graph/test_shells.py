"""What a model is besides its forward: attributes, methods, hooks, and what other tools make of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import surgery

D = torch.float64


class Block(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.fc, self.stride = nn.Linear(n, m), 2

    def forward(self, x):
        return self.fc(x).relu()

    def describe(self):
        return f"{self.fc.out_features} with stride {self.stride}"


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(4, 8), Block(8, 6))
        self.head = nn.Linear(6, 3)
        self.names, self.meta, self._hidden = ["cat", "dog", "cow"], {"a": 1}, {"x": [1]}
        self.frozen = True

    def forward(self, x):
        return self.head(self.blocks(x))

    @property
    def device(self):
        return self.head.weight.device

    @torch.no_grad()
    def predict(self, x):
        return [self.names[k] for k in self(x).argmax(-1)]

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.blocks.eval()
        return self

    def sizes(self):
        return [block.describe() for block in self.blocks]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Detector().double()


X = torch.randn(5, 4, dtype=D, generator=torch.Generator().manual_seed(0))


def test_attributes_methods_and_properties_survive_tracing_edits_copies_and_pickles(model):
    traced = surgery.trace(model, X)
    assert isinstance(traced, Detector)
    wide = surgery.widen(traced, 2.0)
    for module in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), wide, copy.deepcopy(wide)):
        assert isinstance(module, torch.fx.GraphModule)
        assert module.names == model.names
        assert module.names is not model.names
        assert module.device == model.device
        assert module.predict(X) == model.predict(X)
        assert module._hidden == {"x": [1]}
        module.train()
        assert [m.training for m in (module, module.head, module.blocks, module.blocks[0].fc)] == [
            True, True, False, False]  # fmt: skip
    assert list(traced.state_dict()) == list(model.state_dict())
    assert traced.sizes() == model.sizes()
    assert wide.sizes() == ["16 with stride 2", "12 with stride 2"]
    assert surgery.recipe(wide).steps


def test_saved_and_loaded_modules_have_them_too(model, tmp_path):
    surgery.save(surgery.slim(surgery.trace(model, X), 0.5), tmp_path / "m")
    assert surgery.load(tmp_path / "m", model=Detector().double()).names == model.names


def test_a_part_of_a_traced_module_is_not_called_on_its_own(model):
    traced = surgery.trace(model, X)
    with pytest.raises(surgery.UsageError, match=r"Block is a part of a traced module and cannot be called on its own"):
        traced.blocks[0](X)


def test_hooks_that_cannot_fire_warn_and_those_that_can_do_not(model, recwarn):
    traced = surgery.trace(model, X)
    for name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        for part in (traced.blocks, traced.blocks[0]):
            with pytest.warns(UserWarning, match="this hook will not fire"):
                getattr(part, name)(lambda *args: None)
    recwarn.clear()
    seen = []
    traced.head.register_forward_hook(lambda *args: seen.append("layer"))
    traced.register_forward_hook(lambda *args: seen.append("whole"))
    traced(X)
    assert seen == ["layer", "whole"]
    assert not recwarn.list


def test_hooks_set_before_tracing_fire_once_each_also_backward(model):
    seen = []
    model.blocks[0].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,) if gi[0] is not None else None)
    model.blocks[1].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    model.blocks[1].register_forward_hook(lambda m, i, out: out * 2)
    model.head.register_full_backward_hook(lambda *args: seen.append("head"))
    traced = surgery.trace(model, X)
    seen.clear()
    grads = []
    for module in (traced, model):
        x = X.clone().requires_grad_()
        out = module(x)
        out.square().sum().backward()
        grads.append({"out": out, "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}})
    assert seen == ["head", "head"]
    for name, value in grads[1].items():
        assert torch.equal(grads[0][name], value), name


class Quantizable(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.dequant(self.b(self.a(self.quant(x)).relu()))


@pytest.mark.filterwarnings("ignore")
def test_eager_quantization_works_after_surgery():
    model, x = Quantizable().eval(), torch.randn(5, 4)
    model.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
    slim = surgery.slim(surgery.trace(model, x), 0.5).eval()
    assert slim.qconfig is not None
    prepared = torch.ao.quantization.prepare(slim)
    prepared(x)
    converted = torch.ao.quantization.convert(prepared)
    assert "Quantized" in type(converted.a).__name__ or "quantized" in type(converted.a).__module__
    assert (converted(x) - slim(x)).abs().max() < 0.2


@pytest.mark.filterwarnings("ignore")
def test_results_are_scripted_or_the_error_says_what_to_do(model):
    model.frozen = False
    slim = surgery.slim(surgery.trace(model, X), 0.5).eval()
    assert torch.equal(torch.jit.script(slim)(X), slim(X))

    class Guarded(Detector):
        def forward(self, x):
            return super().forward(x) if x.shape[-1] == 4 else x

    traced = surgery.trace(Guarded().double().eval(), X)
    with pytest.raises(surgery.UsageError, match=r"torch\.jit\.script cannot compile expect.*use torch\.jit\.trace"):
        torch.jit.script(traced)


def test_a_forward_of_the_instance_is_the_one_that_is_traced(model):
    model.forward = model.blocks.forward
    traced = surgery.trace(model, X)
    assert torch.equal(traced(X), model(X))


@pytest.mark.parametrize("name", ["code", "graph", "meta", "train_graph", "graphs"])
def test_a_part_with_a_name_that_traced_modules_use_keeps_it(name):
    class Book(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 3)
            self.add_module(name, nn.Linear(8, 6))

        def forward(self, x):
            return self.b(getattr(self, name)(self.a(x).relu()).relu())

    class Coded(Book):
        def __init__(self):
            super().__init__()
            delattr(self, name)
            self.register_buffer(name, torch.rand(8, 6))

        def forward(self, x):
            return self.b(self.a(x).relu() @ getattr(self, name))

    for model in (Book().double(), Coded().double(), nn.Sequential(Book(), nn.Linear(3, 2)).double()):
        traced = surgery.trace(model, X)
        assert traced.state_dict().keys() == model.state_dict().keys()
        slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
        for one, other in ((traced, model), (slim, masked), (surgery.widen(traced, 2.0), model)):
            assert surgery.verify(one, other, X).ok
            assert surgery.verify(copy.deepcopy(one), other, X, train=True).ok
