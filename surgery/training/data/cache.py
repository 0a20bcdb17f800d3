"""A teacher's outputs for all training images, computed once and kept in memory or in a folder of .npy files."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from surgery.errors import CheckpointError, DamageWarning, UsageError
from surgery.graph.traced import named_tensors
from surgery.models.saved import DTYPES
from surgery.progress import Progress
from surgery.settings import CHANGING
from surgery.storage.documents import (
    DIGEST,
    check_signature,
    check_type,
    digest_file,
    read_object,
    refuse_special,
    write_object,
)
from surgery.storage.folders import refuse_folder
from surgery.storage.locks import hold
from surgery.training.data.data import Extended, Images, count
from surgery.training.data.fingerprint import images_digest, is_deterministic, module_digest
from surgery.training.modes import in_mode
from surgery.units import mebibytes

MARKER = "teacher-outputs.json"
"""The file that marks a folder as a cache. It says what the cache holds, and whether it is complete."""

_VERSION = 2
"""Since 2, the marker holds digests."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class StoredImages(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The images of a cache."""

    count: _Count
    sha256: str


class StoredOutput(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A file of a cache: one output of the teacher for all images."""

    file: Annotated[str, msgspec.Meta(pattern=r"^output-[0-9]+-[0-9a-f]+\.npy$")]
    shape: list[_Count]
    dtype: str
    sha256: str


class Marker(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The content of the file that marks a cache."""

    format: str
    version: Literal[2]
    images: StoredImages
    teacher: str
    complete: bool
    sha256: str
    outputs: list[StoredOutput] = []


def cache_outputs(
    teacher: nn.Module,
    images: Images,
    *,
    where: str | os.PathLike[str],
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "cache",
) -> Images:
    """Add the teacher's outputs to ``images``.

    The teacher runs in ``eval()`` and without gradients, on its own device. Outputs are kept on the CPU, in their own
    dtype.

    Args:
        teacher: from images (N, C, H, W) to a tensor (N, ...) or a tuple of them, such as ``attach_hint(...).teacher``.
        images: images that are the same each time they are read.
        where: ``"memory"``, or a folder to which `write_cache` writes the outputs unless they are there.
        batch_size: images in one call of the teacher.
        workers: processes that read images.
        progress: called after each batch that is computed.

    Returns:
        Items (image, label, output, ...), in the order of ``images``.

    Raises:
        UsageError: as `write_cache`.
    """
    if where == "memory":
        outputs = [torch.empty((count(images), *o.shape), dtype=o.dtype) for o in _describe(teacher, images)]
        _compute(teacher, images, outputs, batch_size, workers, progress, task)
        return _InMemory(images, outputs)
    write_cache(teacher, images, where, batch_size=batch_size, workers=workers, progress=progress, task=task)
    return _open(Path(where), images, checked=True)


def write_cache(
    teacher: nn.Module,
    images: Images,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
    task: str = "cache",
) -> bool:
    """Write the teacher's outputs to a folder, for `open_cache`.

    A complete cache of the same images and of a teacher with the same structure and weights is kept if the teacher
    still gives the same values for the first images. Anything else is replaced. With several processes, let one write
    and the others open the folder afterwards.

    Returns:
        Whether any output was computed.

    Raises:
        UsageError: no images, or images that change from one reading to the next; a teacher whose outputs are not
            tensors with a row for each image; a folder with other files in it, or too little space.
    """
    folder = Path(folder)
    refuse_folder(folder, marker=MARKER, force=True)
    with hold(folder):
        return _write(teacher, images, folder, batch_size, workers, progress, task)


def _write(
    teacher: nn.Module,
    images: Images,
    folder: Path,
    batch_size: int,
    workers: int,
    progress: Progress | None,
    task: str,
) -> bool:
    """Write the folder, unless it is complete; nobody else does so meanwhile."""
    stored = _read_marker(folder)
    outputs = _describe(teacher, images)
    now = StoredImages(count(images), images_digest(images))
    wanted: dict[str, Any] = {
        "format": MARKER,
        "version": _VERSION,
        "images": msgspec.to_builtins(now),
        "teacher": module_digest(teacher),
    }
    if stored is not None and stored.complete and (stored.images, stored.teacher) == (now, wanted["teacher"]):
        damaged = _find_damaged(folder, stored)
        if damaged:
            warnings.warn(f"{damaged}: the outputs are computed again", DamageWarning, stacklevel=4)
        elif _same_values(folder, stored, outputs):
            return False
    _refuse_too_large(folder, sum(one.bytes for one in outputs) * count(images))
    folder.mkdir(parents=True, exist_ok=True)
    write_object(folder / MARKER, {**wanted, "complete": False})
    for leftover in _files(folder):
        leftover.unlink(missing_ok=True)
    run = secrets.token_hex(4)  # who reads the earlier files keeps them
    files = [folder / f"output-{k}-{run}.npy" for k in range(len(outputs))]
    try:
        maps = [_new_map(f, one, count(images)) for f, one in zip(files, outputs, strict=True)]
        tensors = [torch.from_numpy(m).view(one.dtype) for m, one in zip(maps, outputs, strict=True)]
        _compute(teacher, images, tensors, batch_size, workers, progress, task)
        for written in maps:
            written.flush()
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
    entries = [
        {"file": file.name, **one.to_dict(), DIGEST: digest_file(file)}
        for file, one in zip(files, outputs, strict=True)
    ]
    write_object(folder / MARKER, {**wanted, "outputs": entries, "complete": True})
    return True


def open_cache(folder: str | os.PathLike[str], images: Images) -> Images:
    """Add the outputs that `write_cache` has written to ``images``.

    Each worker of a loader maps the files when it first reads an item.

    Raises:
        UsageError: the folder holds no complete cache, or one of other images.
        CheckpointError: a file was damaged.
    """
    return _open(Path(folder), images, checked=False)


def _open(folder: Path, images: Images, *, checked: bool) -> Images:
    """`open_cache`; files that were ``checked`` just now are not read again."""
    stored = _read_marker(folder)
    if stored is None or not stored.complete:
        what = "its outputs are incomplete" if stored else f"it has no {MARKER}"
        raise UsageError(f"{folder} is not a cache of a teacher's outputs: {what}; write it with write_cache")
    found = StoredImages(count(images), images_digest(images))
    if stored.images != found:
        raise UsageError(
            f"{folder} has a teacher's outputs for {stored.images.count} other images, not for these "
            f"{found.count}: write them again with write_cache"
        )
    damaged = "" if checked else _find_damaged(folder, stored)
    if damaged:
        raise CheckpointError(f"{damaged}: write the outputs again with write_cache")
    return _OnDisk(images, [folder / e.file for e in stored.outputs], [DTYPES[e.dtype] for e in stored.outputs])


def cache_bytes(teacher: nn.Module, images: Images) -> int:
    """Compute how much memory, or disk, the teacher's outputs for all images take.

    Args:
        teacher: from images (N, C, H, W) to a tensor (N, ...), or a tuple of them.
        images: images that are the same each time they are read.

    Returns:
        Bytes.

    Raises:
        UsageError: images that change from one reading to the next, or outputs without a row for each image.

    Example:
        >>> surgery.cache_bytes(surgery.attach_hint(student, teacher).teacher, data.train)
    """
    return sum(one.bytes for one in _describe(teacher, images)) * count(images)


class _InMemory(Extended):
    def __init__(self, images: Images, outputs: Sequence[Tensor]) -> None:
        super().__init__(images)
        self.outputs = outputs

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.images[index], *(output[index].clone() for output in self.outputs))


