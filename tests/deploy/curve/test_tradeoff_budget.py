"""Budgets among the candidates of a tradeoff."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import nn

import surgery
from surgery.deploy.compress.recovery import hold_out, recover, recovery_rate
from surgery.deploy.curve.tradeoff import tradeoff
from surgery.deploy.measure.benchmark import compare
from surgery.errors import EditError, UsageError
from surgery.settings import TradeoffSettings
from surgery.training.data.data import load_data
from tests.helpers import assert_same


def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(1024, 10),
        )  # fmt: skip


OPTIONS = {"dataset": "digits", "epochs": 1, "finetune_epochs": 1, "limit": 64, "threads": 1, "rates": [1.0]}


@pytest.fixture(scope="module", autouse=True)
def measured_in_passing():
    """How models are timed is not what is tested here."""
    brief = {"min_seconds": 0, "warmup": 0.01, "memory": False, "min_runs": 5}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("curve.tradeoff", "budget.clock"):
            patch.setattr(
                f"surgery.deploy.{module}.compare", lambda files, **given: compare(files, **{**given, **brief})
            )
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("budgets") / "demo"
    budgets = ["params=6k", "macs=50k", "latency=1s"]
    return tradeoff(tiny(), candidates=budgets, importance="magnitude", directory=out, **OPTIONS), out


def test_models_are_slimmed_to_budgets_and_trained_on(run):
    result, out = run
    dense, params, macs, latency = result.points
    assert [point.name for point in result.points] == ["1", "params=6k", "macs=50k", "latency=1s"]
    assert 5400 <= params.params == params.takes <= 6000
    assert 40_000 <= macs.macs == macs.takes <= 50_000
    assert dense.budget is None
    assert dense.takes is None
    assert latency.takes == latency.latency.p50_ms
    assert latency.params == dense.params  # a second is long enough
    assert not any(point.over for point in result.points)
    assert all(len(point.history.epochs) == 1 for point in result.points)
    assert surgery.cost(surgery.load(out / "params=6k", model=tiny())).params == params.params


def test_the_report_says_what_was_predicted_and_what_was_measured(run):
    result, out = run
    stored = json.loads((out / "tradeoff.json").read_text())["points"][1]["budget"]
    assert stored["limit"] == 6000
    assert stored["measured"] == stored["takes"] == result.points[1].params
    assert stored["importance"] == "magnitude"
    text = (out / "report.md").read_text()
    assert "| budget | dense model | predicted | measured then | in this run |" in text
    assert "- params=6k: " in text
    assert "- latency=1s: all as they were." in text
    assert "with the largest weights were carved out of it" in text
    assert '"budget", "6.00 k"' in (out / "tradeoff.html").read_text()


def test_the_search_for_widths_is_not_repeated(run, tmp_path, monkeypatch):
    def search(*_, **__):
        raise AssertionError("searched again")

    monkeypatch.setattr("surgery.deploy.curve.candidate_training.slim_to_budget", search)
    options = {**OPTIONS, "importance": "magnitude", "reuse": [run[1]]}
    again = tradeoff(tiny(), candidates=["params=6k"], directory=tmp_path / "again", **options)
    assert again.reused == ("dense", "1", "params=6k")
    assert again.points[1].budget == {**run[0].points[1].budget}
    with pytest.raises(AssertionError, match="searched again"):
        tradeoff(tiny(), candidates=["params=7k"], directory=tmp_path / "other", **options)


def test_a_model_above_its_budget_is_reported(run):
    point = run[0].points[3]
    slower = {**point.budget, "limit": point.latency.p50_ms / 2}
    assert replace(point, budget=slower).over


def test_a_criterion_on_data_looks_at_the_training_images(tmp_path):
    options = {**OPTIONS, "rates": [0.5], "finetune_epochs": 0}
    result = tradeoff(tiny(), candidates=["params=6k"], importance="taylor", directory=tmp_path / "out", **options)
    dense = surgery.load(tmp_path / "out" / "dense", model=tiny())
    data = surgery.data_for({"the model": dense}, "digits", limit=64)
    slim = surgery.slim(dense, 0.5, importance=surgery.Importance("taylor", data)).state_dict()
    made = surgery.load(tmp_path / "out" / "rate-0.5", model=tiny()).state_dict()
    assert all(torch.allclose(tensor, made[name]) for name, tensor in slim.items())
    assert result.points[1].budget["importance"] == "taylor"


def test_an_unknown_importance_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(UsageError, match="unknown importance 'size'"):
        tradeoff(tiny(), importance="size", directory=tmp_path / "out", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "params=100",
            "no model of these widths keeps to 100 parameters: the smallest, 0.125 of every width, takes 13",
        ),
        ("latency=0.001us", r"keeps to 1e-06 ms: .* takes [0-9.e-]+ ms; allow more, or begin with a smaller model$"),
    ],
    ids=["params", "latency"],
)
def test_a_budget_that_no_model_keeps_to_is_refused_before_anything_is_trained(tmp_path, text, message):
    told = []
    with pytest.raises(EditError, match=message):
        tradeoff(
            tiny(),
            candidates=[text],
            directory=tmp_path / "out",
            progress=lambda task, *_: told.append(task),
            **OPTIONS,
        )
    assert set(told) == {"check budgets", "all"}
    assert list(tmp_path.iterdir()) == []


def test_the_search_moves_the_progress_of_the_run(tmp_path):
    told = []

    def progress(task, done, total):
        if task == "params=6k: search":
            told.append(done / total)

    options = {**OPTIONS, "epochs": 0, "finetune_epochs": 0, "rates": []}
    tradeoff(tiny(), candidates=["params=6k"], directory=tmp_path / "out", progress=progress, **options)
    assert told == sorted(told)
    assert len({share for share in told if 0 < share < 0.5}) > 2  # the damage, and then
    assert len({share for share in told if 0.5 < share < 1}) >= 1  # the search


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Candidates that are compensated and recovered as `surgery.compress` does."""
    out = tmp_path_factory.mktemp("method") / "demo"
    given = {**OPTIONS, "limit": 200, "rates": [0.5], "finetune_epochs": 2}
    settings = TradeoffSettings(method="compress", **{k: v for k, v in given.items() if k in FIELDS})
    trained = surgery.train(tiny(), load_data("digits", limit=200), epochs=3, lr=0.02).module
    rest = {k: v for k, v in given.items() if k not in FIELDS}
    run = partial(tradeoff, trained, candidates=["macs=0.5"], settings=replace(settings, epochs=0), **rest)
    return run, run(directory=out), out, trained


