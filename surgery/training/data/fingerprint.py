"""Digests of images and networks, which tell whether they are the same as before.

A data set is identified by all that its object holds: tensors and arrays by their content, files by path, size and date
(by content where `surgery.load_data` was told ``strict=True``), and by a sample of its items, for what it computes.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from surgery.graph.seeding import seed_generators
from surgery.graph.traced import named_tensors
from surgery.training.data.data import ByContent, Extended, Images, count

_SAMPLED = 16
"""Number of items that are read, for data sets that compute what they give."""


def is_deterministic(images: Images) -> bool:
    """Whether a sample of images is the same when it is read twice; augmented images are not."""
    with _random_states():
        return all(_digest([images[k]]) == _digest([images[k]]) for k in _sample(images))


def images_digest(images: Images) -> str:
    """SHA-256 of all that a data set holds, and of a sample of its images and labels."""
    return f"{content_digest(images)[:32]}{_digest(images[k] for k in _sample(images))[:32]}"


def training_digest(images: Images) -> str:
    """Like `images_digest`; the sample is of images and labels alone, of labels alone where images change between
    readings."""
    while isinstance(images, Extended):
        images = images.images
    first = 0 if is_deterministic(images) else 1
    with _random_states():
        seed_generators(0)
        random.seed(0)
        np.random.seed(0)
        sampled = _digest(tuple(images[k])[first:2] for k in _sample(images))
    return f"{content_digest(images)[:32]}{sampled[:32]}"


def content_digest(images: Images) -> str:
    """SHA-256 of the tensors, arrays, texts and files that a data set holds, at any depth.

    Plain numbers count where they are in a list, a tuple or a mapping, such as labels; elsewhere they may be counters.
    """
    found = hashlib.sha256()
    _add(images, found, {}, _describe_file)
    return found.hexdigest()


def module_digest(module: nn.Module) -> str:
    """SHA-256 of a network's layers and settings, code of graphs, parameters and buffers."""
    found = hashlib.sha256()
    for name, part in module.named_modules():
        found.update(f"{name} {type(part).__qualname__} {part.extra_repr()}".encode())
        if isinstance(part, fx.GraphModule):
            found.update(part.code.encode())
    for name, tensor in named_tensors(module).items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _add(value: Any, found: Any, seen: dict[int, Any], file: Callable[[Any], str]) -> None:
    """Feed what ``value`` holds to a hash, each object once; ``file`` describes the file that a text may name."""
    if isinstance(value, (bool, int, float, complex, bytes, np.generic)) or value is None:
        found.update(f"{value!r};".encode())
        return
    if isinstance(value, (str, os.PathLike)):
        found.update(f"{os.fspath(value)!r} {file(value)};".encode())
        return
    if id(value) in seen:
        return
    seen[id(value)] = value  # keeps it alive, so that no other object gets its id
    found.update(f"{type(value).__qualname__}(".encode())
    if isinstance(value, Tensor):
        found.update(f"{tuple(value.shape)} {value.dtype}".encode())
        found.update(_bytes(value))
    elif isinstance(value, np.ndarray):
        found.update(f"{value.shape} {value.dtype}".encode())
        _add_array(value, found, seen, file)
    elif isinstance(value, ByContent):
        _add(value.images, found, seen, _describe_content)
    elif isinstance(value, Mapping):
        for name, held in value.items():
            _add(name, found, seen, file)
            _add(held, found, seen, file)
    elif isinstance(value, (list, tuple, range)):
        for held in value:
            _add(held, found, seen, file)
    elif isinstance(value, (set, frozenset)):
        for text in sorted(map(repr, value)):
            found.update(text.encode())
    elif isinstance(value, Dataset):
        for name, held in sorted(vars(value).items()):
            if not isinstance(held, (bool, int, float)):
                found.update(name.encode())
                _add(held, found, seen, file)
    elif callable(getattr(value, "tobytes", None)):  # such as an image of Pillow
        found.update(value.tobytes())
    found.update(b")")


def _add_array(array: NDArray[Any], found: Any, seen: dict[int, Any], file: Callable[[Any], str]) -> None:
    if array.dtype.hasobject:
        for held in array.ravel().tolist():
            _add(held, found, seen, file)
    else:
        found.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")


def _describe_file(path: str | os.PathLike[str]) -> str:
    """Size and date of a file, in nanoseconds; empty for what is no file."""
    try:
        known = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{known.st_size} {known.st_mtime_ns}" if stat.S_ISREG(known.st_mode) else ""


def _describe_content(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content; empty for what is no file."""
    if not _describe_file(path):
        return ""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sample(images: Images) -> list[int]:
    """Positions all over the data set, possibly repeated; none where it is empty."""
    last = count(images) - 1
    return [round(last * k / (_SAMPLED - 1)) for k in range(_SAMPLED if last >= 0 else 0)]


def _digest(items: Iterable[tuple[Any, ...]]) -> str:
    found = hashlib.sha256()
    for leaf in (leaf for item in items for leaf in pytree.tree_leaves(tuple(item))):
        try:
            part = torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError):  # neither a tensor nor a number
            found.update((leaf if isinstance(leaf, str) else type(leaf).__qualname__).encode())
            continue
        found.update(f"{tuple(part.shape)} {part.dtype}".encode())
        found.update(_bytes(part))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data


@contextmanager
def _random_states() -> Iterator[None]:
    """Restore the random states that a transform may draw from."""
    own, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)
