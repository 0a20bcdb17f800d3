"""Candidates of a curve: what text names them, what they become, and how they are trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.deploy.curve.candidates import of_rate, parse, plan_candidates
from surgery.deploy.curve.teaching import Lesson
from surgery.errors import UsageError
from surgery.operations.widen import widen
from surgery.settings import TradeoffSettings
from surgery.training.data.data import load_data


@pytest.fixture(scope="module")
def dense():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 10),
        )
    return surgery.trace(model.eval(), torch.zeros(2, 3, 8, 8))


def widths(module: nn.Module) -> list[int]:
    return [module.get_submodule(name).weight.shape[0] for name in ("0", "2")]


@pytest.mark.parametrize(
    ("text", "name", "folder", "expected"),
    [
        ("0.5", "0.5", "rate-0.5", [4, 8]),
        ("1", "1", "rate-1", [8, 16]),
        ("slim=0.5", "0.5", "rate-0.5", [4, 8]),
        ("0=0.5;2=0.25", "0=0.5;2=0.25", "0=0.5-2=0.25", [4, 4]),
        ("slim:2=0.25", "2=0.25", "2=0.25", [8, 4]),
        ("widen=1.5", "widen=1.5", "widen=1.5", [12, 24]),
        ("widen=2", "widen=2.0", "widen=2.0", [16, 32]),
        (" widen:0=12 + slim:2=0.5", "widen:0=12+slim:2=0.5", "widen-0=12-slim-2=0.5", [12, 8]),
        ("deepen:2=1", "deepen:2=1", "deepen-2=1", [8, 16]),
    ],
)
def test_the_name_of_a_candidate_parses_back(dense, text, name, folder, expected):
    candidate = parse(text)
    assert (candidate.name, candidate.folder) == (name, folder)
    assert parse(candidate.name) == candidate
    made = candidate.apply(dense, round_to=1, seed=0)
    assert widths(made) == expected
    assert made is not dense


def test_growing_a_candidate_keeps_the_function_and_adds_layers(dense):
    x = torch.randn(2, 3, 8, 8)
    grown = parse("widen=1.5+deepen:2=1").apply(dense, round_to=1, seed=0)
    assert torch.allclose(grown(x), dense(x), atol=1e-5)
    assert len(list(grown.parameters())) > len(list(dense.parameters()))


def test_round_to_holds_for_every_operation(dense):
    assert widths(parse("0.3").apply(dense, round_to=4, seed=0)) == [4, 8]
    assert widths(parse("widen=1.3").apply(dense, round_to=4, seed=0)) == widths(widen(dense, 1.3, round_to=4))


def test_rates_for_the_whole_model_come_first_from_1_downwards():
    plan = plan_candidates([0.5, {"2": 0.25}, 1.0], ["widen=1.5", "0.75"])
    assert [candidate.name for candidate in plan] == ["1", "0.75", "0.5", "2=0.25", "widen=1.5"]
    assert [candidate.uniform_rate for candidate in plan] == [1.0, 0.75, 0.5, None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "candidate 'half' is not of the form RATE, LAYER=RATE;LAYER=RATE, OPERATION=NUMBER or "),
        ("=0.5", "candidate '=0.5' is not of the form RATE"),
        ("widen=wide", "candidate 'widen=wide' is not of the form RATE"),
        ("widen=nan", "candidate 'widen=nan' is not of the form RATE"),
        ("widen=inf", "candidate 'widen=inf' is not of the form RATE"),
        ("slim:2=0.5;2=0.25", "candidate 'slim:2=0.5;2=0.25' is not of the form RATE"),
        ("widen:1.5", "candidate 'widen:1.5' is not of the form RATE"),
        ("widen=1.5+thin=0.5", "unknown operation 'thin': one of 'deepen', 'slim', 'widen'"),
        ("slimm:2=0.5", "unknown operation 'slimm'; did you mean 'slim'?"),
        ("deepen=2", "candidate 'deepen=2' does not say where to deepen, as in deepen:layer3=1"),
        ("2=1.5", "split rate 1.5 is outside (0, 1]"),
    ],
)
def test_text_that_is_not_a_candidate_is_refused(text, message):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latency=5ms", ("latency", 5.0, "latency=5ms")),
        ("latency=0.5", ("latency", 0.5, "latency=0.5")),
        ("latency=250us", ("latency", 0.25, "latency=250us")),
        ("macs=1.5G", ("macs", 1.5e9, "macs=1.5G")),
        ("params=300k", ("params", 3e5, "params=300k")),
        ("bytes=12 MiB", ("bytes", 12 * 2**20, "bytes=12-MiB")),
    ],
)
def test_budgets_are_numbers_with_units(text, expected):
    found = parse(text)
    assert (found.what, found.limit) == (expected[0], pytest.approx(expected[1]))
    assert found.folder == expected[2]
    assert parse(found.name) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency=fast", "a budget of latency is a number above 0 with an optional unit (ms, s, us), or a share"),
        ("latency=50%", "a budget of latency for a curve is a time, as in 5ms, not '50%'"),
        ("macs=3ms", "a budget of macs is a number above 0 with an optional unit (k, M, G), or a share"),
        ("params=0", "a budget of params is a number above 0"),
        ("bytes=-3", "a budget of bytes is a number above 0"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


def test_a_candidate_given_twice_is_refused():
    with pytest.raises(UsageError, match=r"candidate 2=0\.5 is given more than once"):
        plan_candidates([{"2": 0.5}], ["slim:2=0.5"])


@pytest.mark.parametrize(
    ("teach", "stages"),
    [
        ("labels", {"train": 2}),
        ("kd", {"distill": 2}),
        ("hints", {"hints": 1, "distill": 2}),
        ("evolve", {"generation-1": 2, "generation-2": 2}),
    ],
)
def test_each_way_to_teach_trains_in_its_stages_and_changes_neither_model(dense, tmp_path, teach, stages):
    lesson = Lesson(TradeoffSettings(teach=teach, finetune_epochs=2, lr=0.05, hint_epochs=1, generations=2))
    candidate, data = of_rate(0.5), load_data("digits", limit=64)
    start = candidate.apply(dense, round_to=1, seed=0)
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in (start, dense)]
    told = []
    lesson.refuse(candidate, start, dense)
    module, training = lesson.give(
        candidate,
        start,
        dense,
        data,
        checkpoint=tmp_path / "run",
        progress=lambda task, done, total: told.append((task, done / total)),
        task="tune",
    )
    assert {stage: len(history.epochs) for stage, history in training.items()} == stages
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in start.state_dict().items()}
    assert not all(torch.equal(v, start.state_dict()[k]) for k, v in module.state_dict().items())
    for state, given in zip(before, (start, dense), strict=True):
        assert all(torch.equal(v, given.state_dict()[k]) for k, v in state.items())
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert (told[-1], {task for task, _ in told}) == (("tune", 1.0), {"tune"})
    assert list((tmp_path / "run").glob("*.pt"))


def test_candidates_are_trained_with_the_settings_of_any_training():
    given = {"optimizer": "adamw", "lr": 3e-3, "schedule": "cosine", "precision": "bf16", "workers": 2, "seed": 3}
    settings = TradeoffSettings(finetune_epochs=4, epochs=7, label_smoothing=0.1, **given)
    assert Lesson(settings).training == surgery.TrainSettings(epochs=4, label_smoothing=0.1, **given)
    assert Lesson(TradeoffSettings()).training == surgery.TrainSettings(epochs=3)


def test_no_epochs_train_nothing(dense, tmp_path):
    lesson = Lesson(TradeoffSettings(teach="evolve", finetune_epochs=0))
    candidate = parse("widen=1.5")
    start = candidate.apply(dense, round_to=1, seed=0)
    lesson.refuse(candidate, start, dense)
    data = load_data("digits", limit=64)
    given = {"checkpoint": tmp_path / "run", "progress": lambda *_: None, "task": "tune"}
    assert lesson.give(candidate, start, dense, data, **given) == (start, {})
    assert lesson.passes == 0


@pytest.mark.parametrize(
    ("text", "round_to", "message"),
    [
        ("widen=1.5", 1, "Knowledge Evolution carves at split rates alone: leave out candidate 'widen=1.5'"),
        ("macs=1M", 1, "Knowledge Evolution carves at split rates alone: leave out candidate 'macs=1M'"),
        ("0.5", 8, "Knowledge Evolution carves at split rates alone: leave out round_to and importance"),
    ],
)
def test_evolving_anything_but_a_split_rate_is_refused(dense, text, round_to, message):
    lesson = Lesson(TradeoffSettings(teach="evolve", finetune_epochs=1, round_to=round_to))
    with pytest.raises(UsageError) as caught:
        lesson.refuse(parse(text), dense, dense)
    assert str(caught.value) == message


def test_an_unknown_way_to_teach_is_refused():
    with pytest.raises(UsageError, match="unknown teach 'hint'; did you mean 'hints'"):
        TradeoffSettings(teach="hint")


def test_a_share_is_of_the_dense_model_and_stays_in_the_name():
    dense = surgery.trace(nn.Linear(6, 5).eval(), torch.zeros(2, 6))
    budget = parse("macs=50%")
    assert (budget.name, budget.folder, budget.share) == ("macs=50%", "macs=50", True)
    found = budget.of(dense)
    assert (found.limit, found.share, found.name) == (15.0, False, "macs=50%")
    assert parse("latency=5ms").of(dense).limit == 5.0