class _OnDisk(Extended):
    def __init__(self, images: Images, files: Sequence[Path], dtypes: Sequence[torch.dtype]) -> None:
        super().__init__(images)
        self.files, self.dtypes = files, dtypes

    @cached_property
    def maps(self) -> list[NDArray[Any]]:
        return [np.load(file, mmap_mode="r") for file in self.files]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the maps: pickled, they would hold all values."""
        return {name: value for name, value in self.__dict__.items() if name != "maps"}

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        rows = [torch.from_numpy(np.array(m[index])).view(d) for m, d in zip(self.maps, self.dtypes, strict=True)]
        return (*self.images[index], *rows)


@dataclass(frozen=True)
class _Output:
    """One output of the teacher: its values for the first images."""

    first: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.first.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def bytes(self) -> int:
        """Of one image."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}


def _describe(teacher: nn.Module, images: Images) -> list[_Output]:
    """Run the teacher on the first two images."""
    if not count(images):
        raise UsageError("there are no images to compute the teacher's outputs for")
    if not is_deterministic(images):
        raise UsageError(CHANGING)
    batch = torch.stack([torch.as_tensor(images[k][0]) for k in range(min(2, count(images)))])
    with in_mode(teacher, training=False), torch.inference_mode():
        return [_Output(output.cpu()) for output in _run_teacher(teacher, batch)]


