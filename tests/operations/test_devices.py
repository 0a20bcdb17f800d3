"""Operations on a model that is on a GPU: emulated, so that tensors of two devices in one operation are found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import surgery
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
