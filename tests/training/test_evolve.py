"""Knowledge Evolution: what a generation keeps, draws again and scores; breaks; baselines; all kinds of models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import surgery
from surgery import models as catalogue
from surgery.settings import EvolveSettings
from surgery.training import evolve as evolving
from surgery.training.data.data import Data, Normalisation, load_data
from surgery.training.evaluation import evaluate
from surgery.training.evolve import PAPER, evolve, recalibrate
from surgery.training.history import Score
from surgery.training.loop import train
from tests.helpers import assert_same, killed_after
from tests.zoo import SMALL, digits_net

DIGITS = 200

QUICK = {"epochs": 2, "lr": 0.05, "batch_size": 64}


def test_the_slim_network_catches_up_with_the_dense_one():
    """With so many generations its score is that of the dense one, and at first it is not (section 4)."""
    data = load_data("digits", limit=500)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = surgery.trace(digits_net().eval(), torch.zeros(2, 3, 8, 8))
    found = evolve(model, data, 0.5, 4, epochs=8, lr=0.1)
    first, last = found.generations[0], found.generations[-1]
    assert first.slim.accuracy < first.dense.accuracy - 0.2
    assert last.slim.accuracy > last.dense.accuracy - 0.03
    assert found.score == last.dense == evaluate(found.module, data.test)
    assert found.slim_score == last.slim == evaluate(found.slim, data.test)
    assert surgery.cost(found.slim).params < 0.6 * surgery.cost(found.module).params
    surgery.verify(found.slim, surgery.masked(found.module, found.masks), torch.randn(2, 3, 8, 8)).raise_if_different()


@pytest.mark.parametrize("kind", ["kels", "wels"])
def test_a_generation_begins_with_the_fit_hypothesis_of_the_last_and_new_numbers_elsewhere(
    digits, model, kind, monkeypatch
):
    starts, ends = [], []

    def watched(network, *args, **settings):
        starts.append(copy.deepcopy(network.state_dict()))
        history = train(network, *args, **settings)
        ends.append(history.module.state_dict())
        return history

    monkeypatch.setattr(evolving, "train", watched)
    before = copy.deepcopy(model.state_dict())
    found = evolve(model, digits, 0.5, 3, kind=kind, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in starts[0].items())
    for old, new in zip(ends, starts[1:], strict=False):
        for name, mask in found.masks.items():
            assert torch.equal(old[name][mask], new[name][mask])
            if old[name].ndim > 1 and not mask.all():
                assert torch.eq(old[name][~mask], new[name][~mask]).float().mean() < 0.01
    drawn = [start["4.weight"][~found.masks["4.weight"]] for start in starts[1:]]
    assert torch.eq(*drawn).float().mean() < 0.01
    assert [name for name in found.module.state_dict() if "mask" in name] == []
    assert found.module.state_dict().keys() == before.keys()
    assert (found.slim is None) == (kind == "wels")


def test_a_killed_run_ends_with_the_same_weights(digits, model, tmp_path):
    whole = evolve(model, digits, 0.5, 3, long=True, **QUICK)
    for task, step in [("generation-1", 2), ("generation-2", 5), ("generation-3", 1), ("long", 14)]:

        def killed(name, done, total, task=task, step=step):
            if name == task:
                killed_after(step)(name, done, total)

        with pytest.raises(KeyboardInterrupt):
            evolve(model, digits, 0.5, 3, long=True, checkpoint=tmp_path, progress=killed, **QUICK)
    found = evolve(model, digits, 0.5, 3, long=True, checkpoint=tmp_path, checkpoint_every=2, **QUICK)
    assert_same(found.module, whole.module)
    assert_same(found.long_module, whole.long_module)
    assert [(g.dense, g.slim) for g in found.generations] == [(g.dense, g.slim) for g in whole.generations]
    assert found.long.dense == whole.long.dense


def test_the_long_baseline_is_plain_training_for_as_many_epochs(digits, model):
    found = evolve(model, digits, 0.5, 2, long=True, **QUICK)
    assert len(found.long.history.epochs) == 4
    assert sum(len(generation.history.epochs) for generation in found.generations) == 4
    assert found.long.history.steps == sum(generation.history.steps for generation in found.generations)
    assert found.long.dense == evaluate(found.long_module, digits.test)
    report = found.to_dict()
    assert len(report["generations"]) == 2
    assert report["long"]["dense"]["total"] == 200


def test_statistics_of_the_slim_network_are_measured_again_where_asked(digits, model):
    found = evolve(model, digits, 0.5, 1, recalibrate=True, **QUICK)
    plain = surgery.slim(found.module, 0.5)
    assert_same(found.slim, recalibrate(plain, digits, 64))
    assert not torch.allclose(found.slim.get_buffer("1.running_mean"), plain.get_buffer("1.running_mean"))
    images = torch.stack([image for image, _ in digits.train])
    with torch.no_grad():
        mean = plain.get_submodule("0")(images).mean((0, 2, 3))
    assert torch.allclose(found.slim.get_buffer("1.running_mean"), mean, atol=0.05)
    assert torch.equal(found.slim.get_parameter("0.weight"), plain.get_parameter("0.weight"))


def test_statistics_measured_on_augmented_images_follow_from_the_seed_alone(model):
    data = load_data("digits", limit=50, augment="flip-crop")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = recalibrate(model, data)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        assert_same(recalibrate(model, data), first)
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        recalibrate(model, data, seed=1).get_buffer("1.running_mean"), first.get_buffer("1.running_mean")
    )


@pytest.mark.parametrize("settings", [EvolveSettings(epochs=1), replace(PAPER, epochs=1)], ids=["usual", "the paper's"])
def test_each_generation_trains_with_the_settings_and_a_seed_of_its_own(digits, model, monkeypatch, settings):
    seen = []

    def watched(network, data, given, **options):
        seen.append(given)
        return train(network, data, given.training(lr=0.01), **options)

    monkeypatch.setattr(evolving, "train", watched)
    evolve(model, digits, 0.5, 2, settings)
    assert [replace(given, seed=0) for given in seen] == [settings.training()] * 2
    assert seen[0].seed != seen[1].seed
    assert (PAPER.peak_lr, PAPER.decay, PAPER.batch_size, PAPER.label_smoothing) == (0.256, 1e-4, 32, 0.1)


def test_the_parts_to_initialise_again_can_be_chosen(digits, model):
    kept = evolve(model, digits, 0.5, 2, reset={"norms": False, "statistics": False}, **{**QUICK, "lr": 1e-12})
    assert torch.allclose(kept.module.get_parameter("1.weight"), model.get_parameter("1.weight"), atol=1e-6)
    with pytest.raises(surgery.UsageError, match="generations must be a whole number"):
        evolve(model, digits, 0.5, 0, **QUICK)


def images(count, size=8):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, size, size, generator=generator), k % 10) for k in range(count)]


def own(train, test, **more):
    return Data("own", train, test, tuple("0123456789"), 8, Normalisation(), **more)


def test_an_image_that_is_left_over_has_no_variance_to_measure():
    layers = nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    model = surgery.trace(nn.Sequential(*layers), torch.zeros(2, 3, 8, 8))
    found = evolve(model, own(images(9), images(4)), 0.5, 2, epochs=1, batch_size=4, recalibrate=True)
    assert found.slim.get_buffer("2.num_batches_tracked") == 2
    assert_same(recalibrate(model, own(images(9), [])), recalibrate(model, own(images(9), []), 9))


class Branched(nn.Module):
    """One BatchNorm is run in training only."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.aux = nn.BatchNorm2d(3), nn.Dropout(0.9), nn.BatchNorm2d(3)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.last(self.drop(self.norm(x)))
        return x + self.aux(x) if self.training else x


