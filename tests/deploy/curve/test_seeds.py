"""Candidates that are trained with several seeds: means, intervals over seeds, and differences paired by seed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

import surgery
from surgery.cli.measure import _curve_table
from surgery.deploy.curve.html import page
from surgery.deploy.curve.plot import draw
from surgery.deploy.curve.seeds import Repeat, estimate, paired
from surgery.deploy.curve.tradeoff import tradeoff
from surgery.errors import UsageError
from surgery.settings import TradeoffSettings
from surgery.training.history import Score
from tests.deploy.curve.test_tradeoff_page import content, curve, point, report_of
from tests.deploy.curve.test_tradeoff_reuse import Steps, tiny

OPTIONS = {
    "dataset": "digits", "epochs": 1, "finetune_epochs": 1, "lr": 0.1, "limit": 128, "threads": 1, "rates": [1.0, 0.5],
    "seed": 4,
}  # fmt: skip


def test_means_and_intervals_are_students():
    values, others = [0.91, 0.95, 0.92, 0.97], [0.90, 0.93, 0.93, 0.92]
    found, apart = estimate(values), paired(values, others)
    expected = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    test = stats.ttest_rel(values, others)
    assert (apart.low, apart.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert apart.mean == pytest.approx(0.0175)
    assert estimate([0.5, 0.5]).high == 0.5


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """A run of three seeds that is interrupted in the second seed of the second candidate, and resumed."""
    out, first, second = tmp_path_factory.mktemp("seeds") / "out", Steps("rate-0.5: fine-tune, seed 5", 1), Steps()
    options = {**OPTIONS, "control": "scratch", "seeds": 3, "directory": out}
    with pytest.raises(KeyboardInterrupt):
        tradeoff(tiny(), progress=first, **options)
    table = (out.parent / "out.unfinished" / "history.csv").read_text().splitlines()
    assert list(dict.fromkeys(row["task"] for row in csv.DictReader(table))) == list(first.trained())[:-1]
    result = tradeoff(tiny(), progress=second, **options)
    return result, out, first, second


def test_each_seed_is_trained_once_however_often_the_run_is_cut_off(seeded):
    _, out, first, second = seeded
    kinds = [f"{kind}{also}" for also in ("", ", seed 5", ", seed 6") for kind in ("fine-tune", "from scratch")]
    tasks = ["train dense", *(f"rate-1: {one}" for one in kinds), *(f"rate-0.5: {one}" for one in kinds)]
    cut = tasks.index("rate-0.5: fine-tune, seed 5")
    assert list(first.trained()) == tasks[: cut + 1]
    assert list(second.trained()) == tasks[cut:]
    names = [f"rate-{rate}{kind}{seed}" for rate in ("1", "0.5") for kind in ("", "-scratch")
             for seed in ("", "-seed-5", "-seed-6")]  # fmt: skip
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"dense", *names}


def test_each_model_is_what_training_with_its_seed_gives(seeded):
    result, out, *_ = seeded
    data = surgery.load_data("digits", limit=128)
    dense = surgery.load(out / "dense", tiny(), allow_changed_weights=True)
    slim = result.points[1]
    assert [one.seed for one in slim.repeats] == [5, 6]
    for seed, folder, score in zip((4, 5, 6), ("", "-seed-5", "-seed-6"), slim.scores, strict=True):
        expected = surgery.train(surgery.slim(dense, 0.5), data, epochs=1, lr=0.1, seed=seed).module
        made = surgery.load(out / f"rate-0.5{folder}", tiny(), allow_changed_weights=True)
        ours = made.state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in expected.state_dict().items())
        assert surgery.evaluate(made, data.test) == score
        scratch = surgery.load(out / f"rate-0.5-scratch{folder}", tiny(), allow_changed_weights=True)
        assert surgery.evaluate(scratch, data.test) == slim.controls[seed - 4]


def test_figures_are_means_with_intervals_over_seeds(seeded):
    result, out, *_ = seeded
    with (out / "tradeoff.csv").open() as file:
        rows = list(csv.DictReader(file))
    for one, row in zip(result.points, rows, strict=True):
        expected = [score.accuracy for score in one.scores]
        low, high = stats.t.interval(0.95, 2, loc=sum(expected) / 3, scale=stats.sem(expected))
        assert float(row["accuracy"]) == pytest.approx(sum(expected) / 3)
        assert (float(row["accuracy_low"]), float(row["accuracy_high"])) == pytest.approx((max(low, 0), min(high, 1)))
        assert int(row["correct"]) / int(row["tested"]) == pytest.approx(float(row["accuracy"]))
        assert int(row["seeds"]) == 3
        assert float(row["scratch_accuracy"]) == pytest.approx(sum(score.accuracy for score in one.controls) / 3)
    ours, theirs = ([score.accuracy for score in one.scores] for one in result.points)
    assert rows[0]["difference"] == ""
    found = [float(rows[1][name]) for name in ("difference_low", "difference_high")]
    assert found == pytest.approx(list(stats.ttest_rel(theirs, ours).confidence_interval(0.95)))
    told = json.loads((out / "tradeoff.json").read_text())["points"][1]["repeats"]
    assert [one["seed"] for one in told] == [5, 6]
    assert [one["score"]["correct"] for one in told] == [score.correct for score in result.points[1].scores[1:]]
    tasks = {row["task"] for row in csv.DictReader((out / "history.csv").read_text().splitlines())}
    assert {"rate-1: train", "rate-1, seed 6: train", "rate-0.5, seed 5: from scratch"} <= tasks
    report = (out / "report.md").read_text()
    assert "as the mean over 3 trainings of each candidate, with seeds 4 to 6, all from the same dense model" in report
    assert "| seeds of each candidate | 4, 5, 6 |" in report
    assert "| accuracy | 95% interval | points to 1 | from scratch |" in report


def test_a_run_of_more_seeds_takes_over_what_one_of_fewer_has_trained(seeded, tmp_path):
    _, out, *_ = seeded
    steps = Steps()
    result = tradeoff(
        tiny(), directory=tmp_path / "more", reuse=[out], progress=steps, **{**OPTIONS, "rates": [0.5], "seeds": 4}
    )
    assert list(steps.trained()) == ["rate-0.5: fine-tune, seed 7"]
    assert result.reused == ("dense", "0.5", "0.5, seed 5", "0.5, seed 6")


@pytest.fixture
def given():
    """A curve whose second point is 5 and 7 points below the first, with two seeds."""
    plain = curve()
    repeats = [(Repeat(1, Score(correct, 1000), {}),) for correct in (970, 900)]
    points = (point("1", 950, 4.0), point("0.5", 900, 2.0))
    points = tuple(replace(one, repeats=more) for one, more in zip(points, repeats, strict=True))
    return replace(plain, points=points, settings=replace(plain.settings, seeds=2))


def test_the_page_the_report_and_the_table_show_means_and_intervals_over_seeds(given, tmp_path, monkeypatch):
    first, second = content(page(given))["points"]
    assert (first["accuracy"]["at"], second["accuracy"]["at"]) == (0.96, 0.9)
    told = dict(second["told"])
    assert told["with 2 seeds"] == "90.00%, 90.00%"
    assert told["points to 1"].startswith("-6.00 (")
    assert "with 2 seeds" in dict(first["told"])
    assert "points to 1" not in dict(first["told"])
    assert content(page(given))["bars"] == "accuracy (bars: 95% interval over seeds)"
    report = report_of(given, tmp_path)
    assert "| 90.00% | 90.0% – 90.0% | -6.00 (-18.7 – +6.7) |" in report
    assert "2 seeds" in given.conditions
    labels, bars = [], []
    original = Axes.errorbar

    def errorbar(self, x, y, **options):
        bars.append((y, options["yerr"]))
        return original(self, x, y, **options)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    monkeypatch.setattr(Figure, "savefig", lambda self, path: labels.append(self.axes[0].get_ylabel()))
    draw(given, tmp_path / "a.png")
    assert labels == ["accuracy (mean; bars: 95% interval over 2 seeds)"]
    assert [y for y, _ in bars] == [[0.96], [0.9]]
    assert bars[0][1][0][0] == pytest.approx(stats.t.ppf(0.975, 1) * 0.01)
    console = Console(file=StringIO(), width=200)
    console.print(_curve_table(given))
    assert "over 2 seeds" in console.file.getvalue()


def test_the_front_is_that_of_the_means(given):
    assert [one.name for one in given.front] == ["0.5", "1"]
    better = replace(given.points[1], repeats=(Repeat(1, Score(1000, 1000), {}),) * 3)
    assert [one.name for one in replace(given, points=(given.points[0], better)).front] == ["0.5"]


def test_one_seed_adds_nothing(given):
    single = replace(given, points=tuple(replace(one, repeats=()) for one in given.points))
    assert not {"seeds", "difference"} & single.rows()[0].keys()
    assert single.points[0].interval == single.points[0].score.interval()
    assert "repeats" not in single.to_dict()["points"][0]
    assert content(page(single))["bars"] == "accuracy (bars: 95% interval)"


def test_seeds_without_training_are_refused():
    with pytest.raises(UsageError, match="seeds is 3, and finetune_epochs 0: without training all seeds give the same"):
        TradeoffSettings(seeds=3, finetune_epochs=0)
