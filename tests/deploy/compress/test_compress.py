"""From a model and data to a student: the budget is kept, each part is what it says, and a run that was cut off ends
in the same student."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import surgery
from surgery.deploy.compress.recovery import hold_out, recovery_rate
from surgery.settings import CompressSettings
from surgery.training.data.data import Derived
from surgery.training.history import Score
from tests.helpers import assert_same
from tests.zoo import digits_net

DIGITS = 500
SHORT = {"epochs": 2, "lr": 3e-3, "lr_least": 0.5, "batch_size": 32}


@pytest.fixture(scope="module")
def dense(digits) -> nn.Module:
    """A network that knows the digits, traced."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        traced = surgery.trace(digits_net().eval(), torch.zeros(2, 3, 8, 8))
    return surgery.train(traced, digits, epochs=6, lr=0.05).module


@pytest.fixture(scope="module")
def found(dense, digits, tmp_path_factory):
    """A model compressed in two steps, and the folder that was written."""
    out = tmp_path_factory.mktemp("compress") / "student"
    return surgery.compress(dense, digits, macs=0.25, steps=2, out=out, **SHORT), out


@pytest.mark.parametrize(
    ("kind", "amount"), [("macs", 0.3), ("params", 2000), ("params", "40%"), ("bytes", "12kB"), ("macs", "30k")]
)
def test_counts_keep_to_the_budget(dense, digits, kind, amount):
    found = surgery.compress(dense, digits, **{kind: amount}, epochs=0)
    takes = getattr(surgery.cost(found.module), kind)
    whole = getattr(surgery.cost(dense), kind)
    share = {0.3: 0.3 * whole, "40%": 0.4 * whole}
    assert found.limit == share.get(amount, {"macs": 3e4, "params": 2000, "bytes": 12e3}[kind])
    assert 0.8 * found.limit <= takes == found.measured <= found.limit < whole


def test_a_latency_is_measured_by_the_timer(dense, digits):
    def timer(modules):
        return {name: 1 + surgery.cost(module).macs / 1e4 for name, module in modules.items()}

    found = surgery.compress(dense, digits, latency="4ms", steps=2, epochs=0, timer=timer)
    assert found.kind == "latency_ms"
    whole = timer({"": dense})[""]
    assert [step.limit for step in found.steps] == [pytest.approx((whole * 4) ** 0.5), 4]
    assert timer({"": found.module})[""] == pytest.approx(found.measured)
    assert 3.5 <= found.measured <= 4


@pytest.mark.parametrize("steps", [1, 2])
def test_a_share_of_a_latency_is_of_the_dense_models_which_is_measured_once(dense, digits, steps, tmp_path):
    class Drifting:
        """Each measurement takes a little longer than the one before."""

        asked = 0

        def __call__(self, modules):
            self.asked += 1
            slower = 1 + 0.001 * self.asked
            return {name: slower * (1 + surgery.cost(module).macs / 1e4) for name, module in modules.items()}

    def cut_off(task, done, total):
        if task.startswith(f"step {steps}: recover"):
            raise KeyboardInterrupt

    options = {"latency": "60%", "steps": steps, "epochs": 1, "timer": Drifting(), "out": tmp_path / "out"}
    with pytest.raises(KeyboardInterrupt):
        surgery.compress(dense, digits, progress=cut_off, **options)
    asked = options["timer"].asked
    found = surgery.compress(dense, digits, **options)
    again = steps > 1  # the smallest model, before several steps; all else is taken over
    assert options["timer"].asked == asked + again
    assert found.limit == pytest.approx(0.6 * (1 + surgery.cost(dense).macs / 1e4), rel=0.01)
    assert found.measured <= found.limit


def test_one_step_without_training_is_slim_to_budget_with_calibration(dense, digits):
    settings = CompressSettings(epochs=0)
    found = surgery.compress(dense, digits, settings, macs=0.3)
    split = hold_out(digits, settings)
    whole = surgery.slim_to_budget(dense, macs=0.3, data=split, importance="magnitude", calibration=split)
    assert_same(found.module, whole.module)
    assert surgery.recipe(found.module) == surgery.recipe(whole.module)
    assert found.measured == whole.measured
    (step,) = found.steps
    assert step.rates == whole.rates
    assert (step.epochs, step.kept, step.lr, step.history) == (0, 0, None, None)
    plain = surgery.slim(dense, whole.rates, importance="magnitude", round_to=whole.round_to)
    assert step.carved == surgery.evaluate(plain, split.test)
    assert step.compensated == step.recovered == surgery.evaluate(whole.module, split.test)


def test_budgets_shrink_geometrically_and_each_step_keeps_to_its_own(found, dense):
    result, _ = found
    whole = surgery.cost(dense).macs
    assert [step.limit for step in result.steps] == [pytest.approx(0.5 * whole), 0.25 * whole]
    assert all(0.85 * step.limit <= step.measured <= step.limit for step in result.steps)
    assert result.measured == surgery.cost(result.module).macs <= result.limit == 0.25 * whole


