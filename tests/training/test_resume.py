"""A training that is cut off goes on to the same weights; of another one nothing is taken."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery import Growth
from surgery.training.data.data import Extended, load_data
from surgery.training.evolve import evolve
from surgery.training.history import History
from surgery.training.loop import train
from surgery.training.lottery import lottery
from tests.helpers import assert_same, killed_after

DIGITS = 160

EPOCHS = 3


def net() -> nn.Module:
    """With batch statistics, and dropout: what is random in a step must be the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(512, 10),
        )


def traced() -> nn.Module:
    return surgery.trace(net().eval(), torch.zeros(2, 3, 8, 8))


def result(history: History) -> list[tuple[float, float, object]]:
    return [(epoch.loss, epoch.lr, epoch.score) for epoch in history.epochs]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_a_training_that_is_killed_ends_with_the_same_weights(digits, tmp_path, optimizer, steps):
    settings = {"epochs": EPOCHS, "batch_size": 64, "optimizer": optimizer, "test_each_epoch": True}
    whole = net()
    expected = train(whole, digits, **settings)
    whole = expected.module
    settings.update(checkpoint=tmp_path / "training.pt", checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(net(), digits, **settings, progress=killed_after(steps))
    resumed, seen = net(), []
    history = train(resumed, digits, **settings, progress=lambda _, done, total: seen.append((done, total)))
    resumed = history.module
    assert_same(resumed, whole)
    assert result(history) == result(expected)
    assert history.steps == expected.steps == 6
    assert seen[0] == (max(1, steps - 1), 6)  # the checkpoint of a step comes after its progress
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]


@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_images_are_the_same_after_a_break_between_epochs(tmp_path, workers):
    data = load_data("digits", limit=130, augment="flip-crop")
    settings = {"epochs": 2, "batch_size": 64, "workers": workers}
    whole, resumed = net(), net()
    whole = train(whole, data, **settings).module
    with pytest.raises(KeyboardInterrupt):
        train(net(), data, **settings, checkpoint=tmp_path / "a.pt", progress=killed_after(3))
    resumed = train(resumed, data, **settings, checkpoint=tmp_path / "a.pt").module
    assert_same(resumed, whole)


def test_augmented_images_are_the_same_after_a_break_in_an_epoch(tmp_path):
    data = load_data("digits", limit=200, augment="flip-crop")
    whole, resumed = net(), net()
    whole = train(whole, data, epochs=1).module
    with pytest.raises(KeyboardInterrupt):
        train(net(), data, epochs=1, checkpoint=tmp_path / "a.pt", checkpoint_every=1, progress=killed_after(2))
    resumed = train(resumed, data, epochs=1, checkpoint=tmp_path / "a.pt", checkpoint_every=1).module
    assert_same(resumed, whole)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_growing_model_resumes_at_the_size_it_had(digits, tmp_path, steps):
    grow = {0: Growth(images=0.5), 1: Growth(images=1.0, widen={"0": 1.5}), 2: Growth(widen={"0": 2.0})}
    settings = {"epochs": EPOCHS, "batch_size": 64, "optimizer": "adamw", "grow": grow, "test_each_epoch": True}
    expected = train(traced(), digits, **settings)
    settings["checkpoint"] = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        train(traced(), digits, **settings, progress=killed_after(steps))
    history = train(traced(), digits, **settings)
    assert history.steps == expected.steps == 5
    assert_same(history.module, expected.module)
    assert result(history) == result(expected)
    for ours, theirs in zip(history.growths, expected.growths, strict=True):
        assert replace(ours, seconds=0.0) == replace(theirs, seconds=0.0)


def test_a_finished_training_is_not_repeated(digits, tmp_path):
    first, second = net(), net()
    path = tmp_path / "of" / "a" / "run.pt"
    before = train(first, digits, epochs=1, checkpoint=path)
    first = before.module

    def no_step(*_):
        raise AssertionError("a step was taken")

    again = train(second, digits, epochs=1, checkpoint=path, loss_fn=no_step)
    assert again == before
    second = again.module
    assert_same(second, first)


