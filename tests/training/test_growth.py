"""Growing in the middle of training."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import surgery
from surgery.edit.recipe import Recipe
from surgery.training.evaluation import evaluate
from surgery.training.growth import Growth
from surgery.training.loop import train
from surgery.training.optimizers import SCHEDULES
from surgery.training.phases import plan_phases
from tests.helpers import same_tensors


class Residual(nn.Module):
    """A stem and two residual blocks, the second of which is narrower inside."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 6))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc(self.pool(self.blocks(x)).flatten(1))


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def residual():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return surgery.trace(Residual(), torch.zeros(2, 3, 8, 8))


def plain():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(12 * 16, 10),
        )
    return surgery.trace(net, torch.zeros(2, 3, 8, 8))


def state(model):
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize(("build", "optimizer"), [(plain, "sgd"), (residual, "sgd"), (residual, "adamw")])
def test_a_model_grown_in_the_middle_scores_as_before_and_goes_on_learning(digits, build, optimizer):
    model = build()
    places = ["blocks"] if build is residual else ["0"]
    lr = {"sgd": 0.05, "adamw": 0.005}[optimizer]
    grow = {2: Growth(widen=1.5), 4: Growth(widen={"*0*": 2.0}, deepen=places)}
    history = train(model, digits, epochs=6, optimizer=optimizer, lr=lr, grow=grow, test_each_epoch=True)
    assert [growth.epoch for growth in history.growths] == [2, 4]
    for growth in history.growths:
        assert growth.score == history.epochs[growth.epoch - 1].score
        assert growth.check.max_rel < 1e-5
        assert growth.after.params > growth.before.params
        assert growth.after.macs > growth.before.macs
    assert history.growths[0].after == history.growths[1].before
    assert history.growths[1].after == surgery.cost(history.module)
    assert history.epochs[-1].loss < history.epochs[3].loss < history.epochs[1].loss
    assert history.epochs[-1].score.accuracy > max(0.8, history.epochs[1].score.accuracy)
    assert evaluate(history.module, digits.test) == history.epochs[-1].score


def test_every_parameter_of_the_grown_model_learns_and_copies_part(digits):
    model = residual()
    start = train(model, digits, epochs=2, grow={1: Growth(widen=2.0, deepen={"blocks": 1, "norm": 1})}, lr=0.05)
    untrained = surgery.apply(model, surgery.recipe(start.module).steps)
    old = dict(untrained.named_parameters())
    for name, parameter in start.module.named_parameters():
        rows = (parameter - old[name]).detach().flatten(1) if parameter.ndim > 1 else parameter - old[name]
        assert (rows != 0).any(-1).all() if rows.ndim > 1 else (rows != 0).any(), name
    stem = start.module.stem.weight.detach()
    (index,) = (i for name, i in surgery.recipe(start.module).steps[0].indices.items() if name == "stem")
    for new, old_unit in enumerate(index[8:], 8):
        assert (stem[new] - stem[old_unit]).abs().max() > 1e-4  # 1e-8, from rounding, with even shares


def test_the_symmetry_of_copies_is_broken_by_zero_sum_noise_by_default(digits):
    for options, kind in (({}, "zero-sum"), ({"break_symmetry": "uneven"}, None), ({"break_symmetry": None}, None)):
        growth = Growth(widen=1.5, widen_options=options)
        model = train(plain(), digits, epochs=1, grow={0: growth}).module
        (step,) = surgery.recipe(model).steps
        assert (step.noise and step.noise.kind) == kind
        assert bool(step.shares) == (options.get("break_symmetry") == "uneven")


def test_options_reach_the_passes(digits):
    growth = Growth(
        widen={"0": 20}, deepen=["0"], widen_options={"mapping": "balanced", "seed": 5}, deepen_options={"kernel": 5}
    )
    model = train(plain(), digits, epochs=1, grow={0: growth}, seed=3).module
    wide, deep = surgery.recipe(model).steps
    expected = surgery.widen(plain(), {"0": 20}, mapping="balanced", break_symmetry="zero-sum", seed=5)
    assert surgery.recipe(expected).steps == (wide,)
    assert deep.kernel == (5, 5)


def test_places_may_come_from_a_generator(digits):
    growth = Growth(deepen=(name for name in ["0"]))
    model = train(plain(), digits, epochs=1, grow={0: growth}).module
    assert [step.after for step in surgery.recipe(model).steps] == ["0"]


