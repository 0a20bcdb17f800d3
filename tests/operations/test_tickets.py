"""Lottery tickets: which weights are kept, what they are set back to, and that training keeps to them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery import models as catalogue
from surgery.graph.traced import named_tensors
from surgery.operations.tickets import hold_masked, magnitude_masks, rewind
from tests.zoo import TiedLayers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.hidden(self.norm(self.conv(x)).relu().mean((2, 3))).relu())


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WEIGHTS = ["conv.weight", "hidden.weight", "head.weight"]


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        for scale, layer in enumerate((model.conv, model.hidden, model.head), 1):
            layer.weight.data.mul_(scale)
        return surgery.trace(model, X)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


def train(module, steps, after=lambda *_: None, make=sgd):
    optimizer = make(module.parameters())
    optimizer.register_step_post_hook(after)
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(X + step), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    return module


@pytest.mark.parametrize("sparsity", [0, 0.2, 0.5, 0.59, 0.9, 0.999])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exactly_the_largest_weights_are_kept_and_vectors_whole(net, scope, sparsity):
    masks = magnitude_masks(net, sparsity, scope=scope)
    parameters = dict(net.named_parameters())
    assert masks.keys() == parameters.keys()
    assert all(mask.all() for name, mask in masks.items() if name not in WEIGHTS)
    assert all(mask.dtype == torch.bool for mask in masks.values())
    together = [
        (torch.cat([parameters[n].flatten() for n in WEIGHTS]), torch.cat([masks[n].flatten() for n in WEIGHTS]))
    ]
    for weight, mask in [(parameters[n], masks[n]) for n in WEIGHTS] if scope == "layer" else together:
        kept = weight[mask].abs()
        assert len(kept) == math.ceil(round((1 - sparsity) * weight.numel(), 6))
        assert mask.all() or kept.min() > weight[~mask].abs().max()


def test_ties_do_not_change_the_count(net):
    net.get_parameter("hidden.weight").data.fill_(0.25)
    mask = magnitude_masks(net, 0.5)["hidden.weight"].flatten()
    assert torch.equal(mask, torch.arange(42) < 21)
    net.get_parameter("head.weight").data.zero_()
    assert magnitude_masks(net, 0.25)["head.weight"].sum() == 16


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rounds_of_pruning_lie_within_each_other(net, scope):
    masks, sizes = None, []
    for number in range(1, 5):
        before, masks = masks, magnitude_masks(net, 1 - 0.6**number, scope=scope, within=masks)
        sizes.append(sum(int(masks[n].sum()) for n in WEIGHTS))
        if before is not None:
            assert all((before[n] | ~masks[n]).all() for n in masks)
        net = train(rewind(net, net, masks), 3, hold_masked(net, masks))
    total = sum(net.get_parameter(n).numel() for n in WEIGHTS)
    assert sizes == pytest.approx([total * 0.6**number for number in range(1, 5)], abs=3)


def test_vectors_are_pruned_on_demand_and_named_parameters_kept(net):
    masks = magnitude_masks(net, 0.5, vectors=True, whole=["head.*", "norm.weight"])
    assert {name for name, mask in masks.items() if mask.all()} == {"head.weight", "head.bias", "norm.weight"}
    assert masks["conv.bias"].sum() == 3
    assert masks["norm.bias"].sum() == 3
    one = {"head.weight": torch.arange(21).view(3, 7) > 4}
    assert torch.equal(magnitude_masks(net, 0.5, within=one, whole="head.weight")["head.weight"], one["head.weight"])


def test_a_ticket_has_the_early_weights_under_its_mask_and_zeros_elsewhere(net):
    early = copy.deepcopy(net)
    trained = train(copy.deepcopy(net), 3)
    masks, before = magnitude_masks(trained, 0.7), copy.deepcopy(trained)
    for weights in (early, early.state_dict()):
        ticket = rewind(trained, weights, masks)
        for name, tensor in named_tensors(ticket).items():
            old = named_tensors(early)[name]
            assert torch.equal(tensor, old * masks[name] if name in masks else old), name
            assert tensor.data_ptr() != old.data_ptr()
    assert all(torch.equal(t, named_tensors(before)[n]) for n, t in named_tensors(trained).items())
    assert surgery.recipe(ticket) == surgery.recipe(net)
    assert [*ticket.state_dict()] == [*net.state_dict()]
    only = rewind(trained, dict(early.named_parameters()), masks)
    assert torch.equal(only.norm.running_mean, trained.norm.running_mean)


@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW])
def test_a_held_ticket_learns_and_keeps_to_its_mask(net, make):
    masks = magnitude_masks(net, 0.7)
    ticket = rewind(net, net, masks)
    free = train(copy.deepcopy(ticket), 4, make=make)
    assert not any((free.get_parameter(n)[~masks[n]] == 0).all() for n in WEIGHTS)
    held = copy.deepcopy(ticket)
    train(held, 4, hold_masked(held, masks), make)
    for name in WEIGHTS:
        assert (held.get_parameter(name)[~masks[name]] == 0).all()
        assert not torch.equal(held.get_parameter(name), ticket.get_parameter(name))


def test_tied_weights_count_once_and_have_one_mask():
    traced = surgery.trace(TiedLayers(), torch.zeros(2, 8))
    masks = magnitude_masks(traced, 0.5, scope="global")
    assert torch.equal(masks["first.weight"], masks["second.weight"])
    assert masks["first.weight"].sum() + masks["head.weight"].sum() == 40
    ticket = rewind(traced, traced, masks)
    assert ticket.first.weight is ticket.second.weight


def test_models_that_are_traced_in_parts_have_tickets_too():
    source = "fasterrcnn_mobilenet_v3_large_320_fpn"
    traced = surgery.trace(catalogue.build(source, seed=0), catalogue.example_inputs(source))
    masks = magnitude_masks(traced, 0.9, scope="global")
    kept = sum(int(mask.sum()) for name, mask in masks.items() if mask.ndim > 1)
    weights = [p for p in traced.parameters() if p.ndim > 1]
    assert kept == math.ceil(round(0.1 * sum(p.numel() for p in weights), 6))
    ticket = rewind(traced, traced, masks)
    assert sum(int((p != 0).sum()) for p in ticket.parameters() if p.ndim > 1) == kept


def test_what_cannot_be_is_refused(net):
    for sparsity in (1, -0.1, float("nan"), "half"):
        with pytest.raises(surgery.UsageError, match=r"sparsity must be in \[0, 1\), not "):
            magnitude_masks(net, sparsity)
    with pytest.raises(surgery.UsageError, match="unknown scope 'layers'; did you mean 'layer'"):
        magnitude_masks(net, 0.5, scope="layers")
    with pytest.raises(surgery.UsageError, match=r"unknown layer or parameter 'heads\.\*'"):
        magnitude_masks(net, 0.5, whole=["heads.*"])
    masks = magnitude_masks(net, 0.8)
    told = "within keeps 33 of 162 weights of conv.weight, and a sparsity of 0.5 is 81: ask for a higher one"
    with pytest.raises(surgery.UsageError, match=told):
        magnitude_masks(net, 0.5, within=masks)
    state = net.state_dict()
    with pytest.raises(surgery.UsageError, match=r"'head.bias' is \(2,\) at the step to rewind to, not \(3,\)"):
        rewind(net, {**state, "head.bias": torch.zeros(2)}, masks)
    del state["conv.weight"]
    with pytest.raises(surgery.UsageError, match=r"the weights to rewind to have no 'conv.weight'"):
        rewind(net, state, masks)
    with pytest.raises(surgery.UsageError, match=r"mask of 'conv.bias' must hold bools"):
        hold_masked(net, {"conv.bias": torch.ones(6)})
    with pytest.raises(surgery.UsageError, match="not a traced module"):
        magnitude_masks(Net(), 0.5)
    with pytest.raises(surgery.UsageError, match="not a traced module"):
        rewind(Net(), net, {})


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsities_of_numpy_count_and_weights_that_are_not_numbers_do_not(net, scope):
    usual, found = (magnitude_masks(net, sparsity, scope=scope) for sparsity in (0.5, np.float32(0.5)))
    assert all(torch.equal(found[name], mask) for name, mask in usual.items())
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.get_parameter("hidden.weight")[0, 0] = torch.nan
    where = "hidden.weight" if scope == "layer" else "the network"
    with pytest.raises(surgery.UsageError, match=f"there are weights of {where} that are not numbers"):
        magnitude_masks(broken, 0.5, scope=scope)
