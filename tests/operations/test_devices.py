"""Operations on a model that is on a GPU: emulated, so that tensors of two devices in one operation are found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import surgery
from surgery.models.inputs import other_values
from tests import zoo
from tests.emulated_gpu import GPU, DeviceMixError, OnGpu, emulated_gpu


def on_gpu(tree):
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(GPU), tree)


def on_cpu(module):
    return {name: value.cpu() for name, value in module.state_dict().items()}


def outputs(module, x):
    with torch.no_grad():
        found = module(*x) if isinstance(x, tuple) else module(x)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, OnGpu) == isinstance(other, OnGpu)
        assert (one - other).abs().max().item() <= 1e-10 * other.abs().max().item()


def test_an_emulated_gpu_refuses_what_a_gpu_refuses():
    with emulated_gpu():
        there, here = torch.arange(3.0, device=GPU), torch.arange(3.0)
        assert there.device == GPU
        assert (there * torch.tensor(2.0) + 1).cpu().tolist() == [1.0, 3.0, 5.0]
        assert there[torch.tensor([2])].item() == 2.0
        assert there.copy_(here) is there
        with pytest.raises(DeviceMixError, match=r"aten\.add\.Tensor was given tensors of cuda and of cpu"):
            there + here
        with pytest.raises(DeviceMixError, match="generator of cpu"):
            torch.rand(3, device=GPU, generator=torch.Generator())
        layer = nn.Linear(3, 2).to(GPU)
        layer(there).sum().backward()
        assert isinstance(layer.weight.grad, OnGpu)
        with pytest.raises(DeviceMixError):
            layer(here)


@pytest.mark.parametrize("name", list(zoo.FAMILIES))
def test_every_family_is_operated_on_where_it_is(name):
    family = zoo.build_family(name)
    rate = surgery.slim(family.traced, 0.5)
    with emulated_gpu():
        model, x = copy.deepcopy(family.model).to(GPU), on_gpu(family.x)
        traced = surgery.trace(model, x)
        expected = outputs(model, x)
        assert all(isinstance(tensor, OnGpu) for tensor in expected)
        assert_close(outputs(traced, x), expected)
        assert_close(outputs(surgery.widen(traced, 1.5, seed=0), x), expected)
        slim = surgery.slim(traced, 0.5)
        masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
        assert surgery.verify(slim, masked, x).ok
        assert [name for name, value in slim.state_dict().items() if not isinstance(value, OnGpu)] == []
        there, here = on_cpu(slim), rate.state_dict()
        assert there.keys() == here.keys()
        assert [name for name in here if not torch.equal(here[name], there[name])] == []


class AddsNorms(nn.Module):
    """A sum of a norm with weights and one without, which a deeper network has to predict the statistics of."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.norm, self.plain = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.stage = nn.Sequential(nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.stage(self.norm(self.one(x)) + self.plain(self.other(x))))


def test_a_network_is_deepened_where_it_is():
    torch.manual_seed(0)
    model, x = zoo.randomised(AddsNorms()).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    here = surgery.deepen(surgery.trace(model, x), ["stage"]).state_dict()
    with emulated_gpu():
        there = copy.deepcopy(model).to(GPU)
        deep = surgery.deepen(surgery.trace(there, on_gpu(x)), ["stage"])
        assert_close(outputs(deep, on_gpu(x)), outputs(there, on_gpu(x)))
        found = on_cpu(deep)
    assert found.keys() == here.keys()
    assert all(torch.allclose(found[name], here[name], rtol=1e-12) for name in here)


@pytest.mark.parametrize("value", [torch.arange(6.0), torch.ones(6), torch.zeros(6)])
def test_other_values_of_inputs_are_on_their_device(value):
    with emulated_gpu():
        ((found,), _) = other_values((value.to(GPU),), {})
        assert isinstance(found, OnGpu)
        assert found.shape == value.shape
