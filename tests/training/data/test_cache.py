"""A teacher's outputs, computed once."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery.errors import UsageError
from surgery.storage.documents import sign
from surgery.training.data.cache import MARKER, cache_bytes, cache_outputs, open_cache, write_cache
from surgery.training.data.data import load_data
from surgery.training.data.fingerprint import is_deterministic, module_digest, training_digest
from tests.zoo import randomised


class Teacher(nn.Module):
    """A map and logits; ``pick`` selects one."""

    def __init__(self, pick=slice(None)):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 10)
        self.pick = pick

    def forward(self, x):
        features = self.norm(self.conv(x)).relu()
        return (features, self.fc(self.drop(features.mean((2, 3)))))[self.pick]


def make_teacher(pick=slice(None), seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomised(Teacher(pick))


def make_images(n=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % 10)


class Cast(nn.Module):
    """Gives values of one dtype, different for each image."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return (x.flatten(1)[:, :7] * 3).to(self.dtype)


@pytest.fixture(params=["memory", "folder"])
def where(request, tmp_path):
    return "memory" if request.param == "memory" else tmp_path / "cache"


def counting(calls):
    return lambda task, done, total: calls.append((task, done, total))


def expected(teacher, images):
    teacher = teacher.eval()
    with torch.no_grad():
        return teacher(images.tensors[0])


def test_items_are_the_image_its_label_and_the_teachers_outputs_in_eval(where):
    images, teacher = make_images(), make_teacher().train()
    cached = cache_outputs(teacher, images, where=where, batch_size=8)
    features, logits = expected(teacher, images)
    assert len(cached) == 37
    for k, (image, label, *outputs) in enumerate(cached[k] for k in range(37)):
        assert torch.equal(image, images.tensors[0][k])
        assert label == k % 10
        assert torch.allclose(outputs[0], features[k], atol=1e-6)
        assert torch.allclose(outputs[1], logits[k], atol=1e-6)
        assert not any(output.requires_grad or output.is_inference() for output in outputs)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffling_loader_keeps_images_and_outputs_together(where, workers):
    images, teacher = make_images(), make_teacher(1).eval()
    cached = cache_outputs(teacher, images, where=where)
    assert cached[3][0].shape == (3, 6, 6)  # the files are mapped before the workers are there
    loader = DataLoader(cached, 10, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(1))
    batches = list(loader)
    assert [len(batch[0]) for batch in batches] == [10, 10, 10, 7]
    for batch, _, logits in batches:
        assert torch.allclose(teacher(batch), logits, atol=1e-6)
    order = torch.cat([label for _, label, _ in batches])
    assert not torch.equal(order, images.tensors[1])


def test_workers_read_the_images_that_the_teacher_is_given(where):
    images, teacher = make_images(), make_teacher(1)
    cached = cache_outputs(teacher, images, where=where, batch_size=5, workers=2)
    assert torch.allclose(torch.stack([cached[k][2] for k in range(37)]), expected(teacher, images), atol=1e-6)


def test_a_training_is_identified_alike_with_and_without_cached_outputs(where):
    images, teacher = make_images(), make_teacher()
    assert training_digest(cache_outputs(teacher, images, where=where)) == training_digest(images)
    assert training_digest(cache_outputs(teacher, make_images(seed=1), where=where)) != training_digest(images)


def test_the_teacher_and_the_random_states_are_left_as_they_were(where):
    teacher = make_teacher().train()
    teacher.norm.eval()
    before = module_digest(teacher)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    cache_outputs(teacher, make_images(), where=where)
    cache_bytes(teacher, make_images())
    assert module_digest(teacher) == before
    assert [m.training for m in teacher.modules()] == [True, True, False, True, True]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    teacher(torch.randn(2, 3, 6, 6))[1].sum().backward()
    assert teacher.conv.weight.grad is not None


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_outputs_of_any_dtype_are_kept_to_the_bit(where, dtype):
    images, teacher = make_images(), Cast(dtype)
    cached = cache_outputs(teacher, images, where=where)
    again = torch.stack([cached[k][2] for k in range(37)])
    assert again.dtype == dtype
    assert torch.equal(again.view(torch.uint8), expected(teacher, images).view(torch.uint8))


def test_outputs_may_be_one_number_for_each_image(where):
    cached = cache_outputs(nn.Flatten(0), TensorDataset(torch.arange(5.0), torch.zeros(5)), where=where)
    assert [cached[k][2].item() for k in range(5)] == [0, 1, 2, 3, 4]
    assert cached[0][2].shape == ()