def test_the_same_seed_grows_and_trains_the_same_weights_and_another_seed_others(digits):
    grow = {0: Growth(images=0.4), 1: Growth(images=0.8, widen=1.5, deepen=["blocks"])}
    runs = [state(train(residual(), digits, epochs=2, grow=grow, seed=seed).module) for seed in (0, 0, 1)]
    assert same_tensors(runs[0], runs[1])
    assert not same_tensors(runs[0], runs[2])


def test_the_initial_state_of_new_channels_can_be_chosen(digits):
    runs = [
        state(train(plain(), digits, epochs=2, grow={1: Growth(widen=1.5, state=new)}).module)
        for new in ("copied", "zero")
    ]
    assert not same_tensors(*runs)


def test_the_model_given_is_not_changed_and_its_modes_are_those_of_the_grown_one(digits):
    model = residual().eval()
    model.blocks[0].norm1.train()
    before = state(model)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    history = train(model, digits, epochs=2, grow={1: Growth(widen=1.5, deepen=["norm"])}, test_each_epoch=True)
    assert torch.equal(torch.rand(2), expected)
    assert same_tensors(model.state_dict(), before)
    assert surgery.recipe(model).steps == ()
    for trained in (model, history.module):
        assert [name for name, part in trained.named_modules() if part.training] == ["blocks.0.norm1"]


def test_a_growth_of_nothing_new_changes_nothing(digits):
    """The same training as without: the order of the images, the rates and the optimiser's state go on."""
    model = plain()
    plainly = train(model, digits, epochs=3, test_each_epoch=True)
    grown = train(plain(), digits, epochs=3, grow={1: Growth(images=1.0), 2: Growth(widen=1.0)}, test_each_epoch=True)
    assert same_tensors(plainly.module.state_dict(), grown.module.state_dict())
    assert [replace(e, seconds=0) for e in plainly.epochs] == [replace(e, seconds=0) for e in grown.epochs]
    assert plainly.growths == ()


def test_data_grow_too_and_the_schedule_is_over_all_steps_to_come(digits):
    told = []
    grow = {0: Growth(images=0.3), 2: Growth(images=0.6, widen=1.5), 3: Growth(images=1.0)}
    history = train(
        plain(), digits, epochs=4, grow=grow, batch_size=100, progress=lambda _, done, total: told.append((done, total))
    )
    sizes = [epoch.images for epoch in history.epochs]
    assert sizes[0] == sizes[1]
    assert sizes[-1] == 1438
    for size, fraction in zip(sizes[1:], (0.3, 0.6, 1.0), strict=True):
        assert abs(size - fraction * 1438) <= 5  # rounded for each of ten classes
    assert [growth.images for growth in history.growths] == [sizes[0], *sizes[2:]]
    assert history.steps == 4 + 4 + 8 + 14
    assert told == [(step, 30) for step in range(1, 31)]
    assert history.epochs[1].lr == pytest.approx(0.02 * SCHEDULES["one-cycle"](8 / 30))
    assert history.epochs[-1].lr == 0
    assert [bool(growth.steps) for growth in history.growths] == [False, True, False]
    assert history.growths[0].check is history.growths[0].before is None


def test_a_larger_fraction_holds_a_smaller_one_and_every_class_has_its_share(digits):
    def chosen(fraction, seed=0):
        (phase,) = plan_phases(digits, 1, {0: Growth(images=fraction)}, seed)
        return set(phase.images.indices)

    labels = [int(digits.train[k][1]) for k in range(len(digits.train))]
    small, large, tiny = chosen(0.25), chosen(0.7), chosen(1e-6)
    assert tiny < small < large
    assert chosen(0.25, seed=1) != small
    assert len(tiny) == 10
    for part, fraction in ((small, 0.25), (large, 0.7), (tiny, 0.0)):
        for label in range(10):
            whole = labels.count(label)
            assert abs(sum(labels[k] == label for k in part) - max(1, fraction * whole)) <= 0.5


def test_labels_are_found_where_the_data_set_keeps_them(digits):
    images, labels = torch.zeros(40, 3, 2, 2), torch.arange(40) % 4

    class Listed(Dataset):
        targets = labels.tolist()

        def __len__(self):
            return len(labels)

        def __getitem__(self, k):
            raise AssertionError("no image need be read")

    class Read(Listed):
        targets = None

        def __getitem__(self, k):
            return images[k], int(labels[k])

    for whole in (Listed(), Read(), TensorDataset(images, labels), Subset(Listed(), range(40))):
        (phase,) = plan_phases(replace(digits, train=whole), 1, {0: Growth(images=0.5)}, 0)
        assert torch.bincount(labels[phase.images.indices]).tolist() == [5] * 4


