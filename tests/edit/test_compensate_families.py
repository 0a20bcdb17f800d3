"""A model of each family is nearer to the dense one when it is fitted, and is saved and loaded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils import _pytree as pytree

import surgery

FAMILIES = {
    "mobilenet_v3_small": {},
    "shufflenet_v2_x0_5": {},
    "regnet_y_400mf": {},
    "densenet121": {},
    "googlenet": {"init_weights": False, "aux_logits": False},
    "convnext_tiny": {},
    "vit_b_32": {"image_size": 64},
    "swin_t": {},
}
TIMM = {"vit_tiny_patch16_224": {"img_size": 64}, "convnext_atto": {}}


def randomise(model):
    """Statistics and weights that are nowhere zero: some are made so that a new model computes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator) * 0.1)
                part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def pictures(count, seed):
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(count, 3, 8, 8, generator=generator), size=64, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, 64, 64, generator=generator)


def check(make, tmp_path):
    torch.manual_seed(0)
    dense = surgery.trace(randomise(make()), pictures(2, 0))
    carved = surgery.slim(dense, 0.5, importance="magnitude")
    fitted = surgery.slim(dense, 0.5, importance="magnitude", calibration=pictures(96, 1))
    test = pictures(24, 2)
    with torch.no_grad():
        expected, *found = (net(test) for net in (dense, carved, fitted))
    before, after = (float((one - expected).norm()) for one in found)
    assert after < 0.7 * before
    surgery.save(fitted, tmp_path / "fitted")
    again = surgery.load(tmp_path / "fitted", model=make())
    with torch.no_grad():
        assert torch.equal(again.eval()(test), found[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fitted_model_of_a_family_is_nearer_to_the_dense_one(name, tmp_path):
    check(lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **FAMILIES[name]), tmp_path)


@pytest.mark.parametrize("name", TIMM)
def test_a_fitted_model_of_timm_is_nearer_to_the_dense_one(name, tmp_path):
    timm = pytest.importorskip("timm")
    check(lambda: timm.create_model(name, pretrained=False, num_classes=10, **TIMM[name]), tmp_path)


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_detector_is_fitted_up_to_what_it_chooses(name):
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "num_classes": 4, "min_size": 64, "max_size": 96}
    model = randomise(torchvision.models.get_model(name, **options))
    images = [pictures(2, seed) for seed in range(6)]
    dense = surgery.trace(model, (list(images[0]),))
    batches = [(list(batch),) for batch in images]
    carved = surgery.slim(dense, 0.5, importance="magnitude")
    fitted = surgery.slim(dense, 0.5, importance="magnitude", calibration=batches)
    step = surgery.recipe(fitted).steps[-1]
    assert any(name.startswith("backbone") for name in step.layers)
    test = pictures(2, 9)

    def propose(net):
        head = net.head if hasattr(net, "head") else net.rpn.head
        return torch.cat([t.flatten() for t in pytree.tree_leaves(head(list(net.backbone(test).values())))])

    with torch.no_grad():
        expected, *found = (propose(net) for net in (dense, carved, fitted))
    before, after = (float((one - expected).norm()) for one in found)
    assert after < before
    assert len(fitted(list(test))) == 2