def test_a_checkpoint_of_another_training_is_refused(digits, tmp_path):
    path = tmp_path / "training.pt"
    train(net(), digits, epochs=1, checkpoint=path, identity={"teacher": "a"})
    for change, said in [
        ({"epochs": 2}, "epochs 1 and not 2"),
        ({"lr": 0.5}, "lr 0.02 and not 0.5"),
        ({"seed": 3}, "seed 0 and not 3"),
        ({"precision": "bf16"}, "precision no and not bf16"),
        ({"identity": {"teacher": "b"}}, "teacher a and not b"),
    ]:
        settings = {"epochs": 1, "identity": {"teacher": "a"}, **change}
        with pytest.raises(surgery.UsageError, match=f"is the checkpoint of another training, with {re.escape(said)}"):
            train(net(), digits, **settings, checkpoint=path)
    other = net()
    with torch.no_grad():
        other[0].bias += 1
    with pytest.raises(surgery.UsageError, match="another training, with model"):
        other = train(other, digits, epochs=1, identity={"teacher": "a"}, checkpoint=path).module
    with pytest.raises(surgery.UsageError, match="another training, with teacher a and not None"):
        train(net(), digits, epochs=1, checkpoint=path)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_a_checkpoint_for_other_images_is_refused(tmp_path, augment):
    path = tmp_path / "training.pt"
    ours, others = (load_data("digits", limit=70, seed=seed, augment=augment) for seed in (0, 1))
    train(net(), ours, epochs=1, checkpoint=path)
    with pytest.raises(surgery.UsageError, match="another training, with images"):
        train(net(), others, epochs=1, checkpoint=path)
    assert train(net(), ours, epochs=1, checkpoint=path).steps == 1


def test_what_items_have_next_to_image_and_label_does_not_matter_for_a_checkpoint(digits, tmp_path):
    class Named(Extended):
        def __getitem__(self, index):
            return (*self.images[index], "a name", {"index": index})

    settings = {"epochs": 1, "checkpoint": tmp_path / "training.pt"}
    first = train(net(), digits, **settings)
    assert train(net(), replace(digits, train=Named(digits.train)), **settings) == first


def test_numpy_numbers_identify_a_training_like_python_numbers(digits, tmp_path):
    settings = {"epochs": 1, "checkpoint": tmp_path / "training.pt"}
    first = train(net(), digits, seed=np.int64(3), lr=np.float32(0.5), **settings)
    assert train(net(), digits, seed=3, lr=0.5, **settings) == first


def no_step(*_):
    raise AssertionError("a step was taken")


def test_an_identity_that_is_not_json_data_is_refused_before_the_training(digits, tmp_path):
    with pytest.raises(surgery.UsageError, match="what identifies a training must be plain JSON data"):
        train(net(), digits, epochs=1, loss_fn=no_step, checkpoint=tmp_path / "a.pt", identity={"teacher": net()})


def test_layers_may_be_selected_by_text_in_what_a_checkpoint_stores(digits, tmp_path):
    def grown(selector, path):
        growth = Growth(widen={selector: 1.5})
        return train(traced(), digits, epochs=2, grow={1: growth}, checkpoint=path).module

    whole = grown("nn.Conv2d", None)
    assert_same(grown("nn.Conv2d", tmp_path / "text.pt"), whole)
    assert_same(grown("nn.Conv2d", tmp_path / "text.pt"), whole)
    assert_same(grown(("nn.Conv2d",), tmp_path / "several.pt"), whole)
    assert_same(grown(nn.Conv2d, None), whole)


@pytest.mark.parametrize(("selector", "name"), [(nn.Conv2d, "Conv2d"), (lambda name, _: name == "0", "<lambda>")])
def test_a_class_or_predicate_cannot_be_stored_in_a_checkpoint(digits, tmp_path, selector, name):
    refused = pytest.raises(surgery.UsageError, match=f"a checkpoint cannot store {name}: select layers by text, such")
    quick = {"epochs": 1, "loss_fn": no_step, "checkpoint": tmp_path / "run"}
    with refused:
        train(traced(), digits, grow={0: Growth(widen={selector: 1.5})}, **quick)
    with refused:
        evolve(traced(), digits, {selector: 0.5}, 2, **quick)
    with refused:
        lottery(traced(), digits, 0.5, whole=selector, **quick)


