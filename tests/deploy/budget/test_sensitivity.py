"""Each part of a model slimmed alone: what that loses and what it saves."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

import surgery
from surgery.deploy.budget.sensitivity import write_sensitivity
from surgery.deploy.measure.benchmark import Ratio
from surgery.errors import UsageError
from surgery.training.data.data import load_data
from surgery.training.history import Score


@pytest.fixture(scope="module")
def data():
    return load_data("digits", limit=200)


@pytest.fixture(scope="module")
def net(data):
    """Of its second layer the second half is idle; the first layer is not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                              nn.Flatten(), nn.Linear(1024, 10))  # fmt: skip
    module = surgery.trace(model.eval(), torch.zeros(2, 3, 8, 8))
    module = surgery.train(module, data, epochs=8, lr=0.05).module
    with torch.no_grad():
        module.get_submodule("2").weight[8:] = 0
        module.get_submodule("2").bias[8:] = 0
    return module


def timer(modules):
    return {name: surgery.cost(module).macs / 1e5 for name, module in modules.items()}


@pytest.fixture(scope="module")
def result(net, data):
    return surgery.sensitivity(net, data, timer=timer)


def test_each_group_is_slimmed_alone_and_an_idle_one_loses_nothing(net, result, data):
    first, second = result.rows
    assert (first.name, second.name) == ("0", "2")
    assert (first.groups, second.groups) == (("0",), ("2",))
    assert result.dense.judged.score == surgery.evaluate(net, data.test)
    assert result.dense.judged.score.accuracy > 0.6
    assert result.drop(second) == 0
    assert first.judged.loss > result.dense.judged.loss + 0.01
    assert second.judged.loss == pytest.approx(result.dense.judged.loss, rel=1e-5)
    for row in result.rows:
        alone = surgery.slim(net, {row.name: 0.5})
        assert row.cost == surgery.cost(alone)
        assert row.judged.score == surgery.evaluate(alone, data.test)
        assert result.saved(row) == pytest.approx(1 - timer({"": alone})[""] / timer({"": net})[""])


def test_what_is_measured_here_has_an_interval(net, data):
    found = surgery.sensitivity(net, data, limit=50, runtime="torch", threads=1, min_seconds=0)
    assert found.dense.judged.score.total == 50
    for row in found.rows:
        assert row.ratio.low <= row.ratio.value <= row.ratio.high
        assert found.saved(row) == 1 - row.ratio.value
        assert row.iqr_ms > 0
    told = found.to_dict()
    assert told["check"]["low"] <= found.dense.ratio.value <= told["check"]["high"]
    assert told["dense"]["iqr_ms"] == found.dense.iqr_ms
    assert told["too_noisy"] == (found.too_noisy or None)


NOISY = (
    "differences below ±50 % cannot be told apart in this run: measured against itself, the whole model took 1.10 to "
    "1.50 times as long"
)


def noisy(result):
    """The result as if the machine had been busy."""
    return replace(result, dense=replace(result.dense, ratio=Ratio(1.3, 1.1, 1.5, 0.95, 10)))


def test_a_noisy_machine_is_reported(result):
    assert result.too_noisy == ""
    assert result.to_dict()["check"] is None
    found = noisy(result)
    assert found.too_noisy == NOISY
    assert found.doubts == (NOISY,)
    told = found.to_dict()
    assert (told["check"]["value"], told["too_noisy"], told["doubts"]) == (1.3, NOISY, [NOISY])


def test_a_model_that_guesses_is_reported(result):
    """Ten classes: one right in ten by chance."""

    def judged(correct):
        return replace(result, dense=replace(result.dense, judged=replace(result.dense.judged, score=correct)))

    said = ("the model is no better than guessing: train it (--epochs)",)
    assert result.doubts == ()
    assert judged(Score(25, 200)).doubts == said
    assert judged(Score(60, 200)).doubts == ()


