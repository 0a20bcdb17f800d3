"""Slimming from a shell: at rates, and to a budget."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.deploy.measure.benchmark import compare

SHAPE = ["--trust", "--input-shape", "2,3,8,8"]


@pytest.fixture(autouse=True)
def empty_folder(module_in_folder):
    """Each command runs in a folder of its own, in which a factory of the user's can be imported."""
    code = """
        from torch import nn

        def three():
            return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))
    """
    return module_in_folder("slim_factory", code)


MODEL = ["slim_factory:three", *SHAPE]


def dense():
    return surgery.models.open_model("slim_factory:three", input_shape=(2, 3, 8, 8), trust=True, seed=0)


@pytest.mark.parametrize(
    ("budget", "kind", "limit"),
    [
        (["--macs", "0.5"], "macs", lambda cost: 0.5 * cost.macs),
        (["--macs", "200k"], "macs", lambda cost: 200e3),
        (["--params", "40%", "--by", "stage"], "params", lambda cost: 0.4 * cost.params),
        (["--bytes", "30kB", "--round-to", "2"], "bytes", lambda cost: 30e3),
    ],
    ids=["share", "number", "percentage", "bytes"],
)
def test_a_count_is_a_budget_and_needs_no_data(run, budget, kind, limit):
    code, out, _ = run("slim", *MODEL, *budget, "--importance", "magnitude", "--out", "made", "--json")
    assert code == 0
    said = json.loads(out)
    most = limit(surgery.cost(dense()))
    assert said["verification"]["ok"]
    assert said["budget"]["kind"] == kind
    assert said["budget"]["limit"] == pytest.approx(most)
    assert 0.85 * most <= said["after"][kind] == said["budget"]["measured"] <= most
    made = surgery.load("made", trust=True)
    assert getattr(surgery.cost(made), kind) == said["after"][kind]
    multiple = said["budget"]["round_to"]
    remade = surgery.slim(dense(), said["budget"]["rates"], round_to=multiple, importance="magnitude")
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in remade.state_dict().items())
    assert multiple == (2 if "--round-to" in budget else 1)


def test_what_is_kept_are_the_largest_weights_of_the_file_that_is_given(run):
    model = dense()
    with torch.no_grad():
        for parameter in model.get_submodule("0").parameters():
            parameter[::2] += 10
    save_file(model.state_dict(), "mine.safetensors")
    code, _, _ = run("slim", *MODEL, "--weights", "mine.safetensors", "--rate", "0=0.5", "--importance", "magnitude",
                     "--out", "made")  # fmt: skip
    assert code == 0
    kept = surgery.load("made", trust=True).get_submodule("0").weight
    assert torch.equal(kept, model.get_submodule("0").weight[::2])


def test_a_search_says_each_of_its_figures_and_what_it_found(run):
    code, out, err = run("slim", *MODEL, "--macs", "0.5", "--out", "made")
    assert code == 0
    assert re.search(r"^as it is: 3\d\d\.\d\d k MACs$", err, re.MULTILINE)
    assert re.search(r"^as slim as allowed: \d.* MACs$", err, re.MULTILINE)
    assert re.search(r"^tried: predicted .* k MACs, is .* k MACs, which keeps to .* k MACs$", err, re.MULTILINE)
    assert re.search(r"^\d.* k MACs before, .* k MACs now, of a budget of .* k MACs; \d models? tried$", out, re.M)
    assert re.search(r"^rates: .*\b2 0\.\d+", out, re.MULTILINE)


def test_a_model_that_keeps_to_its_budget_is_saved_as_it_is(run):
    code, out, _ = run("slim", *MODEL, "--params", "1G", "--out", "made")
    assert code == 0
    assert "nothing to do: the model takes 15.34 k parameters, which keeps to the budget of 1.00 G parameters" in out
    assert surgery.cost(surgery.load("made", trust=True)) == surgery.cost(dense())