def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_training(digits, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc")):
        with pytest.raises(
            surgery.UsageError,
            match=r"cannot write .*a\.pt: (a part of its path is a file|its folder cannot hold files)",
        ):
            train(net(), digits, epochs=1, loss_fn=no_step, checkpoint=folder / "a.pt")


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("unexpected pos 8704")])
def test_a_disk_that_is_full_costs_neither_the_checkpoint_nor_more_space(digits, tmp_path, monkeypatch, error):
    whole, resumed, written = net(), net(), []
    whole = train(whole, digits, epochs=EPOCHS).module
    settings = {"epochs": EPOCHS, "checkpoint": tmp_path / "training.pt"}
    save = torch.save

    def full_at_last(state, path):
        written.append(path)
        if len(written) > 1:
            Path(path).write_text("part")
            raise error
        save(state, path)

    monkeypatch.setattr(torch, "save", full_at_last)
    with pytest.raises(OSError, match=str(error)):
        train(net(), digits, **settings)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["training.pt"]
    resumed = train(resumed, digits, **settings).module
    assert_same(resumed, whole)


def test_a_file_that_is_not_a_checkpoint_is_refused(digits, tmp_path):
    path = tmp_path / "training.pt"
    path.write_text("nothing")
    with pytest.raises(surgery.UsageError, match="is not a checkpoint of a training"):
        train(net(), digits, epochs=1, checkpoint=path)
    torch.save({"format": 0}, path)
    with pytest.raises(surgery.UsageError, match="is a checkpoint of another version"):
        train(net(), digits, epochs=1, checkpoint=path)
    with pytest.raises(surgery.UsageError, match="checkpoint_every must be a whole number of at least 1, not 0"):
        train(net(), digits, epochs=1, checkpoint_every=0)


def test_every_damaged_byte_of_a_checkpoint_is_refused(digits, tmp_path):
    path = tmp_path / "training.pt"
    train(net(), digits, epochs=1, checkpoint=path)
    content = bytearray(path.read_bytes())
    for place in {*range(0, len(content), len(content) // 40), *range(len(content) - 100, len(content), 7)}:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(
            surgery.CheckpointError, match=r"training\.pt is .*: remove it to|; remove it to repeat this"
        ):
            train(net(), digits, epochs=1, checkpoint=path)
    for length in (0, 1, 80, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(surgery.CheckpointError, match=r"training\.pt is "):
            train(net(), digits, epochs=1, checkpoint=path)
    path.write_bytes(content)
    train(net(), digits, epochs=1, checkpoint=path)


def test_a_checkpoint_of_the_version_without_digests_is_read(digits, tmp_path):
    path = tmp_path / "training.pt"
    whole = train(net(), digits, epochs=1, checkpoint=path)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "format": 1}, path)
    assert_same(train(net(), digits, epochs=1, checkpoint=path).module, whole.module)
    torch.save(state, path)
    with pytest.raises(surgery.CheckpointError, match="is damaged: its digest is missing"):
        train(net(), digits, epochs=1, checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"progressed": "{"}, "'progressed' cannot be read"),
        ({"progressed": '{"steps": "1"}'}, r"'progressed': 'steps': expected 'int', got 'str'"),
        ({"identity": 3}, "'identity': expected 'str', got 'int'"),
        ({"model": {}}, "does not fit the training"),
    ],
)
def test_a_malformed_checkpoint_names_the_field(digits, tmp_path, change, message):
    path = tmp_path / "training.pt"
    train(net(), digits, epochs=1, checkpoint=path)
    torch.save({**torch.load(path, weights_only=True), "format": 1, **change}, path)
    with pytest.raises(surgery.CheckpointError, match=message):
        train(net(), digits, epochs=1, checkpoint=path)