def test_measuring_statistics_leaves_modes_momentum_and_unused_norms_as_they_were():
    module = Branched()
    module.aux.running_mean.fill_(3.0)
    module.norm.eval()
    model = surgery.trace(module, torch.zeros(2, 3, 8, 8))
    result = recalibrate(model, own(images(8), []), 4)
    assert [layer.training for layer in result.modules()] == [layer.training for layer in model.modules()]
    assert result.norm.momentum == 0.1
    assert torch.equal(result.aux.running_mean, model.aux.running_mean)
    mean = torch.stack([image for image, _ in images(8)]).mean((0, 2, 3))
    assert torch.allclose(result.norm.running_mean, mean, atol=1e-6)
    assert torch.allclose(result.last.running_var, torch.ones(3), atol=0.05)  # dropout would make it ten times as much


def test_statistics_are_measured_on_the_batches_that_the_data_make():
    model = surgery.trace(nn.Sequential(nn.BatchNorm2d(3)), torch.zeros(2, 3, 8, 8))
    doubled = own(images(4), [], collate=lambda items: (2 * torch.stack([image for image, _ in items]),))
    mean = torch.stack([image for image, _ in images(4)]).mean((0, 2, 3))
    assert torch.allclose(recalibrate(model, doubled).get_buffer("0.running_mean"), 2 * mean, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"seed": 1.5}, r"seed must be a whole number of at least 0, not 1\.5"),
        ({"kind": "wels", "recalibrate": True}, "recalibrate is for the slim network, and WELS gives none"),
        ({"reset": {"seed": 3}}, "each generation has its own seed"),
        ({"reset": {"fresh": digits_net()}}, "with a model as fresh=, all generations would draw the same"),
        ({"reset": "norms"}, "reset must be a mapping of options of reset_hypothesis, not 'norms'"),
        ({"data": own(images(4), [])}, "data set 'own' has no test images: pass score=, or data that have some"),
    ],
    ids=["negative seed", "half a seed", "WELS", "seed of the reset", "one new model", "no options", "no test images"],
)
def test_invalid_arguments_are_refused_before_the_training(digits, model, settings, message):
    def never(*_):
        raise AssertionError("it trains")

    with pytest.raises(surgery.UsageError, match=message):
        evolve(model, **{"data": digits, "generations": 3, "progress": never, **QUICK, **settings})


