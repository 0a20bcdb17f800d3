"""Data are told from other data by all that they hold."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from surgery import load_data
from surgery.training.data.fingerprint import content_digest, images_digest, training_digest

DIGESTS = [images_digest, training_digest, content_digest]


def tensors(count=200):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 3, 4, 4, generator=generator), torch.arange(count) % 2)


class Arrays(Dataset):
    """As torchvision's sets in memory: an array, and labels in a list."""

    def __init__(self, count=200):
        self.data = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
        self.targets = [k % 2 for k in range(count)]
        self.read = 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read += 1
        return torch.as_tensor(self.data[index]).float(), self.targets[index]


@pytest.fixture
def folder(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for k in range(50):
            Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / label / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("index", [1, 37, 100, 198])
def test_every_tensor_in_memory_counts(digest, index):
    ours, other, label = tensors(), tensors(), tensors()
    assert digest(ours) == digest(other)
    other.tensors[0][index, 0, 0, 0] += 1
    label.tensors[1][index] += 1
    assert len({digest(ours), digest(other), digest(label)}) == 3


@pytest.mark.parametrize("digest", DIGESTS)
def test_every_array_and_every_label_counts_but_no_counter(digest):
    ours, pixel, label = Arrays(), Arrays(), Arrays()
    pixel.data[101, 1, 1, 1] ^= 1
    label.targets[101] ^= 1
    first = digest(ours)
    assert first == digest(ours)
    assert len({first, digest(pixel), digest(label)}) == 3


@pytest.mark.parametrize("digest", DIGESTS)
def test_another_choice_of_images_counts(digest):
    choice = list(range(100))
    other = [*choice[:41], 150, *choice[42:]]
    assert digest(Subset(tensors(), choice)) != digest(Subset(tensors(), other))


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("augment", ["none", "flip"])
def test_every_file_counts(folder, digest, augment):
    def found():
        return digest(load_data(f"imagefolder:{folder}", image_size=4, augment=augment).train)

    before = found()
    assert found() == before
    for k in range(50):  # some are in the part to test on
        Image.new("RGB", (4, 4), (0, 0, 0)).save(folder / "b" / f"{k}.png")
    assert found() != before


def test_content_of_the_same_size_and_date_counts_where_it_is_asked_for(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for k in range(50):
            Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / label / f"{k}.bmp")

    def found(strict):
        data = load_data(f"imagefolder:{tmp_path}", image_size=4, strict=strict)
        return content_digest(data.train), content_digest(data.test)

    before = {strict: found(strict) for strict in (False, True)}
    path = tmp_path / "a" / "7.bmp"
    known = path.stat()
    Image.new("RGB", (4, 4), (0, 9, 9)).save(path)
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert path.stat().st_size == known.st_size
    assert found(strict=False) == before[False]
    assert found(strict=True) != before[True]
