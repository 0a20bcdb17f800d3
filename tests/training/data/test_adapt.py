"""Data sets and loaders of one's own, wherever a data set is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import surgery
from surgery import UsageError
from surgery.training.data.data import labels_of


def images(count=24, size=8, seed=0, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.rand(count, 3, size, size, generator=generator), torch.arange(count) % classes)


class Rows(Dataset):
    """As a data set of Hugging Face: rows by position, columns by name."""

    class _Names:
        names = ("ant", "bee")

    def __init__(self, count=12, make=None):
        self.features = {"picture": None, "label": self._Names}
        make = make or (lambda k: Image.new("RGB", (10, 8 + k), (20 * k, 0, 0)))
        self.columns = {"picture": [make(k) for k in range(count)], "label": [k % 2 for k in range(count)]}

    def __len__(self):
        return len(self.columns["label"])

    def __getitem__(self, index):
        if isinstance(index, str):
            return self.columns[index]
        return {name: column[index] for name, column in self.columns.items()}


@pytest.fixture
def model():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return surgery.trace(net.eval(), torch.randn(2, 3, 8, 8))


def test_a_loader_trains_as_its_data_set_does(model):
    settings = {"epochs": 2, "batch_size": 8, "seed": 0}
    ours = surgery.train(model, DataLoader(images(), batch_size=5, shuffle=True), **settings).module
    theirs = surgery.train(model, images(), **settings).module
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_all_images_of_one_set_are_trained_on_and_a_pair_has_its_own_test_images():
    alone = surgery.as_data(images())
    assert alone.counts == (24, 0)
    assert surgery.as_data((images(), images(9))).counts == (24, 9)
    assert surgery.as_data({"train": images(), "validation": images(6), "test": images(9)}).counts == (24, 6)
    part = surgery.as_data(images(30), test_fraction=0.2)
    assert part.counts == (24, 6)
    assert sorted(labels_of(part.test)) == [0, 0, 1, 1, 2, 2]


def test_the_collate_function_of_a_loader_is_used(model):
    def double(items):
        return torch.stack([2 * image for image, _ in items]), torch.tensor([label for _, label in items])

    doubled = TensorDataset(2 * images().tensors[0], images().tensors[1])
    ours = surgery.train(model, DataLoader(images(), collate_fn=double), epochs=1, batch_size=8).module
    theirs = surgery.train(model, doubled, epochs=1, batch_size=8).module
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "make",
    [
        None,
        lambda k: np.full((9, 9, 3), 10 * k, dtype=np.uint8),
        lambda k: np.full((9, 9), 10 * k, dtype=np.uint8),
        lambda k: torch.full((3, 9, 9), 0.05 * k),
        lambda k: torch.full((1, 9, 9), 10 * k, dtype=torch.uint8),
    ],
    ids=["Pillow", "array", "grey array", "tensor of fractions", "tensor of bytes"],
)
def test_rows_with_columns_are_images_and_labels(make):
    data = surgery.as_data({"train": Rows(make=make), "test": Rows(4, make=make)}, image_size=6)
    assert data.counts == (12, 4)
    assert data.classes == ("ant", "bee")
    assert [int(label) for _, label in (data.train[k] for k in range(4))] == [0, 1, 0, 1]
    assert data.train[0][0].shape == (3, 6, 6)
    assert labels_of(data.train).tolist() == [0, 1] * 6


def test_values_of_rows_are_those_of_the_same_pictures_in_other_forms():
    pictures = [np.full((9, 9, 3), 10 * k, dtype=np.uint8) for k in range(12)]
    forms = {
        "Pillow": lambda k: Image.fromarray(pictures[k]),
        "array": lambda k: pictures[k],
        "tensor": lambda k: torch.as_tensor(pictures[k]).permute(2, 0, 1),
        "fractions": lambda k: torch.as_tensor(pictures[k]).permute(2, 0, 1) / 255,
    }
    found = [surgery.as_data(Rows(make=make), image_size=9).train[7][0] for make in forms.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_everything_that_trains_takes_a_pair(model):
    pair = (images(), images(9, seed=1))
    teacher = surgery.widen(model, 2.0)
    assert surgery.evolve(model, pair, rate=0.5, generations=1, epochs=1).module is not None
    assert surgery.lottery(model, pair, sparsity=0.5, epochs=1).module is not None
    assert surgery.distill(model, teacher, pair, hint_epochs=0, epochs=1).score.total == 9
    assert surgery.evaluate(model, DataLoader(pair[1], 4)).total == 9


def test_data_for_takes_them_too(model):
    data = surgery.data_for({"the model": model}, (images(), images(9)), limit=5)
    assert data.counts == (5, 5)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.rand(3, 8, 8), 0


class Pictures(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8)), index % 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digits", "load it with surgery.load_data"),
        (Stream(), "no data set that can be read by position"),
        (Pictures(), "must be float tensors .* give the data set a transform"),
        ([images()], "a pair to train and to test on, not 1"),
        ({"fit": images()}, "no part called 'train', but fit"),
        (Subset(images(), []), "has no images"),
        (TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, -1, 0])), "whole numbers from 0"),
        (TensorDataset(torch.rand(4, 3, 8, 8)), r"must be \(image, label\)"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(model, data, message):
    with pytest.raises(UsageError, match=message) as found:
        surgery.train(model, data, epochs=1)
    assert "\n" not in str(found.value)


def test_nothing_to_score_on_is_said(model):
    with pytest.raises(UsageError, match="has no test images"):
        surgery.evolve(model, images(), generations=1, epochs=1)