def test_a_checkpoint_of_other_settings_is_refused_in_words(digits, model, tmp_path):
    settings = {**QUICK, "checkpoint": tmp_path}
    evolve(model, digits, 0.5, 2, identity={"loss": "first"}, **settings)
    with pytest.raises(surgery.UsageError, match=r"split_rate 0\.5 and not 0\.25"):
        evolve(model, digits, 0.25, 2, identity={"loss": "first"}, **settings)
    with pytest.raises(surgery.UsageError, match="norms None and not False"):
        evolve(model, digits, 0.5, 2, identity={"loss": "first"}, reset={"norms": False}, **settings)
    with pytest.raises(surgery.UsageError, match="loss first and not second"):
        evolve(model, digits, 0.5, 2, identity={"loss": "second"}, **settings)


def test_the_modes_of_the_caller_do_not_matter(digits, model):
    usual = evolve(model, digits, 0.5, 2, recalibrate=True, **QUICK)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = evolve(model, digits, 0.5, 2, recalibrate=True, **QUICK)
    assert_same(found.slim, usual.slim)
    assert found.slim_score == usual.slim_score


def detection() -> Data:
    """Four pictures with a box in each."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 96, generator=generator) for _ in range(4)]
    box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
    items = [(image, {"boxes": box, "labels": torch.tensor([1])}) for image in images]
    classes = ("none", "thing")
    return Data(
        "boxes", items, items, classes, 96, Normalisation(), collate=lambda items: tuple(zip(*items, strict=True))
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [("mobilenet_v2?width_mult=0.25", 32), ("shufflenet_v2_x0_5", 32)],
)
def test_all_kinds_of_models_evolve(name, size):
    source = f"{name}{'&' if '?' in name else '?'}num_classes=10"
    data = load_data("digits", limit=4, image_size=size)
    model = surgery.trace(catalogue.build(source, seed=0), torch.zeros(2, 3, size, size), source=source)
    found = evolve(model, data, 0.5, 2, epochs=1, batch_size=2, lr=1e-3)
    assert found.slim_score.total == 4
    assert found.slim is not None
    assert surgery.cost(found.slim).params < 0.5 * surgery.cost(found.module).params


@pytest.mark.parametrize("name", ["vision transformer", "swin"])
def test_users_transformers_evolve_if_a_new_one_can_be_made(name):
    make, [(_, _, height, width)] = SMALL[name]
    model = surgery.trace(make(), torch.zeros(2, 3, height, width))
    images = [(torch.randn(3, height, width), k) for k in range(4)]
    data = Data("own", images, images, ("a", "b", "c", "d"), width, Normalisation())
    found = evolve(model, data, 0.5, 2, epochs=1, batch_size=2, lr=1e-3, reset={"fresh": make})
    assert found.slim_score.total == 4
    assert surgery.cost(found.slim).params < 0.6 * surgery.cost(found.module).params


def test_a_detector_evolves_with_its_own_loss_and_score():
    source = "fasterrcnn_mobilenet_v3_large_320_fpn?num_classes=2"
    data = detection()
    model = surgery.trace(catalogue.build(source, seed=0), catalogue.example_inputs(source), source=source)
    losses = []

    def loss_fn(network, batch, epoch):
        losses.append(sum(network(list(batch[0]), list(batch[1])).values()))
        return losses[-1]

    found = evolve(
        model, data, 0.5, 2, epochs=1, batch_size=2, lr=1e-3, loss_fn=loss_fn,
        score=lambda network: Score(len(network.eval()([torch.zeros(3, 96, 96)])), 1),
    )  # fmt: skip
    assert len(losses) == 4
    assert all(torch.isfinite(loss) for loss in losses)
    assert found.slim_score == Score(1, 1)
