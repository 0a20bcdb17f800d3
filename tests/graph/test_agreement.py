"""`trace` calls what it made, compares it with the model, and says what it cannot take."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import surgery

D = torch.float64


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Remembers(Two):
    """Its graph depends on having been called before."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.a(x)
        return self.b(x.relu() if self.calls == 1 else x)


class Cached(Two):
    def __init__(self):
        super().__init__()
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = torch.arange(8, dtype=x.dtype)
        return self.b(self.a(x) + self.cache)


class BySwitch(Two):
    def forward(self, x):
        return self.b(self.a(x)) if torch.is_grad_enabled() else self.a(x)


def x(batch=2):
    return torch.randn(batch, 4, dtype=D, generator=torch.Generator().manual_seed(batch))


def make(cls):
    torch.manual_seed(0)
    return cls().double()


class Counts(Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        self.n += 1
        return self.b(self.a(x)) * self.n


class Stores(Two):
    def __init__(self):
        super().__init__()
        self.last, self.seen = None, []

    def forward(self, x):
        self.last = self.a(x)
        self.seen.append(self.last)
        return self.b(self.last)


@pytest.mark.parametrize("cls", [Remembers, Cached, Counts, Stores])
def test_state_in_python_is_kept(cls):
    model = make(cls)
    traced = surgery.trace(model, x())
    model = copy.deepcopy(model)
    for batch in (2, 3, 1):
        assert torch.equal(traced(x(batch)), model(x(batch)))
    if cls is Stores:
        assert copy.deepcopy(traced).last is None


def test_a_graph_that_computes_something_else_is_refused_with_what_differs(monkeypatch):
    from surgery.graph import tracing

    def wrong(root, given, **others):
        traced = original(root, given)
        node = next(n for n in traced.graph.nodes if n.target == "relu")
        node.replace_all_uses_with(node.args[0])
        traced.recompile()
        return traced

    original = tracing.trace_whole
    monkeypatch.setattr(tracing, "trace_whole", wrong)
    monkeypatch.setattr(tracing, "trace_islands", lambda *args: (_ for _ in ()).throw(args[-1]))
    with pytest.raises(surgery.TraceError, match=r"^Two cannot be traced faithfully: in evaluation, the output is"):
        surgery.trace(make(Two), x())
    surgery.trace(make(Two), x(), check=False)


def test_a_model_that_does_not_run_is_refused():
    with pytest.raises(surgery.UsageError, match=r"do not fit: Two cannot take them \(mat1 and mat2"):
        surgery.trace(make(Two), torch.rand(2, 5, dtype=D))


def test_the_check_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).double().train()
    model[0].weight.grad = torch.ones(8, 4, dtype=D)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    before, python = torch.get_rng_state(), random.getstate()
    traced = surgery.trace(model, x())
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    for module in (model, traced):
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
        assert module.training
    assert torch.equal(model[0].weight.grad, torch.ones(8, 4, dtype=D))


def test_models_with_random_numbers_of_their_own_are_traced():
    class Random(Two):
        def forward(self, x):
            return super().forward(x * torch.rand(()).to(x) + random.random())

    surgery.trace(make(Random), x())


def test_what_compile_and_parallel_wrap_is_traced_without_the_wrapper():
    for wrap in (torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))):
        model = make(Two)
        traced = surgery.trace(wrap(model), x())
        assert list(traced.state_dict()) == list(model.state_dict())
        assert torch.equal(traced(x()), model(x()))


def test_compiled_parts_are_traced_without_the_wrapper():
    model = nn.Sequential(make(Two), nn.Linear(3, 4), make(Two)).double()
    plain = copy.deepcopy(model)
    model[0] = torch.compile(model[0])
    model[2].a = torch.compile(model[2].a)
    traced = surgery.trace(model, x())
    assert isinstance(traced, torch.fx.GraphModule)
    assert list(traced.state_dict()) == list(plain.state_dict())
    assert torch.equal(traced(x()), plain(x()))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_and_lazy_parts_are_refused_in_one_line():
    model = make(Two)
    for scripted in (torch.jit.script(model), torch.jit.trace(model, x())):
        with pytest.raises(surgery.UsageError, match=r"is TorchScript, which has no Python to trace"):
            surgery.trace(scripted, x())
    with pytest.raises(surgery.UsageError, match=r"'1' is TorchScript"):
        surgery.trace(nn.Sequential(nn.Linear(4, 4), torch.jit.script(model)), x())
    with pytest.raises(surgery.UsageError, match=r"'0' has parameters without a shape"):
        surgery.trace(nn.Sequential(nn.LazyLinear(4)), x())


def test_a_model_that_keeps_tensors_of_a_run_with_gradients_says_which():
    class Keeps(Two):
        def forward(self, x):
            self.last = self.a(x)
            return self.b(self.last)

    model = make(Keeps)
    model(x())
    with pytest.raises(surgery.TraceError, match=r"cannot be copied: 'last' is a result of an earlier call") as caught:
        surgery.trace(model, x())
    assert "\n" not in str(caught.value)


def test_a_model_on_the_meta_device_is_traced_or_refused_in_one_line():
    with torch.device("meta"):
        model = Two()
    traced = surgery.trace(model, torch.rand(2, 4, device="meta"))
    assert all(t.is_meta for t in traced.parameters())
    assert any(g.editable for g in surgery.dimension_groups(traced))

    class Looks(Two):
        def forward(self, x):
            return self.b(self.a(x)) if float(x.sum()) > 0 else self.a(x)

    with torch.device("meta"):
        model = Looks()
    with pytest.raises(surgery.TraceError) as caught:
        surgery.trace(model, torch.rand(2, 4, device="meta"))
    assert "\n" not in str(caught.value)


def test_python_that_asks_whether_gradients_are_recorded_is_kept_or_refused():
    model = make(BySwitch)
    try:
        traced = surgery.trace(model, x())
    except surgery.SurgeryError:
        return
    with torch.no_grad():
        assert torch.equal(traced(x()), model(x()))
    assert torch.equal(traced(x()), model(x()))
