"""Digests of images and networks, which tell whether they are the same as before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.graph.seeding import seed_generators
from surgery.graph.traced import named_tensors
from surgery.training.data.data import Images, count

_SAMPLED = 16
"""Number of images that stand for the whole data set."""


def is_deterministic(images: Images) -> bool:
    """Whether a sample of images is the same when it is read twice; augmented images are not."""
    with _random_states():
        return all(_digest([images[k]]) == _digest([images[k]]) for k in _sample(images))


def images_digest(images: Images) -> str:
    """SHA-256 of a sample of images and labels from all over the data set."""
    return _digest(images[k] for k in _sample(images))


def training_digest(images: Images) -> str:
    """Like `images_digest`, of images and labels alone; of labels alone where images change between readings."""
    first = 0 if is_deterministic(images) else 1
    with _random_states():
        seed_generators(0)
        random.seed(0)
        np.random.seed(0)
        return _digest(tuple(images[k])[first:2] for k in _sample(images))


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