FIELDS = {one.name for one in fields(TradeoffSettings)}


def test_the_method_compress_fits_candidates_and_recovers_them(compressed):
    _, result, out, trained = compressed
    data = load_data("digits", limit=200)
    settings = result.settings.compressing()
    split = hold_out(data, settings)
    for point, made in (
        (result.points[0], surgery.slim(surgery.classifier(trained, data), 0.5, calibration=split)),
        (
            result.points[1],
            surgery.slim_to_budget(
                surgery.classifier(trained, data), macs=result.points[1].budget["limit"], data=split, calibration=split
            ).module,
        ),
    ):
        assert [type(step).__name__ for step in surgery.recipe(made).steps] == ["Reindex", "Compensate"]
        student = surgery.load(out / point.folder, model=tiny())
        assert surgery.recipe(student).steps == surgery.recipe(made).steps
        before, whole = (surgery.evaluate(one, split.test) for one in (made, trained))
        lr = recovery_rate(whole, before, settings)
        recovered = recover(
            made,
            surgery.classifier(trained, data),
            split,
            settings,
            step=1,
            lr=lr,
            before=before,
            hints={},
            checkpoint=None,
            progress=None,
        )
        assert_same(student, recovered.module)
        assert [epoch.loss for epoch in point.history.epochs] == [e.loss for e in recovered.history.epochs]
    assert "fitted to it on training images, then trained for at most 2 more" in (out / "report.md").read_text()


def test_what_the_method_trained_is_taken_over_and_not_taken_for_another(compressed, tmp_path):
    run, result, out, _ = compressed
    again = run(directory=tmp_path / "again", reuse=[out])
    assert set(again.reused) == {"0.5", "macs=0.5"}
    assert [point.score for point in again.points] == [point.score for point in result.points]
    plain = run(directory=tmp_path / "plain", reuse=[out], method="finetune")
    assert plain.reused == ()


def test_the_method_compress_is_for_slim_candidates_alone(tmp_path):
    given = {"directory": tmp_path / "x", **OPTIONS, "method": "compress"}
    with pytest.raises(UsageError, match=r"the method compress is for slim candidates: leave out 'widen=1\.5'"):
        tradeoff(tiny(), candidates=["widen=1.5"], **given)
    with pytest.raises(UsageError, match="method is compress, where the dense model teaches: leave out teach, kd"):
        tradeoff(tiny(), teach="kd", **given)