def _run_teacher(teacher: nn.Module, batch: Tensor) -> tuple[Tensor, ...]:
    held = next(iter(named_tensors(teacher).values()), batch)
    given = teacher(batch.to(held.device))
    outputs = given if isinstance(given, (tuple, list)) else (given,)
    if not outputs or not all(isinstance(o, Tensor) and o.ndim and len(o) == len(batch) for o in outputs):
        found = ", ".join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in outputs)
        raise UsageError(
            f"from {len(batch)} images the teacher makes {found or 'nothing'}: only a tensor, or a tuple of tensors, "
            "with a row for each image can be cached"
        )
    return tuple(outputs)


def _compute(
    teacher: nn.Module,
    images: Images,
    into: Sequence[Tensor],
    batch_size: int,
    workers: int,
    progress: Progress | None,
    task: str,
) -> None:
    loader = DataLoader(images, batch_size, num_workers=workers, generator=torch.Generator())
    at = 0
    with in_mode(teacher, training=False), torch.inference_mode():
        for done, (batch, *_) in enumerate(loader, 1):
            for output, rows in zip(into, _run_teacher(teacher, batch), strict=True):
                output[at : at + len(batch)].copy_(rows)
            at += len(batch)
            if progress is not None:
                progress(task, done, len(loader))


def _read_marker(folder: Path) -> Marker | None:
    """Read the marker of the folder; None where there is none, or one of an earlier version."""
    path = folder / MARKER
    if not path.exists():
        return None
    try:
        content = read_object(path)
        known = content.get("format") == MARKER
        if known and content.get("version") == 1:  # which had no digests
            return None
        if known:
            check_signature(content, str(path))
            return check_type(content, Marker, str(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}: choose another folder, or remove this one") from error
    raise UsageError(f"{path} does not mark a cache of a teacher's outputs: choose another folder")


def _find_damaged(folder: Path, stored: Marker) -> str:
    """What is wrong with the files of a complete cache; empty if nothing is."""
    for entry in stored.outputs:
        path = folder / entry.file
        if entry.dtype not in DTYPES:
            return f"{folder / MARKER}: 'outputs': torch has no dtype {entry.dtype!r}"
        try:
            if refuse_special(path) <= math.prod(entry.shape) * DTYPES[entry.dtype].itemsize * stored.images.count:
                return f"{path} is damaged: it is incomplete"
        except CheckpointError as error:
            return str(error)
        if digest_file(path) != entry.sha256:
            return f"{path} is damaged: it has not the bytes that were written"
    return ""


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("output-*.npy"))


def _refuse_too_large(folder: Path, needed: int) -> None:
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free + sum(file.stat().st_size for file in _files(folder))
    if needed > free:
        raise UsageError(
            f"the teacher's outputs take {mebibytes(needed)}, and {folder} has {mebibytes(free)} left: choose another "
            "folder, or compute them in each step"
        )


def _new_map(file: Path, output: _Output, images: int) -> np.memmap[Any, Any]:
    plain = torch.empty(0, dtype=_plain(output.dtype)).numpy().dtype
    mapped: np.memmap[Any, Any] = np.lib.format.open_memmap(file, mode="w+", dtype=plain, shape=(images, *output.shape))
    if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
        with file.open("r+b") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, file.stat().st_size)
    return mapped


def _plain(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself where numpy has it, else integers of its size for its bits."""
    try:
        torch.empty(0, dtype=dtype).numpy()
    except TypeError:
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return dtype


def _same_values(folder: Path, stored: Marker, outputs: Sequence[_Output]) -> bool:
    """Whether the stored rows of the first images equal what the teacher gives now, up to rounding."""
    if [{"shape": e.shape, "dtype": e.dtype} for e in stored.outputs] != [output.to_dict() for output in outputs]:
        return False
    for entry, output in zip(stored.outputs, outputs, strict=True):
        mapped = np.load(folder / entry.file, mmap_mode="r")
        rows = torch.from_numpy(np.array(mapped[: len(output.first)])).view(output.dtype)
        now, then = output.first.double(), rows.double()
        if not torch.allclose(now, then, rtol=0, atol=0.02 * float(now.abs().max()), equal_nan=True):
            return False
    return True
