"""Models that many tests share: one of each family of torchvision, and small odd ones, with random norms.

A model that one file alone needs stays in that file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import convnext, inception, swin_transformer, video
from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux
from torchvision.models.video import mvit
from torchvision.ops import StochasticDepth

import surgery
from surgery import models as catalogue

FAMILIES: dict[str, int | None] = {
    "alexnet": None,
    "vgg11_bn": None,
    "resnet18": 64,
    "resnext50_32x4d": None,
    "squeezenet1_1": 64,
    "densenet121": None,
    "googlenet": None,
    "inception_v3": None,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "quantized_mobilenet_v2": 64,
    "deeplabv3_mobilenet_v3_large": 64,
    "lraspp_mobilenet_v3_large": 64,
    "vision transformer": None,
    "swin": None,
    "swin v2": None,
    "swin 3d": None,
    "mvit v1": None,
    "mvit v2": None,
    "maxvit": None,
    "convnext": None,
    "r3d": None,
    "r(2+1)d": None,
}
"""One small model a family, and the image size it is tested at; those without are made small in `SMALL`.

Detection and RAFT have tests of their own: `tests/axes/test_islands.py`, `tests/graph/test_control_flow.py`."""


def _swin(block: Any, merging: Any) -> nn.Module:
    return models.SwinTransformer(
        [4, 4], 12, [2, 2], [2, 4], [3, 3], num_classes=10, block=block, downsample_layer=merging
    )


def _mvit(new: bool) -> nn.Module:
    """The parts of version 2, or of version 1."""
    options = {"residual_pool": new, "residual_with_cls_embed": not new, "rel_pos_embed": new, "proj_after_attn": new}
    stages = [(2, 12, 12, []), (2, 12, 24, [1, 2, 2]), (4, 24, 24, [1, 1, 1])]
    blocks = [
        mvit.MSBlockConfig(heads, wide, out, [3, 3, 3] if stride else [], [3, 3, 3], stride, [1, 2, 2])
        for heads, wide, out, stride in stages
    ]
    return models.video.MViT((32, 32), 4, blocks, num_classes=10, stochastic_depth_prob=0.1, **options)


def _video_resnet(conv: Any, stem: Any) -> nn.Module:
    return video.resnet.VideoResNet(video.resnet.BasicBlock, [conv] * 4, [1, 1, 1, 1], stem, num_classes=10)


def _eighth(make: Callable[..., nn.Module], conv: Any, *blocks: Any) -> nn.Module:
    """A GoogLeNet or Inception v3 with an eighth of the channels."""

    def narrow(ins: int, outs: int, **options: Any) -> nn.Module:
        return conv(ins if ins == 3 else ins // 8, outs // 8, **options)

    model = make([narrow, *(partial(block, conv_block=narrow) for block in blocks)])
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    for name in linear:
        layer = model.get_submodule(name)
        outs = layer.out_features
        model.set_submodule(name, nn.Linear(layer.in_features // 8, outs if outs == 10 else outs // 8))
    return model


def _googlenet() -> nn.Module:
    make = partial(models.GoogLeNet, 10, init_weights=False)
    return _eighth(lambda blocks: make(blocks=blocks), BasicConv2d, Inception, InceptionAux)


def _inception() -> nn.Module:
    parts = [getattr(inception, name) for name in ("BasicConv2d", *(f"Inception{c}" for c in "ABCDE"), "InceptionAux")]
    return _eighth(lambda blocks: models.Inception3(10, init_weights=False, inception_blocks=blocks), *parts)


def _with_narrow_classifier(make: Callable[[], nn.Module]) -> nn.Module:
    """A model whose classifier has 64 hidden channels: the published one has most of the weights."""
    with torch.device("meta"):
        model = make()
        layers = [(i, layer) for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
        widths = (layers[0][1].in_features, 64, 64, 10)
        for (i, _), ins, outs in zip(layers, widths[:-1], widths[1:], strict=True):
            model.classifier[i] = nn.Linear(ins, outs)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


SMALL: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "alexnet": (lambda: _with_narrow_classifier(models.alexnet), [(2, 3, 64, 64)]),
    "vgg11_bn": (lambda: _with_narrow_classifier(models.vgg11_bn), [(2, 3, 32, 32)]),
    "resnext50_32x4d": (
        lambda: models.ResNet(models.resnet.Bottleneck, [2, 1, 1, 2], 10, groups=8, width_per_group=4),
        [(2, 3, 64, 64)],
    ),
    "densenet121": (lambda: models.DenseNet(8, (3, 3, 3, 3), 16, num_classes=10), [(2, 3, 64, 64)]),
    "googlenet": (_googlenet, [(2, 3, 96, 96)]),
    "inception_v3": (_inception, [(2, 3, 299, 299)]),
    "vision transformer": (lambda: models.VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=10), [(2, 3, 32, 32)]),
    "swin": (lambda: _swin(swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging), [(2, 3, 40, 32)]),
    "swin v2": (
        lambda: _swin(swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2),
        [(2, 3, 40, 32)],
    ),
    "swin 3d": (
        lambda: models.video.SwinTransformer3d([2, 4, 4], 12, [2, 2], [2, 4], [2, 3, 3], num_classes=10),
        [(2, 3, 5, 40, 32)],
    ),
    "mvit v1": (lambda: _mvit(new=False), [(2, 3, 4, 32, 32)]),
    "mvit v2": (lambda: _mvit(new=True), [(2, 3, 4, 32, 32)]),
    "maxvit": (lambda: models.MaxVit((56, 56), 8, 7, [8, 16], [1, 1], 4, 0.1, num_classes=10), [(2, 3, 56, 56)]),
    "convnext": (
        lambda: models.ConvNeXt(
            [convnext.CNBlockConfig(8, 12, 2), convnext.CNBlockConfig(12, None, 2)], 0.1, num_classes=10
        ),
        [(2, 3, 40, 40)],
    ),
    "r3d": (lambda: _video_resnet(video.resnet.Conv3DSimple, video.resnet.BasicStem), [(2, 3, 4, 32, 32)]),
    "r(2+1)d": (lambda: _video_resnet(video.resnet.Conv2Plus1D, video.resnet.R2Plus1dStem), [(2, 3, 4, 32, 32)]),
}
"""How to make a small model of the same parts, and the shapes of its inputs."""


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm random affine parameters and statistics, and values to whatever starts at a constant."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm:
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
            if module.running_var is not None:
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        for name, parameter in () if norm else module.named_parameters(recurse=False):
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                low = 0.5 if name == "weight" and parameter.ndim == 1 else -0.5
                parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + low)
    return model


@dataclass(frozen=True)
class Family:
    """A model of a family in float64 and evaluation mode, with random norms; the same, traced; and its inputs."""

    name: str
    model: nn.Module
    traced: nn.Module
    x: Any


def build_family(name: str) -> Family:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        size = FAMILIES[name]
        make, shapes = SMALL[name] if size is None else (lambda: catalogue.build(name, seed=0), [(2, 3, size, size)])
        model = randomised(make()).double().eval()
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x = inputs if len(inputs) > 1 else inputs[0]
    return Family(name, model, surgery.trace(model, x, source=f"torchvision:{name}"), x)


def traced_of(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, torch.Tensor]:
    """The model in float64, with random norms and nothing that is random in training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(make()).double().eval()
        x = torch.randn(shape, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return surgery.trace(model, x), x


def digits_net() -> nn.Module:
    """Two convolutions with norms, for images of 8 x 8 pixels in 10 classes."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


class TiedLayers(nn.Module):
    """Two layers with one weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


class BranchesOnMode(nn.Module):
    """A part that branches on its mode, and a layer that runs in one mode alone: ``aux`` in training, or ``late``."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if self.training else self.conv(x) * 2

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.part = BranchesOnMode.Part()
        self.extra = extra
        self.add_module(extra, nn.Conv2d(3, 3, 1))
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.part(x)
        if self.extra == "aux":
            return (self.conv(x), self.aux(x)) if self.training else self.conv(x)
        return self.conv(x) if self.training else self.late(self.conv(x))
