"""Early stopping: what is progress, which epoch is kept, and that a training that resumes ends where it would have."""

from __future__ import annotations

from dataclasses import replace

import pytest

import surgery
from surgery.training.history import Epoch, Score
from surgery.training.loop import Course, take_course
from surgery.training.stopping import EarlyStopping
from tests.helpers import assert_same, killed_after

DIGITS = 200


def epochs(*correct: int, total: int = 100) -> list[Epoch]:
    return [Epoch(10, 1.0, 0.1, Score(one, total), 1.0) for one in correct]


def lengths(rule: EarlyStopping, *correct: int, total: int = 100) -> int:
    """After how many of these epochs a training ends."""
    found = epochs(*correct, total=total)
    return next((n for n in range(1, len(found) + 1) if rule.ends(found[:n])), len(found))


def test_a_rise_within_the_interval_is_no_progress():
    assert Score(50, 100).interval()[1] == pytest.approx(0.596, abs=1e-3)
    assert lengths(EarlyStopping(2, Score(50, 100)), 55, 59, 60, 61, 62) == 2
    assert lengths(EarlyStopping(2, Score(50, 100)), 55, 60, 61, 62, 63) == 4
    assert (
        lengths(EarlyStopping(2, Score(500, 1000)), 550, 590, 600, 610, 620, total=1000) == 4
    )  # more images tell more


def test_small_rises_add_up_from_the_last_progress():
    assert lengths(EarlyStopping(3, Score(50, 100)), 54, 57, 60, 63, 66, 69) == 6
    assert lengths(EarlyStopping(2), 10, 10, 10, 10) == 3  # without a score before, the first epoch is progress


def test_the_best_epoch_is_kept_of_equal_ones_the_last_and_none_if_all_are_worse():
    assert EarlyStopping(2, Score(50, 100)).best(epochs(40, 60, 55, 60, 59)) == 4
    assert EarlyStopping(2, Score(61, 100)).best(epochs(40, 60, 55)) == 0
    assert EarlyStopping(2, Score(60, 100)).best(epochs(40, 60, 55)) == 2
    assert EarlyStopping(2).best(epochs(40)) == 1


def test_patience_is_a_whole_number():
    with pytest.raises(surgery.UsageError, match="patience"):
        EarlyStopping(0)


SETTINGS = surgery.TrainSettings(epochs=6, lr=0.1, schedule="constant", batch_size=16)


def scores(history: surgery.History) -> list[int]:
    return [epoch.score.correct for epoch in history.epochs]


def test_a_training_returns_the_weights_of_its_best_epoch(model, digits):
    rule = EarlyStopping(6, Score(0, 200))
    found = take_course(model, digits, SETTINGS, Course(stopping=rule))
    best = rule.best(found.epochs)
    assert surgery.evaluate(found.module, digits.test).correct == max(scores(found)) == scores(found)[best - 1]
    plain = surgery.train(model, digits, replace(SETTINGS, test_each_epoch=True))
    assert scores(plain) == scores(found)
    cut = surgery.train(model, digits, SETTINGS, last_step=found.steps // 6 * best).module
    assert_same(found.module, cut)


def test_a_training_that_does_harm_returns_the_model_as_it_was(model, digits):
    settings = replace(SETTINGS, lr=1e-6)
    found = take_course(model, digits, settings, Course(stopping=EarlyStopping(2, Score(200, 200))))
    assert len(found.epochs) == 2
    assert found.steps == 2 * (200 // 16)
    assert_same(found.module, model)


@pytest.mark.parametrize("steps", [5, 13, 30])
def test_a_training_that_resumes_ends_where_it_would_have(model, digits, tmp_path, steps):
    course = Course(stopping=EarlyStopping(2, Score(20, 200)), checkpoint=tmp_path / "model.pt")
    whole = take_course(model, digits, SETTINGS, replace(course, checkpoint=None))
    assert len(whole.epochs) < SETTINGS.epochs
    with pytest.raises(KeyboardInterrupt):
        take_course(model, digits, replace(SETTINGS, checkpoint_every=5), replace(course, progress=killed_after(steps)))
    for _ in range(2):  # the second time it is finished
        found = take_course(model, digits, SETTINGS, course)
        assert_same(found.module, whole.module)
        assert (scores(found), found.steps) == (scores(whole), whole.steps)


def test_the_best_weights_survive_an_interruption_of_a_worse_epoch(model, digits, tmp_path):
    """The first epoch is the best: later ones have a rate that ruins them."""
    settings = replace(SETTINGS, lr=3.0, schedule="warmup-cosine")
    course = Course(stopping=EarlyStopping(3, Score(0, 200)), checkpoint=tmp_path / "model.pt")
    whole = take_course(model, digits, settings, replace(course, checkpoint=None))
    assert course.stopping.best(whole.epochs) < len(whole.epochs)
    with pytest.raises(KeyboardInterrupt):
        take_course(model, digits, settings, replace(course, progress=killed_after(12 * len(whole.epochs) - 3)))
    assert_same(take_course(model, digits, settings, course).module, whole.module)


def test_another_rule_is_another_training(model, digits, tmp_path):
    course = Course(stopping=EarlyStopping(1, Score(200, 200)), checkpoint=tmp_path / "model.pt")
    take_course(model, digits, SETTINGS, course)
    for other in (EarlyStopping(2, Score(200, 200)), None):
        with pytest.raises(surgery.UsageError, match="another training, with stopping"):
            take_course(model, digits, SETTINGS, replace(course, stopping=other))


def test_a_distillation_ends_early(model, digits):
    thin = surgery.slim(model, 0.5)
    found = surgery.distill(
        thin, model, digits, epochs=9, hint_epochs=0, lr=1e-6, stopping=surgery.EarlyStopping(2), batch_size=50
    )
    assert len(found.history.epochs) == 2
    assert found.score.correct == max(found.before.correct, *scores(found.history))
    assert found.module.state_dict().keys() == thin.state_dict().keys()
