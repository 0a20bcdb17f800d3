"""Which axes an ONNX file leaves open, and on what inputs that is checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from surgery.deploy.onnx.exporters import OpenAxes, Order
from surgery.deploy.onnx.parity import Case
from surgery.errors import UsageError
from surgery.graph.batches import Args, Kwargs, batch_of, is_list_of_images, tensors, with_batch
from surgery.models.inputs import enlarge, images_of, other_values

CHECKED_BATCHES = (1, 2, 3)
_EXPORT_BATCH = 2
"""Not 1: a dimension of length 1 broadcasts, so an exporter may take it for a constant."""
_HIGHER, _WIDER = 32, 64
"""Pixels by which the second image size that is checked differs. Not the same, or the axes could be mixed up; of both,
networks that halve images five times can make whole numbers."""


@dataclass(frozen=True)
class Plan:
    """How to export a module that is called with ``args`` and ``kwargs``, on the CPU.

    ``dynamic_batch`` opens axis 0 of the tensors that have a batch axis. ``dynamic_size`` opens the height and width of
    images: images of one size share the names of these axes, but each image of a list has its own.

    Raises:
        UsageError: there is no axis to open.
    """

    args: Args
    kwargs: Kwargs
    dynamic_batch: bool
    dynamic_size: bool
    opset: int | None

    def __post_init__(self) -> None:
        if self.dynamic_batch and is_list_of_images(self.args):
            raise UsageError("a list of images has no batch axis to leave open: each image is an input of its own")
        if self.dynamic_batch and not batch_of(self.args, self.kwargs):
            raise UsageError(
                "the example inputs have no batch axis to leave open: their first tensor has no axis 0, or an empty "
                "one; pass dynamic_batch=False (--fixed-batch)"
            )
        if self.dynamic_size and not images_of(self.args, self.kwargs):
            raise UsageError("dynamic_size: none of the example inputs is an image, (N, channels, height, width)")

    def order(self, model: nn.Module, outputs: Any, *, frozen: bool) -> Order:
        """Return what an exporter must do; ``outputs`` are those of the example inputs."""
        return Order(model, *self._exported, outputs, self._open_axes, self.opset, frozen)

    def cases(self) -> Iterator[Case]:
        """Yield the inputs on which the file and the module are compared."""
        for batch in self.batches:
            yield Case(f"at batch {batch}", *self._at(batch))
        if not self.batches:
            yield Case("on the example inputs", self.args, self.kwargs)
        yield Case("on other values", *other_values(*self._exported), optional=True)
        for height, width in self.other_sizes:
            yield Case(f"on images of {height} x {width}", *enlarge(*self._exported, _HIGHER, _WIDER))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that are compared; none where the inputs have no batch axis."""
        batch = batch_of(self.args, self.kwargs)
        return CHECKED_BATCHES if self.dynamic_batch else () if batch is None else (batch,)

    @property
    def other_sizes(self) -> tuple[tuple[int, int], ...]:
        """The image sizes (height, width), in pixels, that are compared besides that of the example inputs."""
        if not self.dynamic_size:
            return ()
        height, width = images_of(self.args, self.kwargs)[0].shape[-2:]
        return ((height + _HIGHER, width + _WIDER),)

    @property
    def open_names(self) -> tuple[str, ...]:
        """The names of the open axes, each once."""
        return tuple(dict.fromkeys(name for axes in self._open_axes for name in axes.values()))

    @cached_property
    def _exported(self) -> tuple[Args, Kwargs]:
        return self._at(_EXPORT_BATCH)

    def _at(self, batch: int) -> tuple[Args, Kwargs]:
        return with_batch(self.args, self.kwargs, batch) if self.dynamic_batch else (self.args, self.kwargs)

    @cached_property
    def _open_axes(self) -> OpenAxes:
        args, kwargs = self._exported
        images = {id(image) for image in images_of(args, kwargs)} if self.dynamic_size else set()
        listed = is_list_of_images(args)
        batch = batch_of(self.args, self.kwargs)
        sizes: list[object] = []
        found: OpenAxes = []
        for given, tensor in zip(tensors((self.args, self.kwargs)), tensors((args, kwargs)), strict=True):
            axes = {0: "batch"} if self.dynamic_batch and given.ndim and given.shape[0] == batch else {}
            if id(tensor) in images:
                size = id(tensor) if listed else tensor.shape[-2:]
                sizes += [] if size in sizes else [size]
                mark = f"_{sizes.index(size)}" if listed or sizes.index(size) else ""
                axes |= {tensor.ndim - 2: f"height{mark}", tensor.ndim - 1: f"width{mark}"}
            found.append(axes)
        return found
