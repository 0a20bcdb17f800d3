"""Data sets by name."""

from __future__ import annotations

from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from surgery.errors import UsageError
from surgery.training.data.data import load_data, stratified_split
from surgery.training.growth import Growth
from surgery.training.phases import plan_phases


@pytest.fixture(scope="module")
def mnist5k():
    return load_data("mnist5k", at_least=32)


def test_mnist5k_has_4000_training_and_1000_test_images_100_of_each_class(mnist5k):
    assert mnist5k.counts == (4000, 1000)
    assert mnist5k.classes == tuple("0123456789")
    labels = torch.tensor([int(label) for _, label in mnist5k.test])
    assert labels.bincount().tolist() == [100] * 10


def test_no_image_is_in_both_parts(mnist5k):
    assert not set(mnist5k.train.indices) & set(mnist5k.test.indices)


def test_images_have_three_channels_the_size_asked_for_and_are_normalised(mnist5k):
    images = torch.stack([mnist5k.train[i][0] for i in range(4000)])
    assert images.shape == (4000, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"channels": 1, "image_size": 32}], ids=["colour", "grey"])
def test_images_do_not_depend_on_the_number_of_threads(options):
    before, loaded = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            data = load_data("mnist5k", **options)
            loaded.append((data.normalisation, torch.stack([image for image, _ in data.test])))
    finally:
        torch.set_num_threads(before)
    (normalisation, images), *others = loaded
    for found, same in others:
        assert found == normalisation
        assert torch.equal(same, images)


def test_the_size_is_the_sets_own_unless_a_larger_one_is_needed_or_given():
    assert load_data("digits").image_size == 8
    assert load_data("digits", at_least=32).image_size == 32
    assert load_data("digits", image_size=12, at_least=32).test[0][0].shape == (3, 12, 12)


def test_the_split_is_the_same_every_time_and_another_for_another_seed():
    first, again, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    assert first.test.indices == again.test.indices
    assert first.test.indices != other.test.indices


def test_a_stratified_split_takes_its_share_of_each_class_and_at_least_one():
    labels = [0] * 10 + [1] * 5 + [2] * 2
    train, test = stratified_split(labels)
    assert sorted(train + test) == list(range(17))
    assert np.bincount([labels[i] for i in test]).tolist() == [2, 1, 1]


def test_a_limit_keeps_so_many_images_of_each_part():
    assert load_data("digits", limit=50).counts == (50, 50)
    with pytest.raises(UsageError, match="limit is 0: it must be at least 1"):
        load_data("digits", limit=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "unknown data set 'mnist'; did you mean 'mnist5k'"),
        ("torchvision:CIFAR11", "unknown data set 'torchvision:CIFAR11'; did you mean 'torchvision:CIFAR10'"),
        ("torchvision:CIFAR10", r"needs a folder to keep its files in: pass data_root \(--data-root DIR\)"),
        ("imagefolder:/no/such", "data set 'imagefolder:/no/such': there is no folder /no/such"),
    ],
)
def test_an_unavailable_data_set_is_refused_with_the_reason(spec, message):
    with pytest.raises(UsageError, match=message):
        load_data(spec)


def test_a_data_set_that_cannot_be_fetched_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    with pytest.raises(UsageError) as caught:
        load_data("torchvision:CIFAR10", data_root=tmp_path / "data")
    assert str(caught.value) == (
        f"data set 'torchvision:CIFAR10' is not in {tmp_path}/data and cannot be fetched (Name or service not known): "
        "put its files there"
    )
    assert not (tmp_path / "data").exists()
    assert capfd.readouterr() == ("", "")


def test_a_torchvision_data_set_is_read_from_its_folder(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        images = np.full((count, 28, 28), 255, np.uint8)
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.arange(count, dtype=np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())
    data = load_data("torchvision:MNIST", data_root=tmp_path, at_least=32)
    assert data.counts == (6, 4)
    assert data.image_size == 32
    assert data.classes[3] == "3 - three"
    image, label = data.test[3]
    assert (image.shape, label) == ((3, 32, 32), 3)
    white = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert image.mean((1, 2)).numpy() == pytest.approx(white, rel=1e-5)


def test_a_torchvision_data_set_without_parts_is_split(tmp_path, monkeypatch):
    class Whole(datasets.VisionDataset):
        labels = [0, 1] * 10

        def __init__(self, root, transform, download):
            super().__init__(root, transform=transform)

        def __getitem__(self, index):
            return self.transform(Image.new("LA", (16, 16))), self.labels[index]

        def __len__(self):
            return len(self.labels)

    monkeypatch.setattr(datasets, "SEMEION", Whole)
    data = load_data("torchvision:SEMEION", data_root=tmp_path)
    assert data.counts == (16, 4)
    assert data.train[0][0].shape == (3, 16, 16)


def _folder_of_images(root, classes, count=5):
    for shade, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 10 + number), (50 * shade, 0, 0)).save(root / name / f"{number}.png")