def test_the_student_is_better_than_what_was_carved(found, dense, digits):
    result, _ = found
    once = surgery.compress(dense, digits, macs=0.25, **SHORT)
    for one in (result, once):
        assert not one.module.training
        assert one.score == surgery.evaluate(one.module, digits.test)
        assert one.dense_score == surgery.evaluate(dense, digits.test)
    last = once.steps[-1]
    carved = surgery.slim(dense, last.rates, importance="magnitude", round_to=last.round_to)
    assert once.score.accuracy > surgery.evaluate(carved, digits.test).accuracy + 0.1
    assert last.recovered.correct >= last.compensated.correct > last.carved.correct


def test_the_recipe_has_each_carving_and_compensation(found, tmp_path):
    result, out = found
    kinds = [type(step).__name__ for step in surgery.recipe(result.module).steps]
    assert kinds == ["Reindex", "Compensate"] * 2
    loaded = surgery.load(out / "student", model=digits_net())
    assert_same(loaded, result.module)
    assert surgery.recipe(loaded) == surgery.recipe(result.module)
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded(images), result.module(images))
    again = surgery.load(surgery.save(result.module, tmp_path / "again"), model=digits_net())
    assert_same(again, result.module)


def test_an_untraced_model_is_taken_too_and_not_changed(dense, digits):
    plain = digits_net().eval()
    plain.load_state_dict(dense.state_dict())
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in plain.state_dict().items()}
    found = surgery.compress(plain.train(), digits, macs=0.5, epochs=1, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert plain.training
    assert_same(found.module, surgery.compress(dense, digits, macs=0.5, epochs=1, seed=3).module)


class Counted(Derived):
    """Images that count how often they are read."""

    def __init__(self, images):
        super().__init__(images)
        self.reads = [0] * len(images)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.images[index]


def test_the_test_images_are_scored_at_the_end_alone(dense, digits):
    counted = Counted(digits.test)
    reads = []

    def progress(task, done, total):
        reads.append((task, sum(counted.reads)))

    surgery.compress(dense, replace(digits, test=counted), macs=0.5, epochs=1, progress=progress)
    before = [read for task, read in reads if task.startswith("step 1")]
    looked_at = min(before)
    assert max(before) == looked_at  # once, to see what data they are
    assert sum(counted.reads) == looked_at + 2 * len(digits.test)


def test_validation_images_are_of_each_class_and_not_trained_on(digits):
    split = hold_out(digits, CompressSettings(validation=0.2))
    assert isinstance(split.train, Subset)
    assert isinstance(split.test, Subset)
    assert not {*split.train.indices} & {*split.test.indices}
    assert len(split.train) + len(split.test) == len(digits.train)
    assert len(split.test) == pytest.approx(100, abs=8)
    assert {int(split.test[k][1]) for k in range(len(split.test))} == set(range(10))


def test_the_learning_rate_follows_the_damage_that_is_left():
    settings = CompressSettings(lr=1e-3, lr_least=0.1, lr_most=0.8)
    dense = Score(80, 100)
    for correct, share in [
        (80, 0.1),
        (90, 0.1),
        (79.6, 0.1),
        (75, 0.25),
        (60, 0.5),
        (40, 0.5**0.5),
        (10, 0.8),
        (0, 0.8),
    ]:
        assert recovery_rate(dense, Score(correct, 100), settings) == pytest.approx(share * 1e-3)
    assert recovery_rate(Score(0, 100), Score(0, 100), settings) == pytest.approx(0.8e-3)
    usual = surgery.DistillSettings().peak_lr
    assert recovery_rate(dense, Score(0, 100), CompressSettings()) == pytest.approx(5 * usual)
    assert recovery_rate(dense, Score(80, 100), CompressSettings()) == pytest.approx(usual)


def test_each_recovery_has_the_rate_of_its_damage(found):
    result, _ = found
    for step in result.steps:
        assert step.lr == recovery_rate(result.validation, step.compensated, result.settings)
        assert step.history.epochs[0].lr < step.lr


def test_the_epoch_that_is_kept_is_the_best_on_validation_images(found, digits):
    result, _ = found
    step = result.steps[-1]
    scores = [step.compensated, *(epoch.score for epoch in step.history.epochs)]
    assert step.recovered == scores[step.kept]
    assert step.recovered.correct == max(score.correct for score in scores)
    assert surgery.evaluate(result.module, hold_out(digits, result.settings).test) == step.recovered


def test_a_recovery_ends_early_where_nothing_rises(dense, digits):
    found = surgery.compress(dense, digits, macs=0.5, epochs=8, patience=2, lr=1e-7)
    (step,) = found.steps
    assert surgery.EarlyStopping(2, step.compensated).ends(step.history.epochs)
    assert step.epochs < 8


def test_steps_between_take_a_share_of_the_epochs(dense, digits):
    settings = CompressSettings(steps=3, epochs=7)
    assert [settings.epochs_of(step) for step in (1, 2, 3)] == [3, 3, 7]
    assert replace(settings, between_epochs=0).epochs_of(1) == 0
    found = surgery.compress(dense, digits, macs=0.3, steps=2, epochs=1, between_epochs=0)
    assert [step.epochs for step in found.steps] == [0, 1]


@pytest.mark.parametrize(
    ("task", "step"),
    [("step 1: carve", 1000), ("step 1: recover", 800), ("step 2: carve", 0), ("step 2: recover", 800), ("score", 0)],
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_student(found, dense, digits, tmp_path, task, step):
    whole, _ = found
    told: list[tuple[str, int]] = []

    class Told:
        cut = True

        def __call__(self, at, done, total):
            if self.cut and (at, done >= step) == (task, True):
                raise KeyboardInterrupt

        def epoch(self, at, number, figures):
            told.append((at, number))

    progress = Told()
    given = {"macs": 0.25, "steps": 2, "out": tmp_path / "student", "progress": progress, **SHORT}
    with pytest.raises(KeyboardInterrupt):
        surgery.compress(dense, digits, **given)
    assert not (tmp_path / "student").exists()
    progress.cut = False
    result = surgery.compress(dense, digits, **given)
    assert_same(result.module, whole.module)
    assert surgery.recipe(result.module) == surgery.recipe(whole.module)
    assert without_times(result.to_dict()) == without_times(whole.to_dict())
    assert len(told) == len({*told}) == sum(step.epochs for step in whole.steps)  # no epoch is trained twice
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def without_times(content):
    """The figures of a result that do not differ from one run to the next."""
    plain = {key: value for key, value in content.items() if key not in ("seconds", "environment", "command")}
    for step in plain["steps"]:
        for epoch in step["history"]["epochs"]:
            epoch["seconds"] = 0
    return plain


def test_the_folder_has_the_student_the_figures_and_a_page(found):
    result, out = found
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert names == [
        *("history.csv", "report.md", "results.json"),
        *("student/recipe.json", "student/weights.safetensors"),
    ]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    page = (out / "report.md").read_text()
    assert f"{result.score.accuracy:.2%}" in page
    assert "| 2 | " in page
    rows = (out / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(step.epochs for step in result.steps)
    assert rows[-1].startswith("step 2,2,")


def test_with_onnx_both_files_are_written_and_timed(dense, digits, tmp_path, monkeypatch):
    brief = {"min_seconds": 0, "warmup": 0.01, "memory": False, "min_runs": 5}
    compare = surgery.compare
    monkeypatch.setattr(
        "surgery.deploy.compress.compress.compare", lambda files, **given: compare(files, **{**given, **brief})
    )
    out = tmp_path / "student"
    found = surgery.compress(dense, digits, macs=0.5, epochs=0, onnx=True, out=out)
    assert {path.name for path in out.glob("*.onnx")} == {"dense.onnx", "student.onnx"}
    assert found.timing is not None
    assert found.timing.results.keys() == {"dense", "student"}
    assert "| p50 ms | speed-up |" in (out / "report.md").read_text()


def test_a_budget_that_is_kept_already_carves_nothing(dense, digits):
    found = surgery.compress(dense, digits, macs="1G", steps=2, epochs=0)
    assert_same(found.module, dense)
    assert found.doubts == ("nothing was carved: the model keeps to the budget as it is",)


class Noisy(Dataset):
    """Images that change from one reading to the next."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.randn(3, 8, 8), index % 10


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one budget, of macs, params, bytes, latency, not 0"),
        ({"macs": 0.5, "params": 0.5}, "give one budget, of macs, params, bytes, latency, not 2"),
        ({"macs": "much"}, "a budget of macs is a number above 0"),
        ({"macs": 0.5, "onnx": True}, "onnx is for files"),
        ({"macs": 0.5, "steps": 0}, "steps must be a whole number of at least 1"),
        ({"macs": 0.5, "lr_least": 0.9, "lr_most": 0.5}, "lr_least is 0.9: it must be at most lr_most, 0.5"),
        ({"macs": 0.5, "validation": 1.0}, "validation must be a number above 0 and below 1"),
        ({"macs": 0.5, "importance": "luck"}, "unknown importance 'luck'"),
        ({"macs": 0.5, "validation": 0.999}, "are left to train on"),
    ],
)
def test_what_cannot_be_done_is_refused(dense, digits, given, said):
    with pytest.raises(surgery.UsageError, match=said):
        surgery.compress(dense, digits, **given)


def test_data_that_cannot_decide_are_refused(dense, digits):
    with pytest.raises(surgery.UsageError, match="has no test images"):
        surgery.compress(dense, replace(digits, test=Subset(digits.test, [])), macs=0.5)
    with pytest.raises(surgery.UsageError, match="change from one reading to the next"):
        surgery.compress(dense, (Noisy(), Noisy()), macs=0.5)


def test_a_budget_out_of_reach_is_refused_before_anything_is_trained(dense, digits, tmp_path):
    told = []
    for steps in (1, 3):
        with pytest.raises(surgery.EditError, match="no model of these widths keeps to 100 parameters"):
            surgery.compress(
                dense, digits, params=100, steps=steps, out=tmp_path / "x", progress=lambda *one: told.append(one[0])
            )
    assert not any("recover" in task for task in told)
    assert list(Path(tmp_path).iterdir()) == []