def test_the_picture_shows_doubts_about_the_figures(result, tmp_path, monkeypatch):
    titles = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path: (titles.append(figure.get_suptitle()), save(figure, path))
    )
    for found in (result, noisy(result)):
        write_sensitivity(found, tmp_path)
    assert titles[0].count("\n") == 1
    assert NOISY in " ".join(titles[1].split("\n"))


def test_a_model_of_the_catalogue_goes_by_its_name(result):
    assert replace(result, source="torchvision:resnet18?num_classes=10").name == "resnet18"
    assert replace(result, source="mymodel:make").name == "mymodel:make"


def test_the_model_is_not_modified(net, data):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = surgery.sensitivity(net, data, rate=0.25, importance="magnitude", limit=50, timer=timer)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    alone = surgery.slim(net, {"0": 0.25}, importance="magnitude")
    assert found.rows[0].cost == surgery.cost(alone)
    assert (found.rate, found.importance) == (0.25, "magnitude")


def test_a_criterion_on_data_looks_at_the_training_images(net, data):
    found = surgery.sensitivity(net, data, rate=0.25, importance="taylor", timer=timer)
    assert found.importance == "taylor"
    scores = surgery.unit_scores(net, surgery.Importance("taylor", data))
    alone = [surgery.evaluate(surgery.slim(net, {name: 0.25}, importance=scores), data.test) for name in ("0", "2")]
    assert [row.judged.score.accuracy for row in found.rows] == [score.accuracy for score in alone]


def test_the_files_say_what_the_result_says(result, tmp_path):
    write_sensitivity(result, tmp_path)
    stored = json.loads((tmp_path / "sensitivity.json").read_text())
    assert stored == json.loads(json.dumps(result.to_dict()))
    with (tmp_path / "sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["0", "2"]
    for row, told in zip(rows, stored["parts"], strict=True):
        assert float(row["accuracy_drop"]) == pytest.approx(told["accuracy_drop"])
        assert float(row["time_saved"]) == pytest.approx(told["time_saved"])
    height, width, _ = imread(tmp_path / "sensitivity.png").shape
    assert width > height > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "split rate must be in (0, 1], not 0.0"),
        ({"by": "layer"}, "unknown kind of part 'layer': one of 'group', 'stage'"),
        ({"importance": "size"}, "unknown importance 'size'"),
        ({"limit": 0}, "limit is 0: it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(net, data, options, message):
    with pytest.raises(UsageError) as caught:
        surgery.sensitivity(net, data, timer=timer, **options)
    assert str(caught.value).startswith(message)


def test_the_command_prints_a_table_and_writes_the_files(run, module_in_folder):
    folder = module_in_folder(
        "sensitive_factory",
        """
        from torch import nn

        def tiny():
            return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    """,
    )
    model = ["sensitive_factory:tiny", "--trust", "--dataset", "digits", "--limit", "64", "--epochs", "1"]
    timing = ["--runtime", "torch", "--threads", "1", "--min-seconds", "0"]
    code, out, _ = run("sensitivity", *model, *timing, "--out", "found")
    assert code == 0
    assert "points lost" in out
    assert "written to found: sensitivity.png" in out
    assert "\nthe model is no better than guessing: train it (--epochs)\n" in out
    told = json.loads((folder / "found" / "sensitivity.json").read_text())
    assert out.splitlines()[-1 - len(told["doubts"]) : -1] == told["doubts"]
    written = {path.name for path in (folder / "found").iterdir()}
    assert written == {"history.csv", "run.yaml", "sensitivity.csv", "sensitivity.json", "sensitivity.png"}
    code, out, _ = run("sensitivity", *model, *timing, "--out", "found", "--force", "--json")
    assert code == 0
    assert [part["part"] for part in json.loads(out)["parts"]] == ["0"]


def test_an_untrained_model_is_refused_by_the_command(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("sensitivity", "squeezenet1_1", "--dataset", "digits", "--out", "found")
    assert code == 2
    assert err.startswith("error: the model 'squeezenet1_1' has random weights, none of which is worth more than anoth")
    assert list(tmp_path.iterdir()) == []
