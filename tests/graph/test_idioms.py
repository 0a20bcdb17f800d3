"""Models that are written as libraries write theirs are traced whole, and edited exactly."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import surgery
from surgery.graph.traced import TracedModule
from tests.idioms import IDIOMS, Cached, Captured, ChecksFinite, FunctionalNorm, Part
from tests.zoo import randomised

EXACT = 1e-10


def inputs(name, batch):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 4, 6, dtype=torch.float64, generator=generator)
    return (x, None, torch.rand(batch, 4, 1, dtype=torch.float64)) if name == "NoneAmongTensors" else (x,)


def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(IDIOMS[name]()).double().eval()


@pytest.mark.parametrize("name", IDIOMS)
@pytest.mark.parametrize("called", [False, True])
def test_an_idiom_is_traced_whole_and_edited_exactly_at_any_batch_size(name, called, tmp_path):
    net, args = build(name), inputs(name, 2)
    if called:  # which may leave something behind
        net(*args)
    traced = surgery.trace(net, args)
    assert isinstance(traced, TracedModule)
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    assert groups or name == "WrittenChannels"
    permuted = surgery.reindex(traced, {g.name: g.permutation(seed=1) for g in groups})
    wide, slim = surgery.widen(traced, 1.5, seed=0), surgery.slim(traced, 0.5)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    for one, other in ((traced, net), (permuted, net), (wide, net), (slim, masked)):
        for batch in (1, 2, 3):
            check = surgery.verify(one, other, inputs(name, batch), train=True)
            assert check.max_rel <= EXACT, (batch, check)
    surgery.save(slim, tmp_path / "slim")
    assert surgery.verify(surgery.load(tmp_path / "slim", model=build(name)), slim, args).max_rel == 0


@pytest.mark.parametrize("name", ["SlicedLayers", "WrittenPositions", "NoBias", "Captured", "NoneAmongTensors"])
def test_the_channels_around_an_idiom_are_free(name):
    traced = surgery.trace(build(name), inputs(name, 2))
    frozen = {g.name: g.reason for g in surgery.dimension_groups(traced) if not g.editable}
    assert set(frozen) <= {"head", "input of stem"}, frozen


def test_a_graph_refuses_numbers_that_are_not_finite_where_the_model_checks_for_them():
    traced = surgery.trace(build("ChecksFinite"), inputs("ChecksFinite", 2))
    assert isinstance(traced, ChecksFinite)
    with pytest.raises(surgery.UsageError, match=r"idioms.py:\d+: there are numbers that are not finite here"):
        traced(torch.full((2, 4, 6), torch.inf, dtype=torch.float64))


def test_what_was_none_must_stay_none():
    traced = surgery.trace(build("NoneAmongTensors"), inputs("NoneAmongTensors", 2))
    x, _, mask = inputs("NoneAmongTensors", 2)
    with pytest.raises(surgery.UsageError, match="was None when the model was traced"):
        traced(x, mask, mask)


def test_hooks_that_a_model_sets_on_its_parts_are_in_the_graph():
    model = build("Captured")
    traced = surgery.trace(model, inputs("Captured", 2))
    assert not any(part._forward_hooks for part in traced.modules())
    assert isinstance(traced, Captured)
    assert not model.parts[0]._forward_hooks


_LIBRARY = """
import torch

COLLECTED = []

def collect(module, args, output):
    COLLECTED.append(output)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.part, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
        self.hooked = False

    def forward(self, x):
        if not self.hooked:
            self.part.register_forward_hook(collect)
            self.hooked = True
        COLLECTED.clear()
        x = self.part(self.stem(x).relu())
        return self.head(x + COLLECTED[0].relu())
"""


def test_hooks_of_a_library_are_the_models_own_wherever_it_was_installed(tmp_path, monkeypatch):
    (tmp_path / "library_with_hooks").mkdir()
    (tmp_path / "library_with_hooks" / "__init__.py").write_text(_LIBRARY)
    (tmp_path / "library_with_hooks-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    net = randomised(importlib.import_module("library_with_hooks").Net()).double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    net(x)  # which sets the hook
    traced = surgery.trace(net, x)
    assert not traced.part._forward_hooks
    assert {g.name for g in surgery.dimension_groups(traced) if g.editable} == {"stem", "part"}
    assert surgery.verify(surgery.widen(traced, 2.0), net, x, train=True).max_rel <= EXACT
    monkeypatch.delitem(sys.modules, "library_with_hooks")


def test_parts_of_one_class_that_branch_on_their_mode_are_found_together(monkeypatch):
    from surgery.graph import whole_graph

    passes = []
    trace_mode = whole_graph._trace_mode
    monkeypatch.setattr(
        whole_graph, "_trace_mode", lambda root, *rest, **named: passes.append(root) or trace_mode(root, *rest, **named)
    )
    parts = [torch.nn.Sequential(*(First(Part()) for _ in range(count))).double() for count in (2, 6)]
    counts = []
    for model in parts:
        passes.clear()
        surgery.trace(model, torch.randn(2, 8, dtype=torch.float64), check=False)
        counts.append(sum(isinstance(root, torch.nn.Sequential) for root in passes))
    assert counts[0] == counts[1]


class First(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)[0]


def test_a_norm_that_is_a_function_in_training_is_traced_on_one_sample():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = randomised(FunctionalNorm()).double().eval()
    traced = surgery.trace(net, torch.randn(1, 6, dtype=torch.float64))
    x = torch.randn(3, 6, dtype=torch.float64)
    for training in (False, True):
        net.train(training), traced.train(training)
        assert torch.equal(net(x), traced(x))


def test_a_cache_is_no_part_of_a_graph():
    model = randomised(Cached()).double().eval()
    x = inputs("Cached", 2)
    traced = surgery.trace(model, x)
    assert model.config.use_cache
    model.config.use_cache = False
    assert surgery.verify(traced, model, x).max_rel == 0


def test_what_is_none_in_nested_inputs_can_be_told_by_python():
    class Nested(torch.nn.Module):
        def forward(self, x):
            first, second = x["values"]
            return first if second is None and x["scale"] is None and x.get("bias") is None else second

    inputs = {"values": [torch.rand(2, 3), None], "scale": None}
    assert torch.equal(surgery.trace(Nested(), (inputs,))(inputs), inputs["values"][0])
