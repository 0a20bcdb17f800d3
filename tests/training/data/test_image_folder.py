"""Folders of images as people have them, and images of every kind in them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from surgery import UsageError, load_data
from surgery.training.data.image_folder import read_image

SHADES = {"cat": 40, "dog": 200}


def fill(root, classes=SHADES, count=3):
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((9 + number, 12, 3), SHADES.get(name, 90), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "test", "Test"])
def test_the_part_to_test_on_has_the_names_that_people_use(tmp_path, name):
    fill(tmp_path / "train", count=4)
    fill(tmp_path / name, count=2)
    assert load_data(f"imagefolder:{tmp_path}", image_size=8).counts == (8, 4)


def test_the_validation_part_comes_before_the_test_part(tmp_path):
    for name, count in (("train", 4), ("test", 3), ("valid", 2)):
        fill(tmp_path / name, count=count)
    assert load_data(f"imagefolder:{tmp_path}", image_size=8).counts == (8, 4)


def test_a_training_part_alone_is_split(tmp_path):
    fill(tmp_path / "train", count=10)
    data = load_data(f"imagefolder:{tmp_path}", image_size=8)
    assert data.counts == (16, 4)
    assert data.classes == ("cat", "dog")


@pytest.mark.parametrize("names", [("test", "val"), ("cat", "val"), ("dev", "dog", "cat")])
def test_classes_called_like_parts_are_refused(tmp_path, names):
    fill(tmp_path, names)
    with pytest.raises(UsageError, match="called like a part of a data set"):
        load_data(f"imagefolder:{tmp_path}")


def test_a_folder_beside_the_parts_is_refused(tmp_path):
    for name in ("train", "val", "raw"):
        fill(tmp_path / name)
    with pytest.raises(UsageError, match="'train' and also 'raw', which is none"):
        load_data(f"imagefolder:{tmp_path}")


def test_fewer_than_two_classes_are_refused(tmp_path):
    fill(tmp_path, ["cat"])
    with pytest.raises(UsageError, match="at least two, and has 1 folder"):
        load_data(f"imagefolder:{tmp_path}")


def test_an_empty_class_is_named(tmp_path):
    fill(tmp_path)
    (tmp_path / "eel").mkdir()
    with pytest.raises(UsageError, match="eel has no image"):
        load_data(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated"])
def test_an_image_that_cannot_be_read_is_named_before_training_or_left_out(tmp_path, content):
    fill(tmp_path, count=5)
    bad = tmp_path / "dog" / "9.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(bad)
        content = bad.read_bytes()[:5000]
    bad.write_bytes(content)
    with pytest.raises(UsageError, match=r"9\.png cannot be read .*--skip-bad"):
        load_data(f"imagefolder:{tmp_path}")
    data = load_data(f"imagefolder:{tmp_path}", image_size=8, skip_bad=True)
    assert data.counts == (8, 2)


def test_a_class_of_bad_images_alone_is_refused_even_if_they_may_be_left_out(tmp_path):
    fill(tmp_path)
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "1.jpg").write_bytes(b"?")
    with pytest.raises(UsageError, match="no image of the class 'eel'"):
        load_data(f"imagefolder:{tmp_path}", skip_bad=True)


def _grey(mode, dtype, factor=1):
    pixels = (np.arange(64).reshape(8, 8) * 4 * factor).astype(dtype)
    return Image.fromarray(pixels) if mode is None else Image.fromarray(pixels, mode)


GREY = np.repeat((np.arange(64).reshape(8, 8, 1) * 4).astype(np.uint8), 3, axis=2)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_become_eight(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    _grey(None, np.uint16, 257).save(path)
    assert (np.asarray(read_image(path)) == GREY).all()


def test_grey_is_repeated(tmp_path):
    _grey(None, np.uint8).save(tmp_path / "x.png")
    assert (np.asarray(read_image(tmp_path / "x.png")) == GREY).all()


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = np.asarray(read_image(tmp_path / "x.png"))
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == (10, 20, 30)).all()


def test_a_palette_with_a_transparent_entry_is_read_like_that_too(tmp_path):
    image = Image.fromarray((np.arange(64).reshape(8, 8) % 2).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "x.png", transparency=0)
    found = np.asarray(read_image(tmp_path / "x.png"))
    assert (found[:, ::2] == 255).all()
    assert (found[:, 1::2] == (200, 100, 50)).all()


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    assert np.abs(np.asarray(read_image(tmp_path / "x.jpg")).astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, -1), (8, 1)])
def test_images_are_turned_as_their_exif_data_say(tmp_path, orientation, turns):
    image = Image.fromarray(GREY[:6])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    assert (np.asarray(read_image(tmp_path / "x.png")) == np.rot90(GREY[:6], turns)).all()


def test_pixels_without_a_range_are_named(tmp_path):
    fill(tmp_path)
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "cat" / "9.tiff")
    with pytest.raises(UsageError, match=r"9\.tiff cannot be read \(its pixels are numbers without a range"):
        load_data(f"imagefolder:{tmp_path}")
