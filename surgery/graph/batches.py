"""Example inputs at another batch size.

The batch size of a set of inputs is the length of axis 0 of its first tensor; every tensor of that length along axis 0
is taken to run along the batch. Where the first input is a list of images, (channels, height, width) each, as detection
models take it, the batch size is the length of that list, and every list of that length runs along the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgery.errors import UsageError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def batch_of(args: Args, kwargs: Kwargs) -> int | None:
    """The batch size of these inputs: the length of their list of images, or of axis 0 of their first tensor; None if
    they have none."""
    if is_list_of_images(args):
        return len(args[0])
    first = next(iter(tensors((args, kwargs))), None)
    return None if first is None or first.ndim == 0 else first.shape[0]


def is_list_of_images(args: Args) -> bool:
    """Whether the first positional input is a list of tensors with three axes each."""
    images = args[0] if args else None
    return (
        isinstance(images, list)
        and bool(images)
        and all(isinstance(image, torch.Tensor) and image.ndim == 3 for image in images)
    )


def with_batch(args: Args, kwargs: Kwargs, size: int) -> tuple[Args, Kwargs]:
    """These inputs with ``size`` samples: the samples given, and beyond those, copies of them.

    A copy is rolled along its last axis, so that it differs from its original and yet holds values of the same kind
    (token numbers stay token numbers). A graph that mixes up samples cannot then pass for one that does not. Masks
    (bool tensors) stay as they are: rolled, they may leave nothing of a sample.
    """
    batch = batch_of(args, kwargs)
    if not batch:
        raise UsageError("the example inputs have no batch axis: their first tensor has no axis 0, or an empty one")
    if is_list_of_images(args):
        return _with_lists(args, kwargs, batch, size)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != batch:
            return tensor
        rows = [tensor[i % batch] for i in range(size)]
        rolled = tensor.ndim > 1 and tensor.dtype != torch.bool
        return torch.stack([row.roll(i // batch, -1) if rolled else row for i, row in enumerate(rows)])

    return each_tensor(resize, args, kwargs)


def _with_lists(args: Args, kwargs: Kwargs, batch: int, size: int) -> tuple[Args, Kwargs]:
    """As `with_batch`, where each list of ``batch`` things among the inputs runs along the batch."""

    def resize(given: Any) -> Any:
        if not isinstance(given, list) or len(given) != batch:
            return given
        return [_roll(given[i % batch], i // batch) for i in range(size)]

    return tuple(resize(arg) for arg in args), {name: resize(value) for name, value in kwargs.items()}


def _roll(sample: Any, shift: int) -> Any:
    """An image rolled along its last axis; what belongs to an image, such as its boxes, stays as it is."""
    return sample.roll(shift, -1) if isinstance(sample, torch.Tensor) and sample.ndim == 3 else sample


def each_tensor(change: Callable[[torch.Tensor], torch.Tensor], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """These inputs with each of their tensors changed. One tensor given twice stays one."""
    once = {id(tensor): change(tensor) for tensor in tensors((args, kwargs))}
    changed: tuple[Args, Kwargs] = pytree.tree_map_only(torch.Tensor, lambda tensor: once[id(tensor)], (args, kwargs))
    return changed


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a nest of tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