def test_a_folder_of_class_folders_is_split(tmp_path):
    _folder_of_images(tmp_path, ["cat", "dog"])
    data = load_data(f"imagefolder:{tmp_path}", image_size=16)
    assert data.counts == (8, 2)
    assert data.classes == ("cat", "dog")
    assert data.train[0][0].shape == (3, 16, 16)
    assert load_data(f"imagefolder:{tmp_path}").image_size == 224


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    _folder_of_images(tmp_path / "train", ["cat", "dog"])
    _folder_of_images(tmp_path / "val", ["cat", "dog"], count=3)
    assert load_data(f"imagefolder:{tmp_path}").counts == (10, 6)


def test_parts_with_other_classes_are_refused(tmp_path):
    _folder_of_images(tmp_path / "train", ["cat", "dog"])
    _folder_of_images(tmp_path / "val", ["cat", "eel"])
    with pytest.raises(UsageError, match="train and val do not have the same classes: dog, eel"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_folder_without_class_folders_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must hold one folder of images for each class"):
        load_data(f"imagefolder:{tmp_path}")


def _readings(data, index, count=200):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [data.train[index][0] for _ in range(count)]


def _crops(image, black, margin):
    """Every place from which the padded image can be cropped."""
    side = image.shape[-1]
    padded = torch.tensor(black).view(3, 1, 1).repeat(1, side + 2 * margin, side + 2 * margin)
    padded[:, margin:-margin, margin:-margin] = image
    places = range(2 * margin + 1)
    return [padded[:, y : y + side, x : x + side] for y in places for x in places]


def test_flipped_images_are_mirrored_half_of_the_time_and_test_images_never():
    plain, data = load_data("digits", limit=50), load_data("digits", limit=50, augment="flip")
    assert (plain.augment, data.augment) == ("none", "flip")
    image, label = plain.train[3]
    read = _readings(data, 3)
    mirrored = [torch.equal(one, image.flip(2)) for one in read]
    assert 60 < sum(mirrored) < 140
    assert all(flipped or torch.equal(one, image) for one, flipped in zip(read, mirrored, strict=True))
    assert data.train[3][1] == label
    assert data.counts == (50, 50)
    assert all(torch.equal(data.test[k][0], plain.test[k][0]) for k in range(50))


def test_crops_come_from_anywhere_within_an_eighth_of_the_side_around_which_all_is_black():
    data = load_data("digits", image_size=16, limit=10, augment="flip-crop")
    image = load_data("digits", image_size=16, limit=10).train[0][0]
    black = [-m / s for m, s in zip(data.normalisation.mean, data.normalisation.std, strict=True)]
    crops = _crops(image, black, margin=2)
    possible = [*crops, *(crop.flip(2) for crop in crops)]
    read = _readings(data, 0)
    seen = [min(k for k, crop in enumerate(possible) if torch.allclose(one, crop)) for one in read]
    assert {k >= len(crops) for k in seen} == {True, False}
    assert len(set(seen)) > 25


def test_augmentation_comes_from_torchs_random_state():
    data = load_data("digits", limit=20, augment="flip-crop")
    first, again = (torch.stack(_readings(data, 0, count=10)) for _ in range(2))
    assert torch.equal(first, again)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert not torch.equal(first, torch.stack([data.train[0][0] for _ in range(10)]))


def test_choosing_among_augmented_images_by_class_reads_none_of_them(monkeypatch):
    data = load_data("digits", limit=100, augment="flip")
    monkeypatch.setattr(type(data.train), "__getitem__", lambda *_: pytest.fail("an image was read"))
    (stage,) = plan_phases(data, 1, {0: Growth(images=0.5)}, seed=0)
    assert len(stage.images) == pytest.approx(50, abs=5)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(UsageError, match="unknown augmentation 'flips'; did you mean 'flip', 'flip-crop'"):
        load_data("digits", augment="flips")


def test_grey_images_for_models_that_take_one_channel():
    colour, grey = load_data("digits"), load_data("digits", channels=1)
    assert grey.channels == 1
    assert grey.train[3][0].shape == (1, 8, 8)
    assert torch.allclose(grey.train[3][0], colour.train[3][0][:1], atol=1e-6)
    assert grey.test[5][1] == colour.test[5][1]
    flipped = load_data("digits", channels=1, augment="flip-crop")
    darkest = min(flipped.train[k][0].min() for k in range(20))
    assert darkest == pytest.approx(float(grey.train[3][0].min()), abs=1e-5)
    with pytest.raises(UsageError, match="images have 3 channels, or 1 where they are made grey, not 2"):
        load_data("digits", channels=2)
