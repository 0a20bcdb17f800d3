"""From what people have, data sets and loaders of torch and of Hugging Face, to `Data`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from surgery.errors import UsageError
from surgery.training.data.data import (
    Data,
    Derived,
    Images,
    Normalisation,
    count,
    labels_of,
    make_transform,
    stratified_split,
)

HELD_OUT = ("validation", "valid", "val", "dev", "test")
"""Names of the part to test on in a mapping of parts; where there are several, the first of these."""

LARGEST = 224
"""Images of a data set of rows keep their size, but are scaled down to this."""


AnyData = Data | Dataset[Any] | DataLoader[Any] | Mapping[str, Any] | tuple[Any, Any]
"""What `as_data` takes."""


def as_data(data: AnyData, *, image_size: int | None = None, test_fraction: float = 0.0, seed: int = 0) -> Data:
    """Make `Data` of a data set of your own.

    `train`, `distill`, `evolve`, `lottery` and `tradeoff` do this with what they are given; call it to choose.

    Args:
        data: a map-style `torch.utils.data.Dataset` of (image, label), with images as float tensors (C, H, W) of one
            size; a `DataLoader` of one, of which the data set and ``collate_fn`` are taken (batch size, order and
            workers are settings of a training); a data set of Hugging Face, with a column of images and one of whole
            numbers; a pair (to train on, to test on), or a mapping of parts by name (``"train"``, ``"test"``), of any
            of these; or `Data`, which is returned as it is.
        image_size: side in pixels to which the images of rows are scaled; by default their own, at most 224.
        test_fraction: part of each class, of a set without parts, that is kept to test on; none by default.
        seed: draws these images.

    Returns:
        the data, with names of classes where the data set has any.

    Raises:
        UsageError: a data set without a length, rows without images or labels, images that are no tensors or of another
            size than the first, labels that are no whole numbers from 0.

    Example:
        >>> data = surgery.as_data((train_set, test_set))
        >>> history = surgery.train(traced, DataLoader(train_set, 32), epochs=1)
    """
    if isinstance(data, Data):
        return data
    if isinstance(data, (str, PurePath)):
        raise UsageError(f"{str(data)!r} is the name of a data set: load it with surgery.load_data")
    train, test = _find_parts(data)
    collate = _collate(train)
    images, held_out = (None if part is None else _open(part, image_size) for part in (train, test))
    assert images is not None
    labels = labels_of(images)
    if len(labels) == 0 or labels.min() < 0:
        raise UsageError("the data set has no images" if len(labels) == 0 else "labels must be whole numbers from 0")
    largest = max(int(labels_of(part).max(initial=0)) for part in (images, held_out) if part is not None)
    classes = _class_names(train, 1 + largest)
    first = images[0][0]
    name = type(_dataset(train)).__name__
    channels, size = int(first.shape[0]), int(first.shape[-1])
    if held_out is None:
        kept, aside = (
            stratified_split(labels.tolist(), fraction=test_fraction, seed=seed) if test_fraction else ([], [])
        )
        whole = images
        images, held_out = (Subset(whole, kept) if test_fraction else whole), Subset(whole, aside)
    return Data(name, images, held_out, classes, size, Normalisation(), channels=channels, collate=collate)


def _find_parts(data: Any) -> tuple[Any, Any]:
    if isinstance(data, Mapping):
        names = {str(name).lower(): name for name in data}
        held_out = next((names[name] for name in HELD_OUT if name in names), None)
        if "train" not in names:
            raise UsageError(f"the data have no part called 'train', but {', '.join(map(str, data))}")
        return data[names["train"]], None if held_out is None else data[held_out]
    if isinstance(data, (tuple, list)):
        if len(data) != 2:
            raise UsageError(f"data are one set, or a pair to train and to test on, not {len(data)}")
        return data[0], data[1]
    return data, None


def _dataset(part: Any) -> Any:
    return part.dataset if isinstance(part, DataLoader) else part


def _collate(part: Any) -> Any:
    own = part.collate_fn if isinstance(part, DataLoader) else None
    return None if own is default_collate else own


def _open(part: Any, image_size: int | None) -> Images:
    """The items of a part as (tensor, label)."""
    images = _dataset(part)
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise UsageError(
            f"{type(images).__name__} is no data set that can be read by position: pass a map-style Dataset of (image, "
            "label), a DataLoader of one, or surgery.load_data(...)"
        )
    if count(images) == 0:
        return cast(Images, images)
    first = images[0]
    if isinstance(first, Mapping):
        return _Rows(images, *_find_columns(images, first), image_size)
    if not (isinstance(first, (tuple, list)) and len(first) >= 2):
        raise UsageError(f"items of {type(images).__name__} are {type(first).__name__}, and must be (image, label)")
    if not (isinstance(first[0], Tensor) and first[0].ndim == 3 and first[0].is_floating_point()):
        what = tuple(first[0].shape) if isinstance(first[0], Tensor) else type(first[0]).__name__
        raise UsageError(
            f"images of {type(images).__name__} are {what}, and must be float tensors (C, H, W): give the data set a "
            "transform such as torchvision.transforms.v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])"
        )
    return cast(Images, images)


def _find_columns(images: Any, row: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of images and of labels: the first that hold such."""
    image = [name for name, value in row.items() if _is_image(value)]
    label = [
        name for name, value in row.items() if isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    ]
    label.sort(key=lambda name: name not in ("label", "labels", "target", "class"))
    if not image or not label:
        what = "images" if not image else "labels (whole numbers)"
        raise UsageError(f"{type(images).__name__} has no column of {what}: it has {', '.join(map(str, row))}")
    return image[0], label[0]


def _is_image(value: Any) -> bool:
    return isinstance(value, (Image.Image, Tensor, np.ndarray)) and len(np.shape(cast(Any, value))) in (0, 2, 3)


class _Rows(Derived):
    """Rows with columns, as Hugging Face's data sets give them."""

    def __init__(self, images: Any, image: str, label: str, image_size: int | None) -> None:
        super().__init__(images)
        self.columns = (image, label)
        size = image_size or min(LARGEST, *self._image(0).size)
        self.transform = make_transform(size, Normalisation())

    def _image(self, index: int) -> Image.Image:
        value = cast(Any, self.images)[index][self.columns[0]]
        if isinstance(value, Image.Image):
            return value
        array = np.asarray(value)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
            array = array.transpose(1, 2, 0)
        if np.issubdtype(array.dtype, np.floating):
            array = (255 * array).round()
        array = array.clip(0, 255).astype(np.uint8)
        return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)

    @property
    def labels(self) -> Any:
        """The column of labels, read without the images."""
        return np.asarray(cast(Any, self.images)[self.columns[1]], dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.transform(self._image(index)), int(cast(Any, self.images)[index][self.columns[1]])


def _class_names(part: Any, least: int) -> tuple[str, ...]:
    images = _dataset(part)
    features = getattr(images, "features", None)
    named = [f.names for f in features.values() if getattr(f, "names", None)] if isinstance(features, Mapping) else []
    found = named[0] if named else getattr(images, "classes", None)
    if found is None or len(found) < least:
        return tuple(map(str, range(least)))
    return tuple(n[0] if isinstance(n, tuple) else str(n) for n in found)
