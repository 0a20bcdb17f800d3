"""Rows of the rule table for the ops and layers of `torchvision.ops` that detection models are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
import torchvision

from surgery.axes.labels import Fields, Labelled
from surgery.axes.ops import Op
from surgery.graph.rule_table import oprule
from surgery.rules.conv_and_linear import WEIGHT_AND_BIAS, convolve, linear_macs, resize_conv


@oprule(torchvision.ops.roi_align, torchvision.ops.roi_pool)
def _roi_align(op: Op, input: Labelled, boxes: Any, *rest: Any, **named: Any) -> Any:
    """Boxes are cut out of each channel alike."""
    for other in boxes if isinstance(boxes, (list, tuple)) else [boxes]:
        op.lose(list(other.fields), f"{op.name} reads positions from it")
    read, rest = op.axis(input, 1)
    op.lose(list(rest), f"{op.name} cuts positions out of it")
    return op.alike(() if read is None else (read,))


@oprule(
    torch.ops.torchvision.roi_align,
    torch.ops.torchvision.roi_pool,
    torchvision.ops.RoIAlign,
    torchvision.ops.RoIPool,
)
def _roi_align_kernel(op: Op, input: Labelled, rois: Any, *rest: Any, **named: Any) -> Any:
    """What `_roi_align` calls; the positions of the maxima, second result of ``roi_pool``, are within a channel."""
    return _roi_align(op, input, rois)


@oprule(torchvision.ops.deform_conv2d, torchvision.ops.DeformConv2d, rewrite=resize_conv, linear="writes",
        zeros=WEIGHT_AND_BIAS, python="never", macs=linear_macs)  # fmt: skip
def _deform_conv(
    op: Op,
    input: Labelled,
    offset: Labelled,
    weight: Labelled | None = None,
    bias: Labelled | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    mask: Labelled | None = None,
) -> Fields:
    """A convolution whose positions, and with ``mask`` factors of them, come from other tensors."""
    if op.module is not None and weight is not None:  # the layer's mask is its third argument
        mask, weight = weight, None
    held = op.param("weight", weight)
    assert held is not None
    for other in (offset, mask):
        if other is not None:
            op.lose(list(other.fields), f"{op.name} reads positions from it")
    input = Labelled(input.value, op.keep(input, [0], f"{op.name} reads positions of its own for each"))
    taps = 2 * math.prod(held.shape[2:])
    if offset.shape[-3] != taps or held.shape[1] != input.shape[-3]:
        return op.unknown(input, weight, bias, why="has groups")
    return convolve(op, input, weight, bias, 1, False, stride, padding, mixed=True)
