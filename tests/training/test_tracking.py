"""Epochs in a tracker: which figures, in which run, by which process; and in a table while a run goes on."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import tracking, utils
from torch import nn

import surgery
from surgery import UsageError
from surgery.settings import TrainSettings
from surgery.training.tracking import follow, make_tracker
from tests.helpers import killed_after

DIGITS = 80


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


class Fake(tracking.GeneralTracker):
    """A tracker as accelerate wants it, which keeps what it is told."""

    requires_logging_directory = False
    runs: list[Fake] = []  # noqa: RUF012

    def __init__(self, name: str, where: str, folder: str | None = None) -> None:
        self.name, self.where, self.folder, self.told = name, where, folder, []
        super().__init__()
        self.runs.append(self)

    @property
    def tracker(self):
        return self.told

    def start(self):
        self.told.append("start")

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step=None, **_):
        self.told.append((values, step))

    def finish(self):
        self.told.append("finish")


@pytest.fixture
def runs(monkeypatch):
    """The runs of fake trackers in place of accelerate's."""
    names = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "mlflow": "MLflowTracker"}
    for name, kind in names.items():
        monkeypatch.setattr(tracking, kind, lambda *given, name=name: Fake(name, *given))
        monkeypatch.setattr(utils, f"is_{name}_available", lambda: True)
    monkeypatch.setattr(Fake, "runs", [])
    return Fake.runs


def logged(run: Fake) -> list[tuple[dict[str, float], int | None]]:
    return [one for one in run.told if isinstance(one, tuple)]


def test_each_epoch_is_logged_with_its_figures_and_passed_on(digits, runs):
    seen = []

    class Listens:
        def __call__(self, task, done, total):
            seen.append(done)

        def epoch(self, task, number, figures):
            seen.append((task, number, figures))

    settings = {"epochs": 2, "test_each_epoch": True, "tracker": "tensorboard"}
    history = surgery.train(net(), digits, progress=Listens(), **settings)
    (run,) = runs
    start, stored, *_, finish = run.told
    assert (start, finish) == ("start", "finish")
    assert stored["epochs"] == 2
    assert None not in stored.values()
    expected = [{f"train/{name}": value for name, value in epoch.figures.items()} for epoch in history.epochs]
    assert logged(run) == [(expected[0], 1), (expected[1], 2)]
    assert [one[1] for one in seen if isinstance(one, tuple)] == [1, 2]
    assert [one for one in seen if isinstance(one, int)] == [1, 2]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_where_a_run_goes_and_how_its_epochs_are_counted(digits, runs, name):
    surgery.train(net(), digits, epochs=2, tracker=name)
    surgery.train(net(), digits, epochs=1, tracker=f"{name}:mine", task="rate-0.5: fine-tune, seed 5")
    assert [run.where for run in runs] == ["surgery", "mine"]
    steps = [step for _, step in logged(runs[0])]
    assert steps == ([None, None] if name == "wandb" else [1, 2])
    ((values, _),) = logged(runs[1])
    assert "rate-0.5/fine-tune/seed 5/loss" in values
    assert ("rate-0.5/fine-tune/seed 5/epoch" in values) == (name == "wandb")


def test_a_procedure_of_several_trainings_is_one_run(digits, runs, model):
    surgery.distill(model, model, digits, hint_epochs=1, epochs=1, tracker="tensorboard:logs")
    surgery.evolve(model, digits, generations=2, epochs=1, tracker="tensorboard:logs")
    surgery.lottery(model, digits, 0.5, epochs=1, tracker="tensorboard:logs")
    tasks = [[next(iter(values)).split("/")[0] for values, _ in logged(run)] for run in runs]
    assert tasks == [["hints", "distill"], ["generation-1", "generation-2"], ["dense", "ticket-1"]]
    assert {run.folder for run in runs} == {"logs"}


def test_trainings_in_a_block_are_one_run(digits, runs):
    settings = TrainSettings(epochs=1, tracker="mlflow")
    with surgery.follow(settings, None) as progress:
        for task in ("one", "two"):
            surgery.train(net(), digits, settings, progress=progress, task=task)
    (run,) = runs
    assert [next(iter(values)).split("/")[0] for values, _ in logged(run)] == ["one", "two"]
    surgery.train(net(), digits, settings)
    assert len(runs) == 2


