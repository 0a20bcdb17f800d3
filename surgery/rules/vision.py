"""Rows of the rule table for the ops and layers of `torchvision.ops` that detection models are made of."""

from __future__ import annotations

from typing import Any

import torch
import torchvision

from surgery.axes.labels import Labelled
from surgery.axes.ops import Op
from surgery.graph.table import oprule


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
