"""Augmentation by the settings of a training: it follows from seed, epoch and image, and mixes labels with images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import surgery
from surgery import UsageError
from surgery.settings import AUGMENTATIONS, DistillSettings, TrainSettings
from surgery.training.data import augment
from surgery.training.data.augmented import Augmentation
from surgery.training.data.data import load_data
from surgery.training.loop import label_loss, train
from tests.helpers import assert_same, killed_after

DIGITS = 130

ALL: dict[str, Any] = {"augment": "flip-crop+randaugment", "erase": 0.5, "mixup": 0.4, "cutmix": 1.0}


def net() -> nn.Module:
    """With dropout: what is random in a step must be the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)
        )


def seen_by(data, **settings) -> list[tuple[Tensor, Tensor]]:
    """The batches that reach the loss."""
    seen = []

    def loss_fn(model, batch, epoch):
        seen.append(batch)
        return label_loss(model(batch[0]), batch[1])

    train(net(), data, loss_fn=loss_fn, **{"epochs": 1, "batch_size": 64, **settings})
    return seen


def test_every_name_is_implemented():
    assert AUGMENTATIONS.keys() == augment.AUGMENTATIONS.keys()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_training_that_is_cut_off_goes_on_to_the_same_weights_with_all_of_them(digits, tmp_path, workers, steps):
    settings = {"epochs": 2, "batch_size": 64, "test_each_epoch": True, **ALL}
    expected = train(net(), digits, **settings)
    settings |= {"checkpoint": tmp_path / "a.pt", "checkpoint_every": 1, "workers": workers}
    with pytest.raises(KeyboardInterrupt):
        train(net(), digits, **settings, progress=killed_after(steps))
    resumed = train(net(), digits, **settings)
    assert_same(resumed.module, expected.module)
    assert [(one.loss, one.score) for one in resumed.epochs] == [(one.loss, one.score) for one in expected.epochs]