def test_changing_an_item_does_not_change_the_cache(where):
    cached = cache_outputs(make_teacher(1), make_images(), where=where)
    first = cached[0][2].clone()
    cached[0][2].zero_()
    assert torch.equal(cached[0][2], first)


def test_progress_is_reported_for_each_batch(where):
    calls = []
    cache_outputs(make_teacher(), make_images(), where=where, batch_size=20, progress=counting(calls), task="hints")
    assert calls == [("hints", 1, 2), ("hints", 2, 2)]


def test_cache_bytes_equal_the_contents_of_its_files(tmp_path):
    images, teacher = make_images(), make_teacher()
    cache_outputs(teacher, images, where=tmp_path / "cache")
    arrays = [np.load(file) for file in (tmp_path / "cache").glob("*.npy")]
    assert cache_bytes(teacher, images) == sum(array.nbytes for array in arrays) == 37 * 4 * (4 * 36 + 10)
    assert cache_bytes(Cast(torch.bfloat16), images) == 37 * 7 * 2


def test_a_cached_set_with_files_is_small_when_it_goes_to_a_worker(tmp_path):
    cached = cache_outputs(make_teacher(), make_images(300), where=tmp_path / "cache")
    assert cached[0][2].shape == (4, 6, 6)
    bare = len(pickle.dumps(make_images(300)))
    assert len(pickle.dumps(cached)) < bare + 1000
    assert torch.equal(pickle.loads(pickle.dumps(cached))[5][2], cached[5][2])


def test_a_complete_cache_of_the_same_is_not_computed_again(tmp_path):
    calls = []
    assert write_cache(make_teacher(), make_images(), tmp_path / "cache", progress=counting(calls))
    written = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert not write_cache(make_teacher(), make_images(), tmp_path / "cache", progress=counting(calls))
    assert calls == [("cache", 1, 1)]
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == written
    assert len(written) == 3
    assert torch.equal(open_cache(tmp_path / "cache", make_images())[4][0], make_images()[4][0])


def _another_teacher(images, teacher):
    return images, make_teacher(seed=1)


def _one_weight(images, teacher):
    with torch.no_grad():
        teacher.fc.bias[3] += 1e-6
    return images, teacher


def _statistics(images, teacher):
    teacher.norm.running_mean[2] += 1e-6
    return images, teacher


def _a_setting(images, teacher):
    teacher.norm.eps *= 1.01
    return images, teacher


def _fewer_outputs(images, teacher):
    teacher.pick = slice(1, None)
    return images, teacher


def _what_no_layer_shows(images, teacher):
    teacher.register_forward_hook(lambda module, args, output: tuple(2 * o for o in output))
    return images, teacher


def _other_images(images, teacher):
    return make_images(seed=1), teacher


def _other_order(images, teacher):
    return TensorDataset(images.tensors[0].flip(0), images.tensors[1].flip(0)), teacher


def _more_images(images, teacher):
    return make_images(38), teacher


@pytest.mark.parametrize(
    "change",
    [
        _another_teacher, _one_weight, _statistics, _a_setting, _fewer_outputs, _what_no_layer_shows, _other_images,
        _other_order, _more_images,
    ],
)  # fmt: skip
def test_a_cache_of_anything_else_is_written_again(tmp_path, change):
    cache_outputs(make_teacher(), make_images(), where=tmp_path / "cache")
    images, teacher = change(make_images(), make_teacher())
    assert write_cache(teacher, images, tmp_path / "cache")
    cached = open_cache(tmp_path / "cache", images)
    outputs = expected(teacher, images)
    for k, output in enumerate(outputs, 2):
        assert torch.allclose(torch.stack([cached[i][k] for i in range(len(images))]), output, atol=1e-6)
    assert len(list((tmp_path / "cache").glob("*"))) == 1 + len(outputs)


def test_the_same_layers_in_another_graph_are_another_teacher():
    class Two(nn.Module):
        def __init__(self, join):
            super().__init__()
            self.a, self.b, self.join = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), join

        def forward(self, x):
            return self.join(self.a(x), self.b(x))

    def digest(join):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return module_digest(surgery.trace(Two(join), torch.randn(2, 3, 8, 8)))

    assert digest(torch.add) == digest(torch.add) != digest(torch.mul)