def test_a_dry_run_searches_and_writes_nothing(run, empty_folder):
    code, out, _ = run("slim", *MODEL, "--macs", "0.5", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["budget"]["rates"]
    assert [path.name for path in empty_folder.iterdir()] == ["slim_factory.py"]


def test_damage_is_measured_on_data_where_some_are_given(run):
    measured = []
    for options in ([], ["--dataset", "digits"]):
        code, out, err = run("slim", *MODEL, "--params", "0.6", *options, "--dry-run", "--json")
        assert code == 0
        assert ("damage …" in err) == bool(options)
        measured.append(json.loads(out)["budget"]["damage"])
    assert measured[0] != measured[1]


def test_a_latency_is_a_budget_and_every_figure_is_told_as_it_comes(run, monkeypatch):
    brief = {"min_seconds": 0, "warmup": 0.01, "min_runs": 6}
    monkeypatch.setattr("surgery.deploy.budget.clock.compare", lambda models, **o: compare(models, **{**o, **brief}))
    timed = ["--runtime", "torch", "--threads", "1", "--batch-size", "1"]
    code, out, err = run("slim", *MODEL, "--latency", "1s", *timed, "--out", "made", "--json")
    assert code == 0
    assert json.loads(out)["budget"]["kind"] == "latency_ms"
    first, second, *_ = err.splitlines()
    assert first == "timing the model, by torch on cpu …"
    assert re.fullmatch(r"as it is: [0-9.]+ ms", second)


@pytest.mark.parametrize("how", [["--rate", "0.5"], ["--macs", "0.5"]], ids=["rate", "budget"])
def test_layers_are_fitted_to_a_data_set(run, how):
    data = ["--calibrate", "digits", "--limit", "100"]
    code, out, _ = run("slim", *MODEL, *how, *data, "--out", "made", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["verification"]["ok"]
    assert said["fit"]["dataset"] == "digits"
    assert set(said["fit"]["layers"]) == ({"2.weight", "4.weight", "7.weight"} if "--rate" in how else {"4.weight"})
    assert said["fit"]["difference"]["fitted"] < said["fit"]["difference"]["carved"]
    images = surgery.load_data("digits", image_size=8, limit=100)
    made = surgery.load("made", trust=True)
    if "--rate" in how:
        expected = surgery.slim(dense(), 0.5, calibration=images)
        assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert isinstance(surgery.recipe(made).steps[-1], surgery.Compensate)


def test_what_a_fit_did_is_said(run):
    code, out, _ = run("slim", *MODEL, "--rate", "0.5", "--calibrate", "digits", "--limit", "40", "--out", "made")
    assert code == 0
    assert re.search(
        r"^then fitted to digits: on 40 test images outputs differ from the dense model's by 0\.\d+ of", out, re.M
    )


@pytest.mark.parametrize("importance", ["taylor", "reconstruction"])
def test_channels_are_ranked_on_the_data_that_are_given(run, importance):
    ranked = ["--importance", importance, "--rank-on", "digits", "--ranking", "global"]
    code, out, err = run("slim", *MODEL, "--rate", "0.5", *ranked, "--out", "made", "--json")
    assert (code, json.loads(out)["verification"]["ok"]) == (0, True), err
    on = surgery.Importance(importance, surgery.data_for({"the model": dense()}, "digits"))
    remade = surgery.slim(dense(), 0.5, importance=on, ranking="global")
    made = surgery.load("made", trust=True).state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in remade.state_dict().items())
    assert remade.get_submodule("0").weight.shape != (8, 3, 3, 3)


def test_a_budget_ranks_on_its_data(run):
    data = ["--dataset", "digits", "--limit", "64"]
    code, out, err = run("slim", *MODEL, "--macs", "0.5", "--importance", "taylor", *data, "--out", "made", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert (said["verification"]["ok"], said["budget"]["importance"]) == (True, "taylor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing option '--rate': say how slim, by a rate (--rate 0.5) or by a budget (--macs 0.5, --params 3M, "),
        (["--rate", "0.5", "--macs", "0.5"], "--rate says how wide layers are, --macs looks for it: give one of them"),
        (["--macs", "0.5", "--params", "0.1"], "--macs and --params are budgets of different kinds: give the one that"),
        (["--macs", "0.5", "--latency", "5ms", "--bytes", "1MB"], "--macs and --bytes and --latency are budgets of"),
        (["--macs", "5ms"], "a budget of macs is a number above 0 with an optional unit (k, M, G), or a share of the"),
        (
            ["--latency", "150%"],
            "a budget of latency is a number above 0 with an optional unit (ms, s, us), or a share of",
        ),
        (
            ["--macs", "0.5", "--importance", "l1"],
            "unknown importance 'l1': one of 'bn-scale', 'fpgm', 'lamp', ",
        ),
        (
            ["--rate", "0.5", "--importance", "l1"],
            "unknown importance 'l1': one of 'bn-scale', 'fpgm', 'lamp', ",
        ),
        (["--rate", "0.5", "--importance", "taylor"], "importance 'taylor' looks at data: pass"),
        (["--macs", "0.5", "--importance", "variance"], "importance 'variance' looks at data: pass"),
        (["--rate", "0.5", "--importance", "lamp", "--rank-on", "digits"], "--rank-on is for an importance that looks"),
        (["--rate", "0.5", "--ranking", "globl"], "unknown ranking 'globl'; did you mean 'global'"),
        (["--rate", "0.5", "--ranking", "global"], "importance 'prefix' does not compare channels of different groups"),
        (
            ["--macs", "0.5", "--ranking", "global"],
            "--ranking goes with --rate: to a budget, each part has its own rate",
        ),
        (["--rate", "0.5", "--dataset", "digits"], "--dataset is for a budget: a rate needs no data\n"),
        (["--macs", "100"], "no model of these widths keeps to 100 MACs: the smallest, 0.125 of every width, takes"),
        (["--macs", "0.5", "--by", "layer"], "unknown kind of part 'layer': one of 'group', 'stage'\n"),
    ],
)
def test_budgets_that_contradict_or_cannot_be_are_refused_and_nothing_is_written(run, empty_folder, options, message):
    code, out, err = run("slim", *MODEL, *options, "--out", "made")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {message}".rstrip("\n"))
    assert [path.name for path in empty_folder.iterdir()] == ["slim_factory.py"]