def test_another_data_set_can_take_the_place_of_the_first(digits):
    some = Subset(digits.train, range(400))
    history = train(plain(), replace(digits, train=some), epochs=2, grow={1: Growth(images=digits.train)})
    assert [epoch.images for epoch in history.epochs] == [400, 1438]


def test_the_record_is_plain_data_that_can_be_replayed(digits):
    model = plain()
    grow = {1: Growth(images=1.0), 2: Growth(widen=1.5, deepen=["0"])}
    history = train(model, digits, epochs=3, grow=grow, test_each_epoch=True)
    read = json.loads(json.dumps(history.to_dict()))
    assert read["steps"] == history.steps
    assert "model" not in read
    only_data, grown = read["growths"]
    assert (only_data["epoch"], only_data["images"], only_data["steps"], only_data["check"]) == (1, 1438, [], None)
    assert grown["check"]["ok"]
    assert grown["check"]["dtype"] == "float32"
    assert grown["after"]["params"] == sum(p.numel() for p in history.module.parameters())
    assert grown["score"]["total"] == 359
    steps = Recipe.from_json(json.dumps({"schema": 1, "source": None, "steps": grown["steps"]})).steps
    assert steps == surgery.recipe(history.module).steps
    assert history.seconds > sum(epoch.seconds for epoch in history.epochs)


def test_data_alone_grow_for_a_model_that_was_not_traced(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    before = state(model)
    history = train(model, digits, epochs=2, grow={0: Growth(images=0.5), 1: Growth(images=1.0)})
    assert same_tensors(model.state_dict(), before)
    assert not same_tensors(history.module.state_dict(), before)


@pytest.mark.parametrize(
    ("grow", "message"),
    [
        ({3: Growth(widen=2.0)}, "grow has epoch 3: this training has epochs 0 to 2"),
        ({-1: Growth(widen=2.0)}, "grow has epoch -1: this training has epochs 0 to 2"),
        ({1: Growth()}, "the growth before epoch 1 has nothing to grow: give it widen, deepen or images"),
        ({1: Growth(images=0.0)}, "the fraction of images from epoch 1 on is 0.0: it must be above 0 and at most 1"),
        ({1: Growth(images=1.5)}, "the fraction of images from epoch 1 on is 1.5: it must be above 0 and at most 1"),
        (
            {1: Growth(images=0.5)},
            r"before epoch 1 the training images would go from 1438 to 7\d\d: data can only grow",
        ),
        (
            {0: Growth(images=0.6), 2: Growth(images=0.5)},
            r"before epoch 2 the training images would go from 8\d\d to 7\d\d: data can only grow",
        ),
        ({2: Growth(widen=0.5)}, "a widening factor must be at least 1, not 0.5"),
        ({2: Growth(deepen=["7"])}, "unknown layer '7'"),
        ({1: Growth(widen=2.0), 2: Growth(widen={"0": 20})}, "width of '0' must be at least its 24 channels, not 20"),
        ({1: 1.5}, r"grow is a mapping from epochs to surgery.Growth, not \{1: 1.5\}"),
        ([Growth(widen=2.0)], r"grow is a mapping from epochs to surgery.Growth, not \["),
        ({1.0: Growth(widen=2.0)}, "grow has epoch 1.0: this training has epochs 0 to 2"),
        ({2: Growth(widen=2.0, state="none")}, "unknown state of new channels 'none'"),
    ],
)
def test_an_impossible_growth_is_refused_before_the_training(digits, grow, message):
    def no_step(*_):
        raise AssertionError("training began")

    with pytest.raises(surgery.UsageError, match=message):
        train(plain(), digits, epochs=3, grow=grow, loss_fn=no_step)


def test_batch_statistics_need_more_than_one_image(digits):
    one_class = replace(digits, train=TensorDataset(torch.zeros(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64)))
    with pytest.raises(surgery.UsageError, match="from epoch 0 on there would be 1 training images: 2 are needed"):
        train(plain(), one_class, epochs=1, grow={0: Growth(images=0.2)})


def test_a_model_that_was_not_traced_cannot_grow(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(surgery.UsageError, match="Sequential is not a traced module: pass it through surgery"):
        train(model, digits, epochs=2, grow={1: Growth(widen=2.0)})
