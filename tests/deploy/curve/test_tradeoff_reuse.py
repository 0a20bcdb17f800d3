"""A tradeoff goes on where it was cut off, and trains nothing twice."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import surgery
from surgery.cli.output import Bars
from surgery.deploy.curve import candidate_training, teaching
from surgery.deploy.curve.tradeoff import tradeoff
from surgery.deploy.measure.benchmark import compare
from surgery.errors import EditError, UsageError
from surgery.storage.folders import LOCK, unfinished_folder
from tests.emulated_gpu import GPU, emulated_gpu
from tests.helpers import without_epochs


def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
        )


OPTIONS = {"dataset": "digits", "epochs": 2, "finetune_epochs": 2, "lr": 0.1, "limit": 128, "threads": 1}


class Steps:
    """Counts the steps of each stage, and interrupts the run at one of them."""

    def __init__(self, stage: str = "", step: int = 0) -> None:
        self.taken: dict[str, int] = {}
        self.at = (stage, step)

    def __call__(self, task: str, done: int, total: int) -> None:
        if total > 1:
            self.taken[task] = self.taken.get(task, 0) + 1
            if (task, self.taken[task]) == self.at:
                raise KeyboardInterrupt

    def trained(self) -> dict[str, int]:
        return {task: count for task, count in self.taken.items() if task != "all"}


@pytest.fixture(scope="module", autouse=True)
def measured_in_passing():
    """How models are timed is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(compare, memory=False, min_runs=5)
        patch.setattr(
            "surgery.deploy.curve.tradeoff.compare", lambda files, **given: quick(files, **{**given, **BRIEF})
        )
        yield


BRIEF = {"min_seconds": 0, "warmup": 0.01}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from beginning to end, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "demo"
    steps = Steps()
    result = tradeoff(tiny(), rates=[1.0, 0.5], directory=out, progress=steps, **OPTIONS)
    assert steps.trained() == {"train dense": 4, "rate-1: fine-tune": 4, "rate-0.5: fine-tune": 4}
    return result, out


def weights(out):
    return {path.parent.name: path.read_bytes() for path in out.rglob("weights.safetensors")}


def test_an_interrupted_run_resumes_to_the_same_weights(whole, tmp_path):
    out, cut = tmp_path / "demo", Steps("rate-0.5: fine-tune", 3)
    with pytest.raises(KeyboardInterrupt):
        tradeoff(tiny(), rates=[1.0, 0.5], directory=out, progress=cut, **OPTIONS)
    assert not out.exists()
    again = Steps()
    result = tradeoff(tiny(), rates=[1.0, 0.5], directory=out, progress=again, **OPTIONS)
    assert again.trained() == {"rate-0.5: fine-tune": 3}  # told where it goes on, and of the two steps left
    assert result.reused == ("dense", "1")
    assert weights(out) == weights(whole[1])
    assert [p.score for p in result.points] == [p.score for p in whole[0].points]
    assert [len(p.history.epochs) for p in result.points] == [2, 2]
    assert list(tmp_path.iterdir()) == [out]


def test_a_second_run_with_one_more_candidate_trains_only_that_one(whole, tmp_path):
    out, steps = tmp_path / "more", Steps()
    result = tradeoff(
        tiny(), rates=[1.0, 0.5], candidates=["0=0.25"], directory=out, reuse=[whole[1]], progress=steps, **OPTIONS
    )
    assert steps.trained() == {"0=0.25: fine-tune": 4}
    assert result.reused == ("dense", "1", "0.5")
    assert [p.name for p in result.points] == ["1", "0.5", "0=0.25"]
    assert [p.rate for p in result.points] == [1.0, 0.5, None]
    both = weights(out)
    assert {name: both[name] for name in ("dense", "rate-1", "rate-0.5")} == weights(whole[1])
    text = (out / "report.md").read_text()
    assert "| candidate | accuracy |" in text
    assert "the other candidates are named after what was done to it" in text
    assert "| reused from earlier runs | dense; 1; 0.5 |" in text
    # The folder itself is an earlier run, too, when it is replaced; other settings are another training.
    steps = Steps()
    options = {**OPTIONS, "finetune_epochs": 1}
    result = tradeoff(tiny(), rates=[0.5], teach="kd", directory=out, force=True, progress=steps, **options)
    assert set(steps.trained()) == {"rate-0.5: fine-tune"}
    assert result.reused == ("dense",)
    assert list(result.points[0].training) == ["distill"]
    assert result.settings.teach == "kd"