def test_images_do_not_depend_on_the_number_of_workers_and_differ_between_epochs_and_seeds(digits):
    here, there = (seen_by(digits, workers=workers, epochs=2, **ALL) for workers in (0, 2))
    assert len(here) == 4
    assert all(
        torch.equal(a, b) for ours, theirs in zip(here, there, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
    assert not torch.equal(here[0][0], seen_by(digits, seed=1, **ALL)[0][0])


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_each_augmentation_changes_images_and_nothing_else(digits, name):
    plain, changed = seen_by(digits), seen_by(digits, augment=name)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(plain, changed, strict=True))
    assert changed[0][0].shape == plain[0][0].shape
    assert changed[0][0].dtype == torch.float32
    differ = [not torch.equal(one, other) for one, other in zip(plain[0][0], changed[0][0], strict=True)]
    assert sum(differ) > 10
    low, high = plain[0][0].min(), plain[0][0].max()
    assert low - 0.05 <= changed[0][0].min() <= changed[0][0].max() <= high + 0.05


def test_a_policy_gets_the_pixels_and_its_result_is_normalised_again(monkeypatch, digits):
    """The identity in its place changes a pixel by no more than its 8 bits."""
    seen = []

    class Nothing(nn.Module):
        def forward(self, image):
            seen.append(image)
            return image

    monkeypatch.setitem(augment.AUGMENTATIONS, "randaugment", augment._policy(Nothing))
    (images, _), *_ = seen_by(digits, augment="randaugment")
    (plain, _), *_ = seen_by(digits)
    assert (images - plain).abs().max() <= 0.5 / 255 / min(digits.normalisation.std) + 1e-5
    grey = load_data("digits", limit=40, channels=1)
    transform = Augmentation.of(grey, TrainSettings(augment="randaugment")).transform
    image = grey.train[3][0]
    assert torch.allclose(transform(image), image, atol=0.5 / 255 / min(grey.normalisation.std) + 1e-5)
    assert [one.mode for one in (seen[0], seen[-1])] == ["RGB", "L"]
    assert seen[0].getextrema()[0] == (0, 255)  # black and white of a digit, whatever its normalisation


def test_erased_images_are_as_many_as_the_probability_says(digits):
    (all_of_them, _), *_ = seen_by(digits, erase=1.0)
    (plain, _), *_ = seen_by(digits)
    assert ((all_of_them == 0).sum((1, 2, 3)) > 0).all()  # the mean colour; no pixel of a digit has it
    assert not (plain == 0).any()
    (half, _), *_ = seen_by(digits, erase=0.5)
    assert 15 < int(((half == 0).sum((1, 2, 3)) > 0).sum()) < 50


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_labels_say_how_much_of_an_image_there_is(digits, name):
    """Against the definition: MixUp's weighted mean, CutMix's rectangle, of an image and the one before it."""
    torch.manual_seed(0)
    pixels = TensorDataset(torch.rand(128, 3, 8, 8), torch.arange(128) % 10)  # no two of them are equal
    data = replace(digits, train=pixels)
    for (images, mixed), (plain, labels) in zip(seen_by(data, **{name: 1.0}), seen_by(data), strict=True):
        other, others = plain.roll(1, 0), labels.roll(1, 0)
        assert mixed.shape == (64, 10)
        assert torch.allclose(mixed.sum(1), torch.ones(64))
        differing = int((labels != others).nonzero()[0])
        share = float(mixed[differing, labels[differing]])
        assert 0 < share < 1
        one_hot = functional.one_hot(labels, 10) * share + functional.one_hot(others, 10) * (1 - share)
        assert torch.allclose(mixed, one_hot, atol=1e-6)
        if name == "mixup":
            assert torch.allclose(images, plain * share + other * (1 - share), atol=1e-5)
        else:
            own = images == plain
            assert torch.equal(images, torch.where(own, plain, other))
            assert torch.allclose(own.float().mean((1, 2, 3)), torch.full((64,), share))
            assert (own == own[:1, :1]).all()
            rows, columns = (~own[0, 0]).any(1), (~own[0, 0]).any(0)
            assert torch.equal(~own[0, 0], rows[:, None] & columns[None])


def test_with_both_each_batch_is_mixed_by_one(digits):
    batches = seen_by(digits, mixup=0.4, cutmix=1.0, epochs=8, test_each_epoch=False)
    plain = seen_by(digits, epochs=8)
    cut = [
        bool(((images == own) | (images == own.roll(1, 0))).all())
        for (images, _), (own, _) in zip(batches, plain, strict=True)
    ]
    assert {True, False} == set(cut)


def test_the_loss_of_mixed_labels_is_the_mixture_of_losses():
    torch.manual_seed(0)
    logits, first, second = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0, 2, 4]), torch.tensor([1, 2, 0])
    share = 0.3
    mixed = share * functional.one_hot(first, 5) + (1 - share) * functional.one_hot(second, 5)
    for smoothing in (0.0, 0.1):
        expected = share * functional.cross_entropy(logits, first, label_smoothing=smoothing)
        expected = expected + (1 - share) * functional.cross_entropy(logits, second, label_smoothing=smoothing)
        assert torch.allclose(label_loss(logits, mixed.double(), smoothing), expected)
        assert torch.allclose(label_loss((logits, logits), mixed.double(), smoothing), 1.4 * expected)


def test_a_model_may_have_more_outputs_than_the_data_have_classes(digits):
    few = surgery.as_data(TensorDataset(torch.rand(16, 3, 8, 8), torch.arange(16) % 3))
    assert len(few.classes) == 3
    assert train(net(), few, epochs=1, batch_size=8, mixup=1.0).steps == 2


def test_other_settings_of_augmentation_are_another_training(digits, tmp_path):
    common = {"epochs": 1, "checkpoint": tmp_path / "a.pt"}
    train(net(), digits, **common, **ALL)
    for change in ({"augment": "none"}, {"augment": "flip"}, {"erase": 0.0}, {"mixup": 0.1}, {"cutmix": 0.0}):
        with pytest.raises(UsageError, match=f"is the checkpoint of another training, with {next(iter(change))} "):
            train(net(), digits, **common, **{**ALL, **change})


def test_a_training_without_augmentation_is_identified_as_before():
    names = {"augment", "erase", "mixup", "cutmix"}
    assert not names & TrainSettings().identity().keys()
    assert names <= TrainSettings(**ALL).identity().keys()
    assert not names & DistillSettings().identity().keys()


