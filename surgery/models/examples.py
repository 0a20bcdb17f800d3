"""Example inputs of a source: random, of the right kind and size; and the targets that detection models train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.errors import UsageError
from surgery.models.catalogue import CATALOGUE, Entry
from surgery.models.libraries import LIBRARIES, open_library
from surgery.models.sources import Source, parse

Targets = list[dict[str, Tensor]]

FORMS = {
    "image": "N,C,H,W",
    "two images": "N,C,H,W",
    "list of images": "N,C,H,W",
    "video": "N,C,T,H,W",
    "tokens": "N,L",
    "features": "N,C,L",
}
"""The axes of the inputs of a model, by its kind."""

BOXES = 3
"""Objects in each image of `example_targets`."""


def example_inputs(
    source: str, batch_size: int = 2, image_size: int | None = None, frames: int | None = None
) -> Tensor | tuple[Any, ...]:
    """Make random inputs for the model that ``source`` names, the same at every call.

    Args:
        source: as `build` takes it.
        batch_size: number of samples.
        image_size: height and width in pixels; by default what the model is built for, or what the catalogue says. A
            factory of your own has no default.
        frames: length of a video; by default the catalogue's.

    Returns:
        images (batch_size, 3, height, width) or videos (batch_size, 3, frames, height, width); for RAFT a tuple of two
        tensors of images; for a detection model, which trains on `example_targets` as well, a tuple with a list of
        images (3, height, width).

    Raises:
        UsageError: a size that the model does not take.

    Example:
        >>> surgery.models.example_inputs("resnet18", batch_size=4).shape
        torch.Size([4, 3, 224, 224])
    """
    return inputs_of_shape(source, (batch_size, *_sample_size(parse(source), image_size, frames)))


def inputs_of_shape(source: str, shape: Sequence[int]) -> Tensor | tuple[Any, ...]:
    """Make random inputs as `example_inputs` does, of a given shape.

    Args:
        source: as `build` takes it.
        shape: (N, channels, height, width), or (N, channels, frames, height, width) of videos.

    Returns:
        as `example_inputs`.

    Raises:
        UsageError: the model takes another number of axes, or is built for another size.
    """
    parsed = parse(source)
    entry = parsed.entry
    if entry is not None:
        _refuse_misfit(parsed, entry, tuple(shape))
    generator = torch.Generator().manual_seed(0)
    if parsed.prefix in LIBRARIES:
        inputs: Tensor | tuple[Any, ...] = open_library(parsed.prefix).inputs(parsed, tuple(shape), generator)
        return inputs
    samples = torch.randn(*shape, generator=generator)
    if entry is not None and entry.kind == "two images":
        return samples, torch.randn(*shape, generator=generator)
    if entry is not None and entry.kind == "list of images":
        return (list(samples),)
    return samples


def small_inputs(name: str, batch_size: int = 2) -> Tensor | tuple[Any, ...]:
    """Make inputs for ``build(CATALOGUE[name].small_source)``, the small form of a model that is good for tests."""
    entry = CATALOGUE[name]
    return example_inputs(entry.small_source, batch_size, entry.smallest, entry.frames)


def example_targets(source: str, batch_size: int = 2, image_size: int | None = None) -> Targets:
    """Make the targets that a detection model trains on, for the images of `example_inputs`.

    Args:
        source, batch_size, image_size: as in `example_inputs`.

    Returns:
        for each image a dictionary of three objects, as torchvision documents it: ``boxes`` (3, 4) in pixels, inside
        the image; ``labels`` (3,), none of them the background; and as the model needs them ``masks`` (3, height,
        width) of 0 and 1 and ``keypoints`` (3, keypoints, 3), all visible.

    Raises:
        UsageError: a model that takes no targets.

    Example:
        >>> losses = model.train()(*example_inputs(source), example_targets(source))
    """
    parsed = parse(source)
    if parsed.entry is None or not parsed.entry.targets:
        raise UsageError(f"{source!r} is not a detection model of the catalogue: it is called without targets")
    height, width = _sample_size(parsed, image_size, None)[-2:]
    generator = torch.Generator().manual_seed(1)
    return [_objects(parsed, parsed.entry, height, width, generator) for _ in range(batch_size)]


def _sample_size(source: Source, image_size: int | None, frames: int | None) -> tuple[int, ...]:
    """Return (3, height, width), or (3, frames, height, width)."""
    entry = source.entry
    if entry is None:
        if image_size is None:
            raise UsageError(
                f"the input size of '{source.prefix}:{source.name}' is not known: pass image_size (--input-shape)"
            )
        return (3, image_size, image_size)
    size = source.sample_size()
    if entry.kind == "video":
        size = (3, frames or size[1], *size[2:])
    if image_size is None or entry.kind in ("tokens", "features"):
        return size
    return (*size[:-2], image_size, image_size)


def _refuse_misfit(source: Source, entry: Entry, shape: tuple[int, ...]) -> None:
    form = FORMS[entry.kind]
    if len(shape) != 1 + len(entry.input_size):
        raise UsageError(f"model {entry.name!r} takes inputs of the form {form}, not {','.join(map(str, shape))}")
    size = source.sample_size()
    if entry.fixed and shape[2:] != size[1:]:
        wanted, given = (" x ".join(map(str, s)) for s in (size[1:], shape[2:]))
        hint = f"; {entry.size_keyword}= builds it for another" if entry.size_keyword else ""
        raise UsageError(f"model {entry.name!r} is built for inputs of {wanted}, not {given}{hint}")


def _objects(source: Source, entry: Entry, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    sides = torch.tensor([width, height])
    corners = torch.rand(BOXES, 2, 2, generator=generator) * 0.4 + torch.tensor([0.05, 0.55]).unsqueeze(-1)
    boxes = (corners * sides).flatten(1)  # upper left corner, lower right corner
    fallback = 2 if "keypoints" in entry.targets else 91
    classes = source.keywords.get("num_classes", fallback)
    assert isinstance(classes, int)
    found = {"boxes": boxes, "labels": torch.randint(1, classes, (BOXES,), generator=generator)}
    if "masks" in entry.targets:
        found["masks"] = _fill(boxes, height, width)
    if "keypoints" in entry.targets:
        count = source.keywords.get("num_keypoints", 17)
        assert isinstance(count, int)
        inside = torch.rand(BOXES, count, 2, generator=generator)
        points = boxes[:, None, :2] + inside * (boxes[:, None, 2:] - boxes[:, None, :2])
        found["keypoints"] = torch.cat([points, torch.ones(BOXES, count, 1)], dim=-1)
    return found


def _fill(boxes: Tensor, height: int, width: int) -> Tensor:
    """Make a mask (N, height, width) for each box, 1 inside it."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    return (((y > top) & (y < bottom))[:, :, None] & ((x > left) & (x < right))[:, None, :]).to(torch.uint8)
