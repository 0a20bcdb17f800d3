"""Code is generated from a graph once for each state that it is in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import surgery
from tests.zoo import BranchesOnMode


@pytest.fixture
def generated(monkeypatch):
    """The graphs from which code was generated."""
    graphs = []
    original = fx.graph.CodeGen._gen_python_code

    def counting(self, nodes, *args, **kwargs):
        graphs.append(nodes)
        return original(self, nodes, *args, **kwargs)

    monkeypatch.setattr(fx.graph.CodeGen, "_gen_python_code", counting)
    return graphs


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(("make", "shape"), [(small, (2, 4)), (lambda: BranchesOnMode("aux"), (2, 3, 4, 4))])
def test_a_copy_takes_the_code_of_its_original(generated, make, shape):
    x = torch.randn(shape)
    traced = surgery.trace(make(), x)
    generated.clear()
    twin = copy.deepcopy(traced)
    again = copy.deepcopy(twin)
    assert not generated
    assert again.code == traced.code
    assert surgery.verify(again, traced, x, train=True).max_abs == 0


def test_a_graph_that_was_changed_is_copied_as_it_is_now(generated):
    x = torch.randn(2, 4)
    traced = surgery.trace(small(), x)
    twin = copy.deepcopy(traced)
    (relu,) = (node for node in twin.graph.nodes if node.target == "1")
    with twin.graph.inserting_after(relu):
        tanh = twin.graph.call_function(torch.tanh, (relu,))
    relu.replace_all_uses_with(tanh, delete_user_cb=lambda user: user is not tanh)
    expected = traced.get_submodule("2")(traced.get_submodule("1")(traced.get_submodule("0")(x)).tanh())
    generated.clear()
    assert torch.equal(copy.deepcopy(twin)(x), expected)  # nobody called recompile()
    twin.recompile()
    assert torch.equal(twin(x), expected)
    assert len(generated) == 2
    tanh.args = (tanh.args[0],)
    tanh.target = torch.sin
    twin.recompile()
    assert not torch.equal(twin(x), expected)
    assert not torch.equal(traced(x), expected)