def test_an_interrupted_run_leaves_no_outputs_and_no_complete_cache(tmp_path):
    def interrupt(task, done, total):
        if done == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        write_cache(make_teacher(), make_images(), folder, batch_size=10, progress=interrupt)
    assert [file.name for file in folder.iterdir()] == [MARKER]
    with pytest.raises(UsageError, match="is not a cache of a teacher's outputs: its outputs are incomplete"):
        open_cache(folder, make_images())
    assert write_cache(make_teacher(), make_images(), folder)


@pytest.mark.parametrize("over", ["nothing", "the same", "another"])
def test_a_killed_run_leaves_no_complete_cache(tmp_path, over):
    folder = tmp_path / "cache"
    if over != "nothing":
        write_cache(make_teacher(seed=0 if over == "the same" else 1), make_images(), folder)
    child = multiprocessing.get_context("fork").Process(
        target=write_cache,
        args=(make_teacher(), make_images(), folder),
        kwargs={"batch_size": 10, "progress": lambda task, done, total: os._exit(9)},
    )
    child.start()
    child.join()
    assert child.exitcode == (0 if over == "the same" else 9)
    calls = []
    cached = cache_outputs(make_teacher(), make_images(), where=folder, progress=counting(calls))
    assert len(calls) == (0 if over == "the same" else 1)
    assert torch.allclose(cached[36][3], expected(make_teacher(), make_images())[1][36], atol=1e-6)
    assert len(list(folder.iterdir())) == 3


def test_two_runs_into_one_folder_never_mix(tmp_path):
    refused = []

    def meanwhile(task, done, total):
        with pytest.raises(UsageError, match=r"another run is writing to .*cache") as caught:
            write_cache(make_teacher(seed=1), make_images(), tmp_path / "cache")
        refused.append(caught.value)

    write_cache(make_teacher(), make_images(), tmp_path / "cache", batch_size=10, progress=meanwhile)
    assert len(refused) == 4
    assert not write_cache(make_teacher(), make_images(), tmp_path / "cache")


def test_a_file_that_was_cut_off_is_written_again(tmp_path):
    teacher, images = make_teacher(), make_images()
    write_cache(teacher, images, tmp_path / "cache")
    file = next((tmp_path / "cache").glob("output-1-*.npy"))
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(surgery.CheckpointError, match=f"{file.name} is damaged: it is incomplete: write the outputs"):
        open_cache(tmp_path / "cache", images)
    with pytest.warns(surgery.DamageWarning, match=f"{file.name} is damaged: it is incomplete: the outputs are comp"):
        assert write_cache(teacher, images, tmp_path / "cache")
    assert torch.equal(open_cache(tmp_path / "cache", images)[36][3], expected(teacher, images)[1][36])


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "output-0.npy").write_text("years of work")
    with pytest.raises(UsageError, match=f"thesis is not replaced: it holds no {MARKER}"):
        write_cache(make_teacher(), make_images(), folder)
    (folder / MARKER).write_text(json.dumps({"format": "something else"}))
    with pytest.raises(
        UsageError, match=f"{MARKER} does not mark a cache of a teacher's outputs: choose another folder"
    ):
        write_cache(make_teacher(), make_images(), folder)
    (folder / MARKER).write_text("{")
    with pytest.raises(UsageError, match=f"{MARKER} cannot be read: .*: choose another folder"):
        write_cache(make_teacher(), make_images(), folder)
    assert (folder / "output-0.npy").read_text() == "years of work"


def test_only_a_cache_of_the_same_images_is_opened(tmp_path):
    with pytest.raises(UsageError, match=f"nothing is not a cache of a teacher's outputs: it has no {MARKER}"):
        open_cache(tmp_path / "nothing", make_images())
    write_cache(make_teacher(), make_images(), tmp_path / "cache")
    with pytest.raises(UsageError, match="has a teacher's outputs for 37 other images, not for these 12: write them"):
        open_cache(tmp_path / "cache", make_images(12))
    with pytest.raises(UsageError, match="has a teacher's outputs for 37 other images, not for these 37: write them"):
        open_cache(tmp_path / "cache", make_images(seed=1))


