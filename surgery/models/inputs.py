"""The inputs a module is measured on: the caller's own, or those a traced module remembers, at a chosen batch size.

The batch size of a set of inputs is the length of axis 0 of its first tensor; every tensor of that length along axis 0
is taken to run along the batch. Where the first input is a list of images, (channels, height, width) each, as detection
models take it, the batch size is the length of that list, and every list of that length runs along the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.errors import SurgeryError, UsageError
from surgery.graph import tracing

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def resolve(
    module: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_size: int | None = None,
) -> tuple[Args, Kwargs]:
    """The positional and named inputs to call ``module`` with, at ``batch_size`` where one is given.

    ``example_inputs`` is a tensor or a tuple of positional inputs. Where neither it nor ``kwargs`` is given, the inputs
    are random ones of the shapes ``module`` was traced with.

    Raises `UsageError` where there is nothing to go by, or no batch axis to resize.
    """
    if example_inputs is None and kwargs is None:
        args, named = tracing.example_inputs(module)
        if batch_size is None or not is_list_of_images(args):
            return tracing.example_inputs(module, batch_size=batch_size)
        return with_batch(args, named, batch_size)
    given = () if example_inputs is None else example_inputs
    args = tuple(given) if isinstance(given, tuple | list) else (given,)
    named = dict(kwargs or {})
    return (args, named) if batch_size is None else with_batch(args, named, batch_size)


def copied(args: Args, kwargs: Kwargs, device: str | None = None) -> tuple[Args, Kwargs]:
    """These inputs with copies of their tensors, on ``device`` where one is given: a module may write into them."""
    return _each(lambda tensor: tensor.detach().to(device, copy=True), args, kwargs)


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
    (token numbers stay token numbers). A graph that mixes up samples cannot then pass for one that does not.
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
        return torch.stack([row.roll(i // batch, -1) if row.ndim else row for i, row in enumerate(rows)])

    return _each(resize, args, kwargs)


def _with_lists(args: Args, kwargs: Kwargs, batch: int, size: int) -> tuple[Args, Kwargs]:
    """As `with_batch`, where each list of ``batch`` things among the inputs runs along the batch."""

    def resize(given: Any) -> Any:
        if not isinstance(given, list) or len(given) != batch:
            return given
        return [_rolled(given[i % batch], i // batch) for i in range(size)]

    return tuple(resize(arg) for arg in args), {name: resize(value) for name, value in kwargs.items()}


def _rolled(sample: Any, shift: int) -> Any:
    """An image rolled along its last axis; what belongs to an image, such as its boxes, stays as it is."""
    return sample.roll(shift, -1) if isinstance(sample, torch.Tensor) and sample.ndim == 3 else sample


def images_of(args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
    """The tensors among these inputs whose last two axes are the height and width of images or videos.

    They are those of four axes or more, and the members of a list of images.
    """
    listed = args[0] if is_list_of_images(args) else []
    return [tensor for tensor in tensors((args, kwargs)) if tensor.ndim >= 4 or any(tensor is one for one in listed)]


def enlarged(args: Args, kwargs: Kwargs, higher: int, wider: int) -> tuple[Args, Kwargs]:
    """These inputs with `images_of` them ``higher`` and ``wider`` by so many pixels: repeated, as tiles are."""
    ids = {id(image) for image in images_of(args, kwargs)}

    def tiled(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in ids:
            return tensor
        height, width = tensor.shape[-2:]
        return tensor[..., torch.arange(height + higher) % height, :][..., torch.arange(width + wider) % width]

    return _each(tiled, args, kwargs)


def other_values(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """These inputs with other numbers of the same kind in their floating-point tensors: drawn from theirs, with
    replacement, so that sums and counts change, too.

    Where all are one number, random fractions of it, or of 1 if it is 0. It is the same at every call.
    """
    generator = torch.Generator().manual_seed(0)

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        values = tensor.flatten()
        if (values != values[0]).any():
            return values[torch.randint(len(values), tensor.shape, generator=generator)]
        fractions = 0.5 + torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        return fractions * tensor if values[0] else fractions

    return _each(changed, args, kwargs)


def _each(change: Callable[[torch.Tensor], torch.Tensor], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """These inputs with each of their tensors changed. One tensor given twice stays one."""
    once = {id(tensor): change(tensor) for tensor in tensors((args, kwargs))}
    changed: tuple[Args, Kwargs] = pytree.tree_map_only(torch.Tensor, lambda tensor: once[id(tensor)], (args, kwargs))
    return changed


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a nest of tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def refusing_bad_inputs(args: Args, kwargs: Kwargs) -> Iterator[None]:
    """Turn what a module raises on inputs it cannot take into a one-line `UsageError` that gives their shapes."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # what a module's own code checks, it may raise as anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors((args, kwargs))) or "no tensor"
        raise UsageError(f"the module cannot be run on these inputs ({shapes}): {squashed(error)}") from error


def squashed(error: BaseException) -> str:
    """An error's message in one line of at most 400 characters, or its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
