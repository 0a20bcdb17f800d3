"""The network inside a detection model: what it computes on a fixed number of proposals.

How many proposals a detection model passes on depends on the values of its input, and so do its cost and the order of
its outputs. Its network does not: the backbone and the region proposal head, or the head of a one-stage model, on one
batch of images, and the box, mask and keypoint heads on a number of regions. What is counted and compared of detection
models is this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PROPOSALS = 1000
"""Regions of an image that the box head is counted on: those that torchvision's models propose by default."""
DETECTIONS = 100
"""Regions of an image that mask and keypoint heads are counted on: the detections kept by default."""

_HEADS = ("box", "mask", "keypoint")


def is_detector(module: nn.Module) -> bool:
    """Tell whether ``module`` has the parts of torchvision's detection models, whatever its class."""
    parts = dict(module.named_children())
    one_stage = {"head", "anchor_generator"} <= parts.keys()
    return {"backbone", "transform"} <= parts.keys() and (one_stage or {"rpn", "roi_heads"} <= parts.keys())


def without_threshold(module: nn.Module) -> bool:
    """Let the detection model keep detections of any score, in place; False where no part of it has a threshold."""
    parts = [part for part in module.modules() if isinstance(getattr(part, "score_thresh", None), float | int)]
    for part in parts:
        part.score_thresh = 0.0  # type: ignore[assignment]
    return bool(parts)


def image_batch(module: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Resize and pad images (3, height, width) by the model's own transform to one batch (N, 3, height, width)."""
    transform: Any = module.get_submodule("transform")
    training = transform.training
    try:
        batch: Tensor = transform.eval()(list(images))[0].tensors
    finally:
        transform.train(training)
    return batch


def raw_outputs(module: nn.Module, batch: Tensor, regions: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Run the network alone: all that it computes before anything is chosen, decoded or suppressed.

    Args:
        module: a detection model in evaluation mode.
        batch: images (N, 3, height, width), resized and normalised already (`image_batch`).
        regions: boxes (R, 4) in each image for the box, mask and keypoint heads. Without them, these heads see zeros in
            place of the features of `PROPOSALS` and `DETECTIONS` regions an image, so that no shape depends on a value;
            then only costs and dependencies are meaningful.

    Returns:
        the outputs of each head by name: ``head.0``, ``rpn.0``, ``box.1``, ``mask.0`` …
    """
    features = module.get_submodule("backbone")(batch)
    features = {"0": features} if isinstance(features, Tensor) else features
    maps = list(features.values())
    if not hasattr(module, "roi_heads"):
        return _named("head", module.get_submodule("head")(maps))
    outputs = _named("rpn", module.get_submodule("rpn.head")(maps))
    roi_heads: Any = module.get_submodule("roi_heads")
    for name in _HEADS:
        head = getattr(roi_heads, f"{name}_head", None)
        if head is None:
            continue
        pool = getattr(roi_heads, f"{name}_roi_pool")
        if regions is None:
            count = len(batch) * (PROPOSALS if name == "box" else DETECTIONS)
            pooled = 0 * maps[0].sum() + maps[0].new_zeros(count, maps[0].shape[1], *pool.output_size)
        else:
            pooled = pool(features, list(regions), [tuple(batch.shape[-2:])] * len(batch))
        outputs |= _named(name, getattr(roi_heads, f"{name}_predictor")(head(pooled)))
    return outputs


class RawOutputs(nn.Module):
    """A detection model reduced to its network: takes a list of images and gives `raw_outputs` on fixed regions.

    What a detection model returns depends on thresholds and on the order of scores, and may be empty.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Sequence[Tensor], *targets: Any) -> dict[str, Tensor]:
        """Take images (3, height, width) of any sizes; ignore targets."""
        batch = image_batch(self.module, images)
        return raw_outputs(self.module, batch, make_regions(batch))


def comparable(module: nn.Module) -> nn.Module:
    """Wrap a detection model such that `verify` can compare it.

    The detections depend on thresholds and on the order of scores; the network on fixed regions does not.

    Returns:
        A module that computes the network of a detection model; any other module as it is.

    Example:
        >>> surgery.verify(surgery.comparable(a), surgery.comparable(b), example_inputs)
    """
    return RawOutputs(module) if is_detector(module) else module


def make_regions(batch: Tensor, count: int = 8) -> list[Tensor]:
    """Make ``count`` boxes (count, 4) in each image, from an eighth of it to all of it, the same at every call."""
    height, width = batch.shape[-2:]
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(len(batch), count, 2, generator=generator) * 0.5
    sides = 0.125 + torch.rand(len(batch), count, 2, generator=generator) * 0.375
    boxes = torch.cat([corners, corners + sides], dim=-1) * torch.tensor([width, height, width, height])
    boxes[:, 0] = torch.tensor([0, 0, width, height])
    return list(boxes.to(batch.device, batch.dtype))


def _named(name: str, outputs: Any) -> dict[str, Tensor]:
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return {f"{name}.{k}": tensor for k, tensor in enumerate(tensors)}
