"""Distillation from end to end: two stages, the joint variant, caches, breaks and several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import surgery
from surgery import distill
from surgery.layers.maxout import Maxout
from surgery.training.data.data import load_data
from surgery.training.distilling import distill as distilling
from surgery.training.distilling.objectives import DKD, KD, RKD, Hint
from surgery.training.evaluation import evaluate
from surgery.training.loop import take_course, train
from tests.helpers import assert_same, killed_after
from tests.training.test_engine import run

DIGITS = 260


def traced(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return surgery.trace(make().eval(), torch.zeros(2, 3, 8, 8))


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Flatten(), nn.Linear(768, 10),
    )  # fmt: skip


def thin() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), Maxout(2), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(digits):
    model = traced(wide)
    model = train(model, load_data("digits"), epochs=3, lr=0.05).module
    assert evaluate(model, digits.test).accuracy > 0.9
    return model


SMALL = {"hint_epochs": 2, "epochs": 2, "guided": "4", "hint": "3", "lr": 0.01}


def test_a_student_learns_in_two_stages(digits, teacher):
    student = traced(thin)
    ours, theirs = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = distill(student, teacher, digits, **{**SMALL, "hint_epochs": 8, "epochs": 12})
    assert torch.equal(torch.rand(1), expected)
    assert found.names == (("4", "3"),)
    assert found.hints.epochs[-1].loss < 0.7 * found.hints.epochs[0].loss
    assert found.history.epochs[-1].loss < found.history.epochs[0].loss
    assert found.teacher_score == evaluate(teacher, digits.test)
    assert found.before == evaluate(student, digits.test)
    assert found.score == evaluate(found.module, digits.test)
    assert found.before.accuracy < 0.3 < 0.8 < found.score.accuracy
    assert found.module.state_dict().keys() == student.state_dict().keys()
    assert str(found.module.graph) == str(student.graph)
    assert not found.module.training
    for module, before in ((student, ours), (teacher, theirs)):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert all(parameter.requires_grad for parameter in module.parameters())
    report = found.to_dict()
    assert report["score"] == {"correct": found.score.correct, "total": 260}
    assert len(report["hints"]["epochs"]) == 8
    assert report["seconds"] > 0


def test_stage_one_trains_the_guided_prefix_alone(digits, teacher):
    student = traced(thin)
    found = distill(student, teacher, digits, **{**SMALL, "epochs": 0})
    assert found.history is None
    moved = {
        name for name, value in found.module.state_dict().items() if not torch.equal(value, student.state_dict()[name])
    }
    assert moved == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_stage_two_begins_with_the_weights_of_stage_one(digits, teacher):
    """With the rate so small that nothing moves, what comes out is what stage 1 gave."""
    student = traced(thin)
    one = distill(student, teacher, digits, **{**SMALL, "epochs": 0, "hint_lr": 0.01})
    both = distill(student, teacher, digits, **{**SMALL, "epochs": 1, "hint_lr": 0.01, "lr": 1e-12})
    assert torch.allclose(both.module.state_dict()["3.weight"], one.module.state_dict()["3.weight"], atol=1e-8)
    assert not torch.allclose(both.module.state_dict()["3.weight"], student.state_dict()["3.weight"], atol=1e-4)


@pytest.mark.parametrize(
    "objectives",
    [
        (KD(form="divergence", standardise=True),),
        (DKD(warmup_epochs=0), RKD()),
        (KD(), Hint(guided="4", hint="3", weight=0.1)),
    ],
    ids=str,
)
def test_objectives_are_learned_next_to_labels(digits, teacher, objectives):
    student = traced(thin)
    found = distill(student, teacher, digits, hint_epochs=0, epochs=6, objectives=objectives, lr=0.01)
    assert found.hints is None
    assert found.names == ()
    assert found.history.epochs[-1].loss < found.history.epochs[0].loss
    assert found.module.state_dict().keys() == student.state_dict().keys()
    assert found.score.accuracy > 0.3


def test_without_objectives_it_is_plain_training(digits, teacher):
    student = traced(thin)
    found = distill(student, teacher, digits, hint_epochs=0, epochs=2, objectives=(), label_smoothing=0.1)
    student = train(student, digits, epochs=2, optimizer="adamw", label_smoothing=0.1).module
    assert_same(found.module, student)


def test_the_weight_of_labels_may_be_zero(digits, teacher):
    student = traced(thin)
    given = distill(student, teacher, digits, hint_epochs=0, epochs=1, label_weight=0.0)
    images = [(image, (label + 3) % 10) for image, label in digits.train]
    wrong = surgery.training.data.data.Data("own", images, digits.test, digits.classes, 8, digits.normalisation)
    assert_same(given.module, distill(student, teacher, wrong, hint_epochs=0, epochs=1, label_weight=0.0).module)


@pytest.mark.parametrize("objectives", [(KD(),), (KD(), Hint(guided="4", hint="3"))], ids=["kd", "joint"])
def test_cached_outputs_teach_the_same(digits, teacher, objectives, tmp_path):
    student, settings = traced(thin), {**SMALL, "objectives": objectives}
    results = [
        distill(student, teacher, digits, cache=cache, **settings)
        for cache in ("none", "memory", "auto", tmp_path / "c")
    ]
    for other in results[1:]:
        for stage in ("hints", "history"):
            losses = [[epoch.loss for epoch in getattr(found, stage).epochs] for found in (results[0], other)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["distill", "hints"]


def test_augmented_images_are_not_cached(teacher):
    data = load_data("digits", limit=130, augment="flip")
    student = traced(thin)
    distill(student, teacher, data, **SMALL)
    with pytest.raises(surgery.UsageError, match="the images change from one reading to the next"):
        distill(student, teacher, data, cache="memory", **SMALL)


@pytest.mark.parametrize(("task", "step"), [("hints", 1), ("hints", 5), ("hints", 8), ("distill", 1), ("distill", 7)])
def test_a_killed_distillation_ends_with_the_same_weights(digits, teacher, tmp_path, task, step):
    student = traced(thin)
    settings = {**SMALL, "objectives": (KD(), Hint(guided="4", hint="3", weight=0.1)), "test_each_epoch": True}
    whole = distill(student, teacher, digits, **settings)
    settings.update(checkpoint=tmp_path, checkpoint_every=2)

    def killed(name, done, total):
        if name == task:
            killed_after(step)(name, done, total)

    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, digits, **settings, progress=killed)
    tasks = []
    resumed = distill(student, teacher, digits, **settings, progress=lambda name, *_: tasks.append(name))
    assert_same(resumed.module, whole.module)
    assert resumed.score == whole.score
    assert [epoch.loss for epoch in resumed.hints.epochs] == [epoch.loss for epoch in whole.hints.epochs]
    if task == "distill":
        assert "hints: cache" not in tasks  # the teacher is not asked about a stage that is over
    with pytest.raises(surgery.UsageError, match=r"another training, with label_weight 1\.0 and not 0\.5"):
        distill(student, teacher, digits, label_weight=0.5, **settings)


class Softened(surgery.Objective):
    """A user's objective that is not a dataclass."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def compare(self, student, teacher, seed):
        return KD().compare(student, teacher, seed)

    def loss(self, *values):
        return self.weight * KD().loss(*values)