def test_a_run_is_ended_when_the_training_fails(digits, runs):
    with pytest.raises(KeyboardInterrupt):
        surgery.train(net(), digits, epochs=2, tracker="mlflow", progress=killed_after(2))
    (run,) = runs
    assert [step for _, step in logged(run)] == [1]
    assert run.told[-1] == "finish"


def test_weights_and_identity_do_not_depend_on_it(digits, runs, tmp_path):
    surgery.train(net(), digits, epochs=1, checkpoint=tmp_path / "a.pt")
    surgery.train(net(), digits, epochs=1, checkpoint=tmp_path / "a.pt", tracker="wandb")
    assert TrainSettings(tracker="wandb").identity() == TrainSettings().identity()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_named_before_the_training(digits, monkeypatch, name):
    monkeypatch.setattr(utils, f"is_{name}_available", lambda: False)
    message = f"^the tracker {name} needs a package that is not installed: pip install {name}$"
    with pytest.raises(UsageError, match=message):
        surgery.train(net(), digits, tracker=name, loss_fn=lambda *_: pytest.fail("a step was taken"))


def test_an_unknown_tracker_is_refused():
    with pytest.raises(UsageError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        TrainSettings(tracker="tensorbord:logs")


def test_accelerates_trackers_are_used_as_they_are(monkeypatch):
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setattr(utils, f"is_{name}_available", lambda: True)
    kinds = [type(make_tracker(f"{name}:x")).__name__ for name in ("tensorboard", "wandb", "mlflow")]
    assert kinds == ["TensorBoardTracker", "WandBTracker", "MLflowTracker"]


def test_tensorboard_reads_what_a_training_wrote(digits, tmp_path):
    pytest.importorskip("tensorboard")
    history = surgery.train(net(), digits, epochs=2, tracker=f"tensorboard:{tmp_path}")
    code = (
        "import sys; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as Events\n"
        "found = Events(sys.argv[1]); found.Reload()\n"
        "print([(event.step, event.value) for event in found.Scalars('train/loss')])"
    )
    (folder,) = tmp_path.iterdir()
    told = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    expected = [(number, epoch.loss) for number, epoch in enumerate(history.epochs, 1)]
    assert eval(told.stdout) == [(number, pytest.approx(loss, rel=1e-6)) for number, loss in expected]


def test_the_main_process_of_several_is_the_only_one_that_logs(tmp_path):
    """Of two processes, each writes how many reports its trackers got."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, torch, surgery\n"
        "from accelerate import tracking, utils\n"
        "from tests.training.test_tracking import Fake\n"
        "tracking.MLflowTracker = lambda where: Fake('mlflow', where)\n"
        "utils.is_mlflow_available = lambda: True\n"
        "torch.manual_seed(0)\n"
        "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))\n"
        "surgery.train(net, surgery.load_data('digits', limit=64), epochs=2, tracker='mlflow')\n"
        "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w').write(str([len(run.told) for run in Fake.runs]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[5]", "[0]"]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_table_of_epochs_is_written_while_the_training_goes_on(digits, tmp_path):
    table = tmp_path / "history.csv"
    seen = []

    class Looks:
        def __call__(self, task, done, total): ...

        def epoch(self, task, number, figures):
            seen.append(len(rows(table)))

    settings = TrainSettings(epochs=2)
    for _ in range(2):
        with follow(settings, Looks(), history=table) as progress:
            history = surgery.train(net(), digits, settings, progress=progress)
    assert seen == [1, 2, 3, 4]
    assert [(row["task"], row["epoch"]) for row in rows(table)] == 2 * [("train", "1"), ("train", "2")]
    assert [float(row["loss"]) for row in rows(table)[2:]] == [epoch.loss for epoch in history.epochs]
    surgery.write_history({"train": history}, tmp_path)
    assert rows(table)[0].keys() == {"task", "epoch", *history.epochs[0].figures, "accuracy"}
