"""Find the inputs to run a module on: the caller's own, or those of a traced module, at a chosen batch size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from surgery.errors import SurgeryError, UsageError
from surgery.graph import tracing
from surgery.graph.batches import Args, Kwargs, each_tensor, is_list_of_images, tensors, with_batch


def resolve(
    module: nn.Module,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_size: int | None = None,
) -> tuple[Args, Kwargs]:
    """Find the positional and named inputs to call ``module`` with.

    Args:
        example_inputs: a tensor or a tuple of positional inputs, ``kwargs`` the named ones. Without both, the
            inputs are random ones of the shapes that ``module`` was traced with.
        batch_size: resize the batch axis to this length.

    Raises:
        UsageError: an untraced module without inputs, or no batch axis to resize.
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


def copy_inputs(args: Args, kwargs: Kwargs, device: str | None = None) -> tuple[Args, Kwargs]:
    """Copy the tensors of inputs, to ``device`` if one is given: a module may write into them."""
    return each_tensor(lambda tensor: tensor.detach().to(device, copy=True), args, kwargs)


def images_of(args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
    """Find the tensors whose last two axes are the height and width of images or videos.

    They are those with four axes or more, and the members of a list of images.
    """
    listed = args[0] if is_list_of_images(args) else []
    return [tensor for tensor in tensors((args, kwargs)) if tensor.ndim >= 4 or any(tensor is one for one in listed)]


def enlarge(args: Args, kwargs: Kwargs, higher: int, wider: int) -> tuple[Args, Kwargs]:
    """Make the images among inputs ``higher`` and ``wider`` by so many pixels, repeated like tiles."""
    ids = {id(image) for image in images_of(args, kwargs)}

    def tile(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in ids:
            return tensor
        height, width = tensor.shape[-2:]
        return tensor[..., torch.arange(height + higher) % height, :][..., torch.arange(width + wider) % width]

    return each_tensor(tile, args, kwargs)


def other_values(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """Draw other numbers for the floating-point tensors of inputs, the same at every call.

    They are drawn from the tensor's own numbers with replacement, so that sums and counts change too. If all are equal,
    they are random fractions of that number, or of 1 if it is 0.
    """
    generator = torch.Generator().manual_seed(0)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        values = tensor.flatten()
        if (values != values[0]).any():
            return values[torch.randint(len(values), tensor.shape, generator=generator).to(tensor.device)]
        fractions = 0.5 + torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        return fractions * tensor if values[0] else fractions

    return each_tensor(change, args, kwargs)


@contextmanager
def refusing_bad_inputs(args: Args, kwargs: Kwargs) -> Iterator[None]:
    """Turn what a module raises on inputs it cannot take into a one-line `UsageError` that gives their shapes."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # what a module's own code checks, it may raise as anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors((args, kwargs))) or "no tensor"
        raise UsageError(f"the module cannot be run on these inputs ({shapes}): {squash(error)}") from error


def squash(error: BaseException) -> str:
    """Write an error's message in one line of at most 400 characters, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
