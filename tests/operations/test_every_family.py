"""Every operation on one model of every family: float64, random weights, random norm statistics."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
from tests.zoo import build_family

# Places at the ends of stages; a test below fails if a name stops existing.
STAGES = {
    "alexnet": ["features.0", "features.6", "classifier.1"],
    "vgg11_bn": ["features.0", "features.11", "classifier.0"],
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "resnext50_32x4d": ["layer1", "layer4"],
    "squeezenet1_1": ["features.3", "features.12"],
    "densenet121": ["features.denseblock1", "features.transition2", "features.denseblock4"],
    "googlenet": ["inception3b", "inception4e", "inception5b", "aux1.conv"],
    "inception_v3": ["Mixed_5d", "Mixed_6e", "Mixed_7c", "AuxLogits.conv0"],
    "mobilenet_v2": ["features.1", "features.6", "features.18"],
    "mobilenet_v3_small": ["features.1", "features.8", "features.12"],
    "mnasnet0_5": ["layers.8", "layers.13"],
    "efficientnet_b0": ["features.1", "features.4", "features.8"],
    "regnet_y_400mf": ["trunk_output.block1", "trunk_output.block4"],
    "shufflenet_v2_x0_5": ["stage2", "stage3", "stage4", "conv5"],
    "quantized_mobilenet_v2": ["features.1", "features.18"],
    "deeplabv3_mobilenet_v3_large": ["backbone.4", "classifier.0", "classifier.1"],
    "lraspp_mobilenet_v3_large": ["backbone.16", "classifier.cbr"],
    "vision transformer": ["conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"],
    "swin": ["features.0", "features.1", "features.2", "features.3"],
    "swin v2": ["features.0", "features.1", "features.2", "features.3"],
    "swin 3d": ["patch_embed", "features.1", "features.2"],
    "mvit v1": ["conv_proj", "blocks.2.mlp"],
    "mvit v2": ["conv_proj", "blocks.2.mlp"],
    "maxvit": ["stem", "blocks.0", "blocks.1"],
    "convnext": ["features.0", "features.1", "features.3"],
    "r3d": ["stem", "layer1", "layer4"],
    "r(2+1)d": ["stem", "layer1.0.conv1", "layer4"],
}

HEADS = "shares it among heads, or other parts of an axis"
LEFT = {
    "vision transformer": {
        *("add combines it with an axis that holds no channels", "contracts it with an axis that does not change"),
        *("getitem picks positions of it", "normalises over it"),
    },
    "swin": {"_get_relative_position_bias holds positions in it"},
    "swin v2": {"values of a buffer"},
    "swin 3d": {"_get_relative_position_bias holds positions in it"},
    "mvit v1": {HEADS, "add_ combines it with an axis that holds no channels"},
    "mvit v2": {
        HEADS,
        "_add_rel_pos holds positions in it",
        "_add_rel_pos contracts it with an axis that does not change",
    },
    "maxvit": {"getitem picks positions of it"},
}
"""Reasons for leaving an axis alone besides being the input or an output: tables of positions, and what all heads
share."""


@pytest.mark.parametrize("train", [False, True])
def test_a_traced_model_computes_what_the_model_computes_in_both_modes(family, train):
    assert surgery.verify(family.traced, family.model, family.x, train=train).ok


def test_permuting_every_group_changes_nothing(family):
    traced, x = family.traced, family.x
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    index = {g.name: g.permutation(seed=1) for g in groups}
    assert all(sorted(i) == list(range(g.units)) for g, i in zip(groups, index.values(), strict=True))
    assert all(i != sorted(i) for i in index.values())
    assert surgery.verify(surgery.reindex(traced, index), traced, x).ok


def test_only_the_networks_ends_and_what_holds_no_channels_are_left_alone(family):
    left = {g.name: g.reason for g in surgery.dimension_groups(family.traced) if g.reason}
    allowed = ("network input", "network output", *LEFT.get(family.name, ()))
    odd = {name: why for name, why in left.items() if not all(part.endswith(allowed) for part in why.split("; "))}
    assert not odd
    found = {part for why in left.values() for part in why.split("; ")}
    assert all(any(part.endswith(reason) for part in found) for reason in allowed)
    assert not any(g.editable for g in surgery.dimension_groups(family.traced) if g.reason)


@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_widening_changes_nothing(family, factor):
    traced, x = family.traced, family.x
    wide = surgery.widen(traced, factor, seed=3)
    exact_everywhere = factor == 2.0 or not any(g.mixed for g in surgery.dimension_groups(traced))
    least = factor if exact_everywhere else 1.0
    assert sum(p.numel() for p in wide.parameters()) > least * sum(p.numel() for p in traced.parameters())
    assert surgery.verify(wide, traced, x).ok


def test_deepening_each_stage_changes_nothing(family):
    traced, x = family.traced, family.x
    deep = surgery.deepen(traced, STAGES[family.name])
    assert sum(1 for _ in deep.modules()) >= sum(1 for _ in traced.modules()) + 2 * len(STAGES[family.name])
    assert surgery.verify(deep, traced, x).ok


def test_the_slim_network_is_the_dense_one_without_its_reset_hypothesis(family):
    traced, x = family.traced, family.x
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    slim = surgery.slim(traced, 0.5)
    assert surgery.verify(slim, masked, x).ok
    assert not surgery.verify(slim, traced, x).ok  # the dense network is another function


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_operated_networks_can_be_operated_on_again(name):
    family = build_family(name)
    traced, x = family.traced, family.x
    grown = surgery.deepen(surgery.widen(traced, 1.5), STAGES[name])
    again = surgery.widen(grown, 1.3, seed=5)
    assert surgery.verify(again, traced, x).ok
    masks = surgery.split_masks(again, 0.4)
    slim = surgery.slim(again, 0.4)
    assert surgery.verify(slim, surgery.masked(again, masks), x).ok


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_shrink_and_grow_with_the_body(name):
    family = build_family(name)
    traced, x = family.traced, family.x
    traced = copy.deepcopy(traced)
    for module in traced.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its random numbers depend on the width
    aux = next(g for g in surgery.dimension_groups(traced) if g.name.lower().startswith("aux") and g.editable)
    assert surgery.verify(surgery.widen(traced, 1.5), traced, x, train=True).max_rel <= 1e-9
    slim = surgery.slim(traced, 0.5)
    assert slim.get_parameter(aux.members[0].name).shape[0] == -(-aux.size // 2)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.verify(slim, masked, x, train=True).max_rel <= 1e-9
    outputs = slim.train()(x)
    assert len(outputs) > 1
    sum(o.sum() for o in outputs).backward()
    assert all(p.grad is not None for p in slim.parameters())


def test_every_parameter_keeps_its_name_dtype_and_flag():
    traced = build_family("resnet18").traced
    traced.get_parameter("conv1.weight").requires_grad_(False)
    try:
        for result in (surgery.slim(traced, 0.5), surgery.widen(traced, 1.5), surgery.deepen(traced, ["layer1"])):
            ours = dict(result.named_parameters())
            for name, parameter in traced.named_parameters():
                assert ours[name].dtype == torch.float64
                assert ours[name].requires_grad == parameter.requires_grad
                assert ours[name].untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
    finally:
        traced.get_parameter("conv1.weight").requires_grad_(True)
