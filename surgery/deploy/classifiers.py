"""A data set and classifiers that fit together: images of a size that all models take, models with its classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery import models as catalogue
from surgery.errors import UsageError
from surgery.graph.traced import TensorSpec, example_inputs, is_traced, with_info
from surgery.graph.tracing import trace
from surgery.training.data.adapt import AnyData, as_data
from surgery.training.data.data import Data, change_data, load_data
from surgery.units import counted


def data_for(
    models: Mapping[str, str | nn.Module],
    dataset: str | AnyData,
    *,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    augment: str = "none",
    skip_bad: bool = False,
    strict: bool = False,
) -> Data:
    """Load data at an image size, and with channels, that all models take.

    A traced module takes images as in its example inputs; a model of the catalogue, what its entry allows.

    Args:
        models: text for `surgery.models.build`, or modules, by their names in messages.
        dataset: a name, or what `surgery.as_data` takes.
        data_root, limit, augment, skip_bad, strict: as in `surgery.load_data`.
        image_size: side in pixels; by default the data's own, but at least the minimum of the models.

    Returns:
        The data set.

    Raises:
        UsageError: a model that does not take single images, models that take images of different sizes or channels;
            also as `surgery.load_data`.

    Example:
        >>> data = surgery.data_for({"the model": "torchvision:resnet18"}, "digits")
    """
    least, sizes, channels = 1, {}, {}
    for what, model in models.items():
        if not isinstance(model, str):
            if is_traced(model):
                (images, *_), _named = example_inputs(model)
                sizes[what], channels[what] = images.shape[-1], images.shape[1]
            continue
        parsed = catalogue.parse(model)
        if parsed.entry is None:
            continue
        if parsed.entry.kind != "image":
            raise UsageError(f"model {parsed.name!r} takes {parsed.entry.input_words}, and the data are single images")
        channels[what] = parsed.sample_size()[0]
        if parsed.entry.fixed:
            sizes[what] = parsed.sample_size()[-1]
        else:
            least = max(least, parsed.entry.minimum)
    if image_size is None and len(set(sizes.values())) > 1:
        found = " and ".join(f"{what} takes images of {size} x {size}" for what, size in sizes.items())
        raise UsageError(f"{found}: choose a size for all (--image-size)")
    if len(set(channels.values())) > 1:
        found = " and ".join(
            f"{what} takes images of {counted(number, 'channel')}" for what, number in channels.items()
        )
        raise UsageError(f"{found}: no images fit all of them")
    image_size = image_size or next(iter(sizes.values()), None)
    if not isinstance(dataset, str):
        return change_data(as_data(dataset, image_size=image_size), limit=limit, augment=augment)
    return load_data(
        dataset,
        data_root=data_root,
        image_size=image_size,
        at_least=least,
        limit=limit,
        augment=augment,
        channels=next(iter(channels.values()), 3),
        skip_bad=skip_bad,
        strict=strict,
    )


def classifier(
    model: str | nn.Module,
    data: Data,
    *,
    what: str = "the model",
    weights: str | None = None,
    trust: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Trace a model, and check that it classifies the data's images into the data's classes.

    Args:
        model: text for `surgery.models.build`, or a module, which is copied. A model of the catalogue is built with the
            number of classes of the data.
        data: the data set.
        what: the name of the model in messages.
        weights, trust, seed: as in `surgery.models.build`.

    Returns:
        A traced module in evaluation mode.

    Raises:
        UsageError: the model cannot be built, does not take the images, has a different number of classes, or weights
            that do not fit.

    Example:
        >>> traced = surgery.classifier("torchvision:resnet18", data)
    """
    images = torch.zeros(2, data.channels, data.image_size, data.image_size)
    source = None
    if isinstance(model, str):
        parsed = catalogue.parse(model)
        asked = parsed.keywords.get("num_classes", len(data.classes))
        if parsed.entry is not None and asked != len(data.classes):
            raise UsageError(f"{what} {model!r} has {asked} classes, and {data.source!r} has {len(data.classes)}")
        keywords = {} if parsed.entry is None else {"num_classes": len(data.classes)}
        source = catalogue.canonical(model, **keywords, weights=weights)
        model = catalogue.build(model, **keywords, weights=weights, trust=trust, seed=seed)
    _refuse_misfit(model, images, data, what)
    traced = copy.deepcopy(model) if is_traced(model) else trace(model, images, source=source)
    if source is None:
        catalogue.give_weights(traced, weights, what=what)
    (traced_with, *_), _named = example_inputs(traced)
    if traced_with.shape[1:] != images.shape[1:]:
        with_info(traced, args=(TensorSpec(tuple(images.shape), images.dtype),))
    return traced.eval()


def _refuse_misfit(model: nn.Module, images: Tensor, data: Data, what: str) -> None:
    size = f"{data.image_size} x {data.image_size} images"
    probe = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            outputs = probe(images)
    except (RuntimeError, UsageError) as error:
        raise UsageError(f"{what} cannot be run on {size}, try another size (--image-size): {error}") from error
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape != (2, len(data.classes)):
        raise UsageError(f"{data.source!r} has {len(data.classes)} classes, but from 2 images {what} makes {shape}")
