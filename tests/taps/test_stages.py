"""The stages of any network are public data."""

import dataclasses

import pytest
import torch
import torchvision
from torch import nn

import surgery

FAMILIES = {
    "resnet18": [("layer1", 64, 4), ("layer2", 128, 8), ("layer3", 256, 16), ("layer4", 512, 32)],
    "vgg11": [
        ("features.0", 64, 1),
        ("features.3", 128, 2),
        ("features.8", 256, 4),
        ("features.13", 512, 8),
        ("features.18", 512, 16),
    ],
    "mobilenet_v3_small": [
        ("features.2.block.0", 72, 4),
        ("features.4.block.0", 96, 8),
        ("features.9.block.0", 288, 16),
        ("features", 576, 32),
    ],
}


def traced(model: nn.Module, size: int = 64) -> nn.Module:
    return surgery.trace(model.eval(), torch.randn(1, 3, size, size))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stages_of_convolutional_networks(name: str) -> None:
    found = surgery.stages(traced(getattr(torchvision.models, name)(num_classes=4)))
    assert [(s.name, s.channels, s.reduction) for s in found] == FAMILIES[name]
    assert all(s.shape == (1, s.channels, 64 // s.reduction, 64 // s.reduction) for s in found if s.reduction)


def test_the_stages_of_a_swin_transformer_have_their_channels_last() -> None:
    net = torchvision.models.SwinTransformer([2, 2], 24, [1, 2, 1], [2, 4, 8], [4, 4], num_classes=4)
    found = surgery.stages(traced(net))
    assert [(s.channels, s.reduction) for s in found] == [(24, 2), (48, 4), (96, 8)]
    assert found[0].shape == (1, 32, 32, 24)
    assert found[0].name == "features.1"


def test_a_vision_transformer_is_one_stage_of_tokens() -> None:
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
    (stage,) = surgery.stages(traced(net, 32))
    assert stage == surgery.Stage("encoder", stage.end, (1, 17, 16), 16, 8)


def test_a_stage_names_a_value_of_the_module() -> None:
    net = traced(torchvision.models.resnet18(num_classes=4))
    found = surgery.stages(net)
    values: dict[str, torch.Tensor] = {}
    layers = {s.name: net.get_submodule(s.name) for s in found}
    assert all(isinstance(layer, nn.Module) for layer in layers.values())
    interpreter = torch.fx.Interpreter(net)
    interpreter.garbage_collect_values = False
    interpreter.run(torch.randn(1, 3, 64, 64))
    values = {node.name: value for node, value in interpreter.env.items()}
    assert [tuple(values[s.end].shape) for s in found] == [s.shape for s in found]
    names = [s.name for s in found]
    assert surgery.attach_hint(net, net, guided=names, hint=names).names == tuple(zip(names, names, strict=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].name = "other"  # type: ignore[misc]


def test_sequences_have_no_reduction() -> None:
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    (stage,) = surgery.stages(surgery.trace(net, torch.randn(2, 3, 16)))
    assert (stage.shape, stage.reduction) == ((2, 6, 12), None)


def test_stages_of_what_is_not_traced_are_refused() -> None:
    with pytest.raises(surgery.UsageError, match="is not a traced module"):
        surgery.stages(nn.Linear(2, 2))