class Items(Dataset[Any]):
    """Ten times the same item."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return self.item


IMAGE = torch.rand(3, 8, 8)


@pytest.mark.parametrize(
    ("item", "settings", "message"),
    [
        ((IMAGE, 3, "a.png"), {"mixup": 1.0}, r"mixup and cutmix are for items \(image, label\)"),
        ((IMAGE, {"boxes": torch.zeros(1, 4)}), {"augment": "flip"}, "have more than a class each, such as boxes"),
        ((IMAGE, torch.zeros(8, 8).long()), {"erase": 0.5}, "have more than a class each, such as boxes or a mask"),
        ((torch.rand(5, 8, 8), 1), {"augment": "flip-crop"}, "images of 5 channels cannot be augmented so"),
        ((torch.rand(5, 8, 8), 1), {"augment": "randaugment"}, "images of 5 channels cannot be augmented so"),
        (
            (9 * IMAGE, 1),
            {"augment": "augmix"},
            r"an image has pixels from 0\.\d+ to 3\.\d+ where its data say",
        ),
        ((IMAGE, 1), {"augment": "flip+rotate"}, "unknown augmentation 'rotate'"),
    ],
)
def test_what_cannot_be_augmented_is_refused_before_the_training(item, settings, message):
    torch.manual_seed(0)
    data = replace(load_data("digits", limit=10), train=Items(item), channels=item[0].shape[0])
    with pytest.raises(UsageError, match=message):
        train(net(), data, epochs=1, loss_fn=lambda *_: pytest.fail("a step was taken"), **settings)


def test_data_that_are_augmented_already_are_not_augmented_twice():
    data = load_data("digits", limit=40, augment="flip")
    with pytest.raises(UsageError, match=r"augmented by 'flip' already, and augment is 'flip-crop': leave out one"):
        train(net(), data, epochs=1, augment="flip-crop")
    assert train(net(), data, epochs=1, erase=0.5).steps == 1


def test_the_state_of_the_caller_is_not_drawn_from(digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Augmentation.of(digits, TrainSettings(**ALL))
    train(net(), digits, epochs=1, **ALL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cache", ["memory", "folder"])
def test_a_teachers_outputs_for_augmented_images_are_not_kept(cache):
    for settings in ({"augment": "flip"}, {"erase": 0.1}, {"mixup": 0.1}, {"cutmix": 0.1}):
        with pytest.raises(UsageError, match="so the teacher's outputs cannot be cached"):
            DistillSettings(cache=cache, **settings)


def test_a_student_learns_from_what_its_teacher_says_of_the_mixed_images(digits, model):
    """KD's loss by hand, on the batches that a plain training with these settings sees."""
    data = replace(digits, train=surgery.load_data("digits", limit=64).train)
    taught = surgery.distill(
        model, model, data, hint_epochs=0, epochs=1, batch_size=64, optimizer="sgd", momentum=0.0, lr=1e-9, **ALL
    )
    ((images, labels),) = seen_by(data, **ALL)
    with torch.no_grad():
        student, teacher = model.train()(images), model.eval()(images)
        model.eval()
    soft = -(functional.softmax(teacher / 3, 1) * functional.log_softmax(student / 3, 1)).sum(1).mean()
    hard = -(labels * functional.log_softmax(student, 1)).sum(1).mean()
    assert taught.history is not None
    assert taught.history.epochs[0].loss == pytest.approx(float(4 * soft + hard), rel=1e-4)


def test_an_objective_that_needs_classes_refuses_mixed_labels(digits, model):
    with pytest.raises(UsageError, match="DKD needs one class for each image: leave out mixup and cutmix"):
        surgery.distill(model, model, digits, epochs=1, objectives=surgery.DKD(), cutmix=1.0)
    surgery.distill(model, model, digits, hint_epochs=0, epochs=1, objectives=surgery.DKD(), augment="flip")


@pytest.mark.parametrize("verb", ["distill", "evolve", "tradeoff", "sensitivity"])
def test_every_verb_that_trains_has_these_options(verb, run):
    code, told, _ = run(verb, "--help")
    assert code == 0
    assert all(name in told for name in ("--augment", "--erase", "--mixup", "--cutmix"))


def test_sensitivity_trains_as_its_options_say(run, monkeypatch):
    given = []

    def take(model, data, settings, **_):
        given.append(settings)
        raise UsageError("enough")

    monkeypatch.setattr(surgery, "train", take)
    options = "--epochs 2 --augment flip --erase 0.25 --mixup 0.2 --cutmix 0.5 --optimizer adamw --lr 0.1 --seed 3"
    on = ["--dataset", "digits", "--limit", "20", "--image-size", "32"]
    assert run("sensitivity", "resnet18", *on, *options.split(), "--out", "made")[2] == "error: enough\n"
    expected = TrainSettings(
        epochs=2, augment="flip", erase=0.25, mixup=0.2, cutmix=0.5, optimizer="adamw", lr=0.1, seed=3
    )
    assert given == [expected]
