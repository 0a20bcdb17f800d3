"""A folder of images as people have them: class folders, with or without parts to train and to test on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from surgery.errors import UsageError
from surgery.units import counted

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation", "dev", "test")
"""Names of the part to test on; where a folder has several, the first of these."""

DECODED = 50_000
"""Folders of more images are not decoded before training; only the headers of their files are read."""

Samples = list[tuple[str, int]]
"""Path and label of each image."""


class ImageFiles(Dataset[tuple[Any, int]]):
    """Images in files, decoded when they are read.

    Attributes:
        samples: path and label of each.
        transform: from a Pillow image in RGB to what the data set gives.
    """

    def __init__(self, samples: Samples, transform: Callable[[Any], Any]) -> None:
        self.samples = samples
        self.targets = [label for _, label in samples]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


@dataclass(frozen=True)
class ImageFolder:
    """What a folder holds; ``test`` is None where it has no part to test on."""

    classes: tuple[str, ...]
    train: Samples
    test: Samples | None


def open_folder(spec: str, root: Path, *, skip_bad: bool = False) -> ImageFolder:
    """List the images of a folder, and read each once.

    Args:
        spec: the data set's name, for messages.
        root: a folder of class folders, or of ``train`` and one of `HELD_OUT` (in any case) with class folders.
        skip_bad: leave out images that cannot be read.

    Returns:
        the classes in alphabetical order, and the images of each part.

    Raises:
        UsageError: fewer than two classes, an empty class, parts with different classes, a class called like a part, or
            images that cannot be read; names the first.
    """
    where = f"data set {spec!r}"
    if not root.is_dir():
        raise UsageError(f"{where}: there is no folder {root}")
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if _is_visible_folder(path)}
    parts = [name for name in (TRAIN, *HELD_OUT) if name in folders]
    if TRAIN not in folders:
        if parts:
            raise UsageError(
                f"{where}: {folders[parts[0]]} is called like a part of a data set, and there is no {root / TRAIN}: "
                f"put the training images there, or rename the class"
            )
        classes, train = _list_classes(where, root)
        return ImageFolder(classes, _check_images(where, train, classes, skip_bad), None)
    others = sorted(set(folders) - set(parts))
    if others:
        raise UsageError(
            f"{where}: {root} has the part {folders[TRAIN].name!r} and also {folders[others[0]].name!r}, which is "
            f"none: parts are called {', '.join((TRAIN, *HELD_OUT))}"
        )
    classes, train = _list_classes(where, folders[TRAIN])
    train = _check_images(where, train, classes, skip_bad)
    if len(parts) == 1:
        return ImageFolder(classes, train, None)
    held_out = folders[parts[1]]
    own, test = _list_classes(where, held_out)
    if own != classes:
        odd = ", ".join(sorted(set(own) ^ set(classes)))
        raise UsageError(f"{where}: {TRAIN} and {held_out.name} do not have the same classes: {odd}")
    return ImageFolder(classes, train, _check_images(where, test, classes, skip_bad))


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image as 8-bit RGB, as a viewer shows it.

    It is turned as its EXIF data say; 16 bits become 8; grey is repeated; what is transparent becomes white; palettes
    and CMYK are converted.

    Raises:
        OSError: no image, a damaged one, or pixels that have no range (floating point, 32 bits).
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
            pixels = np.asarray(image).astype(np.uint32)  # 16-bit grey
            return Image.fromarray(((pixels + 128) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise OSError(f"its pixels are numbers without a range (mode {image.mode}): convert it to 8 or 16 bits")
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")


def _is_visible_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _list_classes(where: str, root: Path) -> tuple[tuple[str, ...], Samples]:
    folders = sorted(path for path in root.iterdir() if _is_visible_folder(path))
    if len(folders) < 2:
        raise UsageError(
            f"{where}: {root} must hold one folder of images for each class, at least two, and has "
            f"{counted(len(folders), 'folder')}"
        )
    samples: Samples = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not files:
            raise UsageError(f"{where}: the class folder {folder} has no image ({', '.join(IMG_EXTENSIONS)})")
        samples += [(str(file), label) for file in files]
    return tuple(folder.name for folder in folders), samples


def _check_images(where: str, samples: Samples, classes: Sequence[str], skip_bad: bool) -> Samples:
    """The samples that can be read."""
    decode = len(samples) <= DECODED
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(lambda sample: _find_problem(sample[0], decode), samples))
    bad = [(path, problem) for (path, _), problem in zip(samples, problems, strict=True) if problem]
    if bad and not skip_bad:
        more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UsageError(
            f"{where}: {bad[0][0]} cannot be read ({bad[0][1]}){more}: remove it, or leave such images out with "
            "skip_bad=True (--skip-bad)"
        )
    good = [sample for sample, problem in zip(samples, problems, strict=True) if not problem]
    missing = sorted(set(range(len(classes))) - {label for _, label in good})
    if missing:
        raise UsageError(f"{where}: no image of the class {classes[missing[0]]!r} can be read ({bad[0][1]})")
    return good


def _find_problem(path: str, decode: bool) -> str:
    """What is wrong with an image file, in a few words; empty where nothing is."""
    try:
        if decode:
            read_image(path)
        else:
            with Image.open(path) as image:
                image.verify()
    except UnidentifiedImageError:
        return "no image, or a damaged one"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""