def test_a_run_with_a_users_objective_resumes_too(digits, teacher, tmp_path):
    student, settings = traced(thin), {"hint_epochs": 0, "epochs": 1, "checkpoint": tmp_path}
    first = distill(student, teacher, digits, objectives=Softened(0.5), **settings)
    assert_same(distill(student, teacher, digits, objectives=Softened(0.5), **settings).module, first.module)
    with pytest.raises(surgery.UsageError, match=r"Softened\(weight=0\.5\)'\] and not \['Softened\(weight=2\.0\)"):
        distill(student, teacher, digits, objectives=Softened(2.0), **settings)


def test_another_teacher_is_another_run(digits, teacher, tmp_path):
    student, other = traced(thin), copy.deepcopy(teacher)
    distill(student, teacher, digits, **SMALL, checkpoint=tmp_path)
    with torch.no_grad():
        other.get_parameter("0.bias").add_(1)
    with pytest.raises(surgery.UsageError, match="another training, with teacher"):
        distill(student, other, digits, **SMALL, checkpoint=tmp_path)


def test_channels_may_be_innermost_in_memory_while_learning(digits, teacher, monkeypatch):
    student, innermost = traced(thin), []
    student.get_submodule("8").p = 0.0  # what is dropped goes by the order in memory

    def watched(network, *args):
        weight = network.get_parameter("0.weight")
        innermost.append(weight.is_contiguous(memory_format=torch.channels_last))
        return take_course(network, *args)

    monkeypatch.setattr(distilling, "take_course", watched)
    settings = {**SMALL, "optimizer": "sgd", "lr": 1e-4, "objectives": (KD(), Hint(guided="4", hint="3", weight=0.1))}
    plain, last = (distill(student, teacher, digits, channels_last=flag, **settings) for flag in (False, True))
    for stage in ("hints", "history"):
        losses = [[epoch.loss for epoch in getattr(found, stage).epochs] for found in (plain, last)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert innermost == [False, False, True, True]
    assert all(value.is_contiguous() for value in last.module.state_dict().values())


def test_mixed_precision(digits, teacher):
    found = distill(traced(thin), teacher, digits, precision="bf16", cache="none", **{**SMALL, "epochs": 8})
    assert found.history.epochs[-1].loss < found.history.epochs[0].loss
    assert {value.dtype for value in found.module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hint_epochs": 1.5}, r"hint_epochs must be a whole number of at least 0, not 1\.5"),
        ({"epochs": -1}, "epochs must be a whole number of at least 0, not -1"),
        ({"hint_epochs": 0, "epochs": 0}, "hint_epochs and epochs are 0: there is nothing to train"),
        ({"label_weight": -1.0}, r"label_weight must be a number of at least 0, not -1\.0"),
        ({"label_weight": "1"}, "label_weight must be a number of at least 0, not '1'"),
        ({"label_weight": 0, "objectives": ()}, "no objectives, and label_weight is 0: there is nothing to learn"),
        ({"label_smoothing": 2}, "label_smoothing must be a number of at least 0 and at most 1, not 2"),
        ({"objectives": "kd"}, r"'k' is not an objective: pass one such as surgery\.KD\(\)"),
        ({"guided": "layer9"}, "layer9"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"cache": ""}, "cache"),
    ],
)
def test_what_cannot_be_is_refused(digits, teacher, settings, message):
    with pytest.raises(surgery.UsageError, match=message):
        distill(traced(thin), teacher, digits, **{**SMALL, **settings})


