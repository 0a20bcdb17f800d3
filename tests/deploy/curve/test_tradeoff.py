"""The main job: from a model and data to a measured curve."""

from __future__ import annotations

import csv
import json
import re

import onnxruntime
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from surgery.deploy.curve import candidate_training, teaching
from surgery.deploy.curve.points import pareto
from surgery.deploy.curve.tradeoff import tradeoff
from surgery.errors import UsageError
from surgery.models.saving import load
from surgery.settings import TrainSettings
from surgery.storage.folders import staged_folder
from surgery.training.data.data import load_data


def tiny(classes: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, classes),
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run: its result, its folder and what its progress was told."""
    out = tmp_path_factory.mktemp("runs") / "new" / "demo"
    calls = []
    result = tradeoff(
        tiny(),
        dataset="digits",
        rates=[0.5, 1.0],
        directory=out,
        epochs=3,
        finetune_epochs=1,
        lr=0.1,
        limit=300,
        threads=1,
        progress=lambda *call: calls.append(call),
    )
    return result, out, calls


def test_a_run_writes_the_picture_the_tables_the_report_and_a_folder_for_each_rate(run):
    _, out, _ = run
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == {
        "history.csv",
        "report.md",
        *(f"tradeoff.{kind}" for kind in ("csv", "html", "json", "png")),
        *("dense", "rate-1", "rate-0.5", "rate-1/model.onnx", "rate-0.5/model.onnx"),
        *(
            f"{folder}/{file}"
            for folder in ("dense", "rate-1", "rate-0.5")
            for file in ("recipe.json", "trained.json", "weights.safetensors")
        ),
    }
    assert list(out.parent.iterdir()) == [out]


def test_the_table_of_epochs_has_those_of_each_training(run):
    result, out, _ = run
    table = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [(row["task"], row["epoch"]) for row in table] == [
        *(("dense", "1"), ("dense", "2"), ("dense", "3")),
        *(("rate-1: train", "1"), ("rate-0.5: train", "1")),
    ]
    told = [result.history, *(point.training["train"] for point in result.points)]
    assert [float(row["loss"]) for row in table] == [epoch.loss for history in told for epoch in history.epochs]


def test_points_are_in_order_of_falling_rate_and_slim_ones_are_smaller(run):
    dense, slim = run[0].points
    assert (dense.rate, slim.rate) == (1.0, 0.5)
    assert dense.params == sum(p.numel() for p in tiny().parameters())
    assert slim.params == 3 * 4 * 9 + 4 + 8 + 4 * 8 * 9 + 8 + 16 + 8 * 16 * 10 + 10
    assert slim.macs < dense.macs


def test_the_accuracy_is_that_of_the_onnx_file(run):
    result, out, _ = run
    test = load_data("digits", limit=300).test
    images, labels = zip(*test, strict=True)
    for point in result.points:
        session = onnxruntime.InferenceSession(out / point.folder / "model.onnx")
        logits = session.run(None, {session.get_inputs()[0].name: torch.stack(images).numpy()})[0]
        assert point.score.correct == int((logits.argmax(1) == torch.stack(labels).numpy()).sum())
        assert point.score.total == 300


def test_the_saved_model_is_the_exported_one(run):
    result, out, _ = run
    images = torch.randn(4, 3, 8, 8)
    for point in result.points:
        session = onnxruntime.InferenceSession(out / point.folder / "model.onnx")
        logits = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        model = load(out / point.folder, model=tiny())
        assert not model.training
        assert torch.allclose(model(images), torch.from_numpy(logits), rtol=1e-4, atol=1e-5)


def test_training_and_fine_tuning_are_recorded(run):
    result = run[0]
    assert len(result.history.epochs) == 3
    assert [len(point.history.epochs) for point in result.points] == [1, 1]
    assert result.points[0].score.accuracy > 0.5


def test_the_csv_and_the_json_say_what_the_result_says(run):
    result, out, _ = run
    with (out / "tradeoff.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    stored = json.loads((out / "tradeoff.json").read_text())
    assert stored == json.loads(json.dumps(result.to_dict()))
    for row, point, of_json in zip(rows, result.points, stored["points"], strict=True):
        assert float(row["split_rate"]) == point.rate == of_json["split_rate"]
        assert float(row["accuracy"]) == pytest.approx(point.score.accuracy)
        assert float(row["p50_ms"]) == pytest.approx(point.latency.p50_ms)
        assert int(row["macs"]) == point.macs == of_json["macs"]
        assert row["pareto"] == str(point in result.front)
        assert len(of_json["benchmark"]["samples_ms"]) >= 100


def test_the_picture_is_a_picture(run):
    height, width, _ = imread(run[1] / "tradeoff.png").shape
    assert width > 1000
    assert height > 700


def test_the_report_names_every_point_the_settings_and_the_command(run):
    text = (run[1] / "report.md").read_text()
    assert "](tradeoff.png)" in text
    assert "[rate-1](rate-1)" in text
    assert "[rate-0.5](rate-0.5)" in text
    assert "digits: 300 to train on, 300 to test on, 10 classes" in text
    assert "surgery.tradeoff(Sequential, dataset='digits', candidates=('1', '0.5')" in text
    assert re.search(r"\| onnxruntime \| \d", text)


def test_progress_as_a_whole_never_falls_and_ends_at_its_total(run):
    whole = [done for task, done, _ in run[2] if task == "all"]
    assert whole == sorted(whole)
    assert (whole[0], whole[-1]) == (0, 1000)
    assert {task for task, _, _ in run[2]} == {
        "all",
        "train dense",
        "rate-1: fine-tune",
        "rate-1: export and score",
        "rate-0.5: fine-tune",
        "rate-0.5: export and score",
        "measure",
    }


def test_every_training_has_the_settings_that_are_given(tmp_path, monkeypatch):
    """As `surgery.train` has them, whoever trains; and images are scored as they say."""
    trained, scored = [], []
    given = {"optimizer": "adamw", "schedule": "cosine", "momentum": 0.8, "weight_decay": 0.02, "label_smoothing": 0.1}
    given |= {"precision": "bf16", "batch_size": 32, "evaluation_batch": 40, "workers": 0, "test_each_epoch": True}
    given |= {"augment": "flip", "erase": 0.25, "mixup": 0.2, "cutmix": 0.5}

    def record(module, name, told):
        original = getattr(module, name)

        def called(*arguments, **options):
            told.append((arguments, options))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, called)

    record(candidate_training, "train", trained)
    record(teaching, "distill", trained)
    record(candidate_training, "evaluate", scored)
    options = {"dataset": "digits", "rates": [0.5], "epochs": 2, "finetune_epochs": 1, "limit": 64, "threads": 1}
    result = tradeoff(tiny(), directory=tmp_path / "out", teach="kd", **options, **given)
    settings = [next(one for one in arguments if isinstance(one, TrainSettings)) for arguments, _ in trained]
    assert [one.epochs for one in settings] == [2, 1]
    assert all({name: getattr(one, name) for name in given} == given for one in settings)
    assert [told for _, told in scored] == [{"batch_size": 40, "workers": 0}]
    assert (
        "AdamW, first beta 0.8, cosine, peak rate 0.001, batch 32, weight decay 0.02, label smoothing 0.1, "
        "precision bf16, images augmented by flips, RandomErasing 0.25, MixUp 0.2, CutMix 0.5 |"
        in (tmp_path / "out" / "report.md").read_text()
    )
    assert [epoch.score is not None for epoch in result.history.epochs] == [True, True]


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device cuda: there is no GPU here that torch can use"):
        tradeoff(tiny(), dataset="nothing", directory=tmp_path / "out", device="cuda")
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        tradeoff(tiny(), dataset="nothing", directory=tmp_path / "out", device="tpu")


def test_the_given_model_is_not_modified(tmp_path):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"epochs": 1, "finetune_epochs": 0, "limit": 64, "threads": 1}
    result = tradeoff(model, dataset="digits", rates=[0.5], directory=tmp_path / "out", **options)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert result.points[0].history is None


def refused(tmp_path, source=None, **changes):
    """The message with which a run is refused; nothing may have been written."""
    options = {"dataset": "digits", "rates": [0.5], "directory": tmp_path / "new" / "demo", "epochs": 1, "limit": 32}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError) as caught:
        tradeoff(source or tiny(), **{**options, **changes})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "resnet19"}, "unknown model 'resnet19'; did you mean 'resnet18'"),
        ({"dataset": "digit"}, "unknown data set 'digit'; did you mean 'digits'?"),
        ({"rates": []}, "no split rates were given: pass at least one in (0, 1]"),
        ({"rates": [0.5, 1.5]}, "split rate 1.5 is outside (0, 1]"),
        ({"rates": [0.0]}, "split rate 0 is outside (0, 1]"),
        ({"rates": [float("nan")]}, "split rate nan is outside (0, 1]"),
        ({"rates": [0.5, 0.5]}, "split rate 0.5 is given more than once"),
        ({"epochs": -1}, "epochs must be a whole number of at least 0, not -1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, not -1"),
        ({"threads": 0}, "threads must be a whole number of at least 1, not 0"),
        ({"lr": 0.0}, "lr must be a number above 0, not 0.0"),
        ({"source": tiny(5)}, "'digits' has 10 classes, but from 2 images the model makes (2, 5)"),
        ({"source": nn.Linear(3, 10)}, "the model cannot be run on 8 x 8 images, try another size (--image-size)"),
        ({"source": "os.path:join"}, "'os.path:join' would import and run code"),
    ],
)
def test_an_impossible_run_is_refused_before_anything_is_written(tmp_path, changes, message):
    assert refused(tmp_path, **changes).startswith(message)


def test_a_folder_that_exists_is_refused_without_force(tmp_path):
    (tmp_path / "new" / "demo").mkdir(parents=True)
    message = f"{tmp_path}/new/demo exists: choose another folder, or replace it with force=True (--force)"
    assert refused(tmp_path) == message


def test_a_folder_of_other_things_is_refused_even_with_force(tmp_path):
    out = tmp_path / "new" / "demo"
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    message = f"{out} is not replaced: it holds no tradeoff.json, so it was not made by this command"
    assert refused(tmp_path, force=True) == message


def test_a_staged_folder_replaces_an_earlier_result_whole(tmp_path):
    out = tmp_path / "demo"
    for number in (1, 2):
        with staged_folder(out, marker="mark", force=number > 1) as folder:
            (folder / "mark").write_text("")
            (folder / f"file{number}").write_text("")
    assert sorted(path.name for path in out.iterdir()) == ["file2", "mark"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_staged_folder_leaves_nothing_when_the_work_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a" / "b", marker="mark") as folder:  # noqa: PT012
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"), staged_folder(tmp_path / "file" / "out", marker="mark"):
        pass


def test_the_pareto_front_holds_unbeaten_points():
    #        dominated by the first, equal twins, alone fastest, slower and worse, slower and better
    points = [(2.0, 0.9), (2.0, 0.8), (1.0, 0.7), (1.0, 0.7), (0.5, 0.1), (3.0, 0.85), (4.0, 0.95)]
    assert pareto(points) == [0, 2, 3, 4, 6]
