"""What the tests share: models whose norms are random, so that no channel can be mistaken for another."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import surgery
from surgery import catalogue

torch.set_num_threads(1)

FAMILIES = {
    "alexnet": 64,
    "vgg11_bn": 32,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "googlenet": 96,
    "inception_v3": 299,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
}
"""One small model a family, and the image size it is tested at."""


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm random affine parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
            if module.running_var is not None:
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


@dataclass(frozen=True)
class Family:
    """A model of a family in float64 and evaluation mode, with random norms; the same, traced; and an input."""

    name: str
    model: nn.Module
    traced: nn.Module
    x: torch.Tensor


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in FAMILIES])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """Each family in turn: all tests of one before the next, so that one model is held at a time."""
    yield build_family(request.param)
    gc.collect()


def build_family(name: str) -> Family:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = randomised(catalogue.build(name, seed=0)).double().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, FAMILIES[name], FAMILIES[name], generator=generator, dtype=torch.float64)
    return Family(name, model, surgery.trace(model, x, source=f"torchvision:{name}"), x)