def test_a_student_without_anything_to_train_is_refused(digits, teacher):
    for student in (traced(thin).requires_grad_(False), traced(lambda: nn.Flatten(1))):
        with pytest.raises(surgery.UsageError, match="no parameter that requires a gradient"):
            distill(student, teacher, digits, **SMALL)


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("hint_epochs", [0, 1])
def test_further_parts_of_items_are_not_used_as_the_teachers_outputs(digits, teacher, cache, hint_epochs):
    student, settings = traced(thin), {**SMALL, "hint_epochs": hint_epochs, "epochs": 1, "cache": cache}
    items = [(image, label, torch.arange(10.0)) for image, label in digits.train]
    expected = distill(student, teacher, digits, **settings)
    assert_same(distill(student, teacher, replace(digits, train=items), **settings).module, expected.module)


def test_one_objective_needs_no_sequence(digits, teacher):
    student, settings = traced(thin), {"hint_epochs": 0, "epochs": 1}
    expected = distill(student, teacher, digits, objectives=[RKD()], **settings)
    assert_same(distill(student, teacher, digits, objectives=RKD(), **settings).module, expected.module)


def test_labels_alone_have_their_weight_too(digits, teacher):
    student, settings = traced(thin), {"hint_epochs": 0, "epochs": 1, "objectives": ()}
    whole, half = (
        distill(student, teacher, digits, optimizer="sgd", momentum=0.0, weight_decay=0.0, **options, **settings)
        for options in ({"lr": 0.01}, {"lr": 0.02, "label_weight": 0.5})
    )
    for name, value in whole.module.state_dict().items():
        assert torch.allclose(half.module.state_dict()[name], value, atol=1e-5)
    assert half.history.epochs[0].loss == pytest.approx(0.5 * whole.history.epochs[0].loss, rel=1e-3)


@pytest.mark.parametrize(
    "around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["inference", "autocast"]
)
def test_the_modes_of_the_caller_do_not_matter(digits, teacher, around):
    student, settings = traced(thin), {**SMALL, "hint_epochs": 1, "epochs": 1}
    expected = distill(student, teacher, digits, **settings)
    with around():
        found = distill(student, teacher, digits, **settings)
    assert_same(found.module, expected.module)
    assert not any(parameter.is_inference() for parameter in found.module.parameters())


IN_PROCESSES = """
import json, sys
import torch
from torch import nn
import surgery
from surgery.layers.maxout import Maxout
from surgery.training.data.data import Data, load_data

def net(width, seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 2 * width, 3), Maxout(2), nn.Conv2d(width, width, 3), nn.ReLU(), nn.Flatten()
    return surgery.trace(nn.Sequential(*layers, nn.Linear(16 * width, 10)).double(), torch.zeros(2, 3, 8, 8).double())

data = load_data("digits", limit=203)
images, tests = ([(image.double(), label) for image, label in part] for part in (data.train, data.test))
data = Data("own", images, tests, data.classes, 8, data.normalisation)
settings = json.loads(sys.argv[2])
objectives = (surgery.KD(), surgery.Hint(weight=0.1))
found = surgery.distill(net(4, 0), net(12, 1), data, hint_epochs=2, epochs=2, objectives=objectives, **settings)
with open(sys.argv[1] + str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0), "w") as file:
    stages = found.hints, found.history
    losses = [[epoch.loss for epoch in stage.epochs] for stage in stages]
    json.dump({"losses": losses, "score": found.score.correct}, file)
"""


def test_two_processes_distill_as_one_does(tmp_path):
    (one,) = run(tmp_path, "one", 1, IN_PROCESSES, cache="memory")
    files = {"cache": str(tmp_path / "cache"), "checkpoint": str(tmp_path / "checkpoint")}
    for process in run(tmp_path, "two", 2, IN_PROCESSES, **files):
        for ours, expected in zip(process["losses"], one["losses"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-12)
        assert process["score"] == one["score"]