@pytest.mark.parametrize("augment", ["flip", "flip-crop"])
def test_images_that_augmentation_changes_are_refused(where, augment):
    data = load_data("digits", limit=20, augment=augment)
    with pytest.raises(UsageError, match=r"the images change from one reading to the next \(augmentation\), so the"):
        cache_outputs(make_teacher(), data.train, where=where)
    assert where == "memory" or not where.exists()


def test_checking_images_for_random_changes_leaves_random_states_alone():
    class Noisy(TensorDataset):
        draw = staticmethod(lambda: torch.rand(()).item())

        def __getitem__(self, index):
            return self.tensors[0][index] + self.draw(), 0

    assert is_deterministic(make_images())
    assert is_deterministic(make_images(1))
    assert not is_deterministic(load_data("digits", limit=1, augment="flip").train)
    noisy = Noisy(torch.zeros(4))
    for draw in (Noisy.draw, random.random, np.random.rand):
        Noisy.draw = staticmethod(draw)
        states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1:3]
        assert not is_deterministic(noisy)
        after = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1:3]
        assert after[:2] == states[:2]
        assert after[2][0].tolist() == states[2][0].tolist()
        assert after[2][1] == states[2][1]


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda x: x.sum(), r"from 2 images the teacher makes \(\): only a tensor, or a tuple of tensors, with a row"),
        (
            lambda x: (x, x[:1]),
            r"from 2 images the teacher makes \(2, 3, 6, 6\), \(1, 3, 6, 6\): only a tensor, or a tuple",
        ),
        (lambda x: {"out": x}, "from 2 images the teacher makes dict: only a tensor, or a tuple of tensors"),
        (lambda x: (), "from 2 images the teacher makes nothing: only a tensor"),
    ],
)
def test_a_teacher_without_a_row_for_each_image_is_refused(where, gives, message):
    class Odd(nn.Module):
        def forward(self, x):
            return gives(x)

    with pytest.raises(UsageError, match=message):
        cache_outputs(Odd(), make_images(), where=where)


def test_no_images_are_refused(where):
    with pytest.raises(UsageError, match="there are no images to compute the teacher's outputs for"):
        cache_outputs(make_teacher(), make_images(0), where=where)


def test_too_little_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(22_000))
    with pytest.raises(UsageError, match=r"the teacher's outputs take 0.022 MiB, and .*cache has 0.021 MiB left"):
        write_cache(make_teacher(), make_images(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(23_000))
    assert write_cache(make_teacher(), make_images(), tmp_path / "cache")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0))
    assert write_cache(make_teacher(seed=1), make_images(), tmp_path / "cache"), "what is replaced makes space"


def test_every_flipped_bit_of_a_cache_is_found_and_the_outputs_are_computed_again(tmp_path):
    teacher, images = make_teacher(1), make_images()
    write_cache(teacher, images, tmp_path / "cache")
    file = next((tmp_path / "cache").glob("output-*.npy"))
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 11):
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(surgery.CheckpointError, match=f"{file.name} is damaged: it has not the bytes"):
            open_cache(tmp_path / "cache", images)
    with pytest.warns(surgery.DamageWarning, match=f"{file.name} is damaged"):
        cached = cache_outputs(teacher, images, where=tmp_path / "cache")
    assert torch.allclose(torch.stack([cached[k][2] for k in range(37)]), expected(teacher, images), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"complete": 1}, "'complete': expected 'bool', got 'int'"),
        ({"outputs": [{"file": "../x.npy", "shape": [1], "dtype": "int8", "sha256": ""}]}, "'outputs.*file'.*regex"),
        ({"outputs": [{"file": "output-0-a.npy", "shape": [1], "dtype": "nn", "sha256": ""}]}, "no dtype 'nn'"),
        ({"outputs": [{"file": "output-0-a.npy", "shape": [-1], "dtype": "int8", "sha256": ""}]}, "shape.*>= 0"),
        ({"teacher": None}, "'teacher': expected 'str', got 'null'"),
    ],
)
def test_a_malformed_marker_names_the_field(tmp_path, change, message):
    write_cache(make_teacher(1), make_images(), tmp_path / "cache")
    marker = tmp_path / "cache" / MARKER
    marker.write_text(json.dumps(sign({**json.loads(marker.read_text()), **change})))
    with pytest.raises(surgery.CheckpointError, match=message):
        open_cache(tmp_path / "cache", make_images())
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "sha256": "0"}))
    with pytest.raises(surgery.CheckpointError, match="was damaged or edited after it was written"):
        open_cache(tmp_path / "cache", make_images())