def test_models_are_trained_on_the_device_that_is_asked_for_and_come_back(whole, tmp_path, monkeypatch):
    devices = []

    def record(module):
        original = module.train

        def train(model, *arguments, **options):
            devices.append(next(model.parameters()).device)
            return original(model, *arguments, **options)

        monkeypatch.setattr(module, "train", train)

    record(candidate_training)
    record(teaching)
    monkeypatch.setattr(candidate_training, "pick_device", lambda name: GPU)
    with emulated_gpu():
        result = tradeoff(tiny(), rates=[0.5], directory=tmp_path / "out", **OPTIONS)
    assert devices == [GPU, GPU]
    assert result.reused == ()
    expected = weights(whole[1])
    assert weights(tmp_path / "out") == {name: expected[name] for name in ("dense", "rate-0.5")}


def test_a_control_of_each_size_is_trained_from_scratch_once_for_as_long_as_both_together(whole, tmp_path):
    first, second = Steps(), Steps()
    options = {"rates": [1.0, 0.5], "control": "scratch", **OPTIONS}
    result = tradeoff(tiny(), directory=tmp_path / "first", reuse=[whole[1]], progress=first, **options)
    assert first.trained() == {"rate-1: from scratch": 8, "rate-0.5: from scratch": 8}
    assert [len(point.control_history.epochs) for point in result.points] == [4, 4]
    assert [point.score for point in result.points] == [point.score for point in whole[0].points]
    for point in result.points:
        made = surgery.load(tmp_path / "first" / f"{point.folder}-scratch", tiny(), allow_changed_weights=True)
        assert surgery.cost(made) == surgery.cost(surgery.load(tmp_path / "first" / point.folder, tiny()))
        assert surgery.evaluate(made, surgery.load_data("digits", limit=128).test) == point.control
        row = point.to_row()
        assert (row["scratch_accuracy"], row["scratch_low"]) == (point.control.accuracy, point.control.interval()[0])
    again = tradeoff(tiny(), directory=tmp_path / "second", reuse=[tmp_path / "first"], progress=second, **options)
    assert second.trained() == {}
    assert again.reused == ("dense", "1", "1 from scratch", "0.5", "0.5 from scratch")
    assert [point.control for point in again.points] == [point.control for point in result.points]


def test_a_model_with_other_weights_or_other_data_is_trained_again(whole, tmp_path):
    other = tiny()
    with torch.no_grad():
        other[4].bias[0] += 1
    options = {**OPTIONS, "finetune_epochs": 0}
    for number, (model, changes) in enumerate([(other, {}), (tiny(), {"limit": 127})]):
        steps = Steps("train dense", 2)
        with pytest.raises(KeyboardInterrupt):
            tradeoff(
                model,
                rates=[0.5],
                directory=tmp_path / str(number),
                reuse=[whole[1]],
                progress=steps,
                **{**options, **changes},
            )


def test_only_folders_of_runs_are_reused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty has no trained models to reuse: it holds no tradeoff"):
        tradeoff(tiny(), directory=tmp_path / "out", reuse=[tmp_path / "empty"], **OPTIONS)


NETS = """
    from torch import nn

    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
"""
COMMAND = ["tradeoff", "reused_nets:net", "--trust", "--dataset", "digits", "--limit", "64", "--epochs", "1",
           "--finetune-epochs", "1", "--split-rates", "0.5", "--threads", "1", "--out", "made"]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "what is done is kept in made.unfinished: give the same command again to go on\n"),
        (EditError("no such model"), 2, "error: no such model\nwhat is done is kept in made.unfinished\n"),
        (MemoryError(), 1, "error: out of memory\nwhat is done is kept in made.unfinished\n"),
    ],
    ids=["interrupted", "refused", "out-of-memory"],
)
def test_an_interrupted_command_says_what_is_kept(run, module_in_folder, monkeypatch, error, code, said):
    folder = module_in_folder("reused_nets", NETS)

    def told(bars, task, done, total):
        if (task, done) == ("rate-0.5: fine-tune", 1):
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(Bars, "__call__", told)
        found, out, err = run(*COMMAND)
    assert (found, out, without_epochs(err)) == (code, "", said.splitlines())
    assert {path.name for path in folder.iterdir()} == {"reused_nets.py", "made.unfinished"}
    assert run(*COMMAND)[0] == 0
    assert {path.name for path in folder.iterdir()} == {"reused_nets.py", "made"}
    assert not list(folder.rglob(LOCK))


def test_a_command_into_the_folder_of_a_running_one_is_refused_in_one_line(run, module_in_folder):
    folder = module_in_folder("reused_nets", NETS)
    with unfinished_folder("made", {"command": "tradeoff"}):
        assert run(*COMMAND) == (
            2,
            "",
            "error: another run is writing to made.unfinished: wait until it is over, or choose another folder\n",
        )
    assert [path.name for path in folder.iterdir()] == ["reused_nets.py"]
