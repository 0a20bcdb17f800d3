"""``surgery compress``: what it writes and says, how it goes on, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from tests.helpers import interrupt, load_digits, same_tensors
from tests.zoo import digits_net

NETS = """
    from tests.zoo import digits_net

    def net():
        return digits_net()
"""
GIVEN = ["--trust", "--dataset", "digits", "--limit", "300"]
SHORT = [*GIVEN, "--macs", "0.3", "--epochs", "2", "--batch-size", "32"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a network that knows the digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        traced = surgery.trace(digits_net().eval(), torch.zeros(2, 3, 8, 8), source="compress_nets:net")
    dense = surgery.train(traced, load_digits(300), epochs=4, lr=0.05).module
    return surgery.save(dense, tmp_path_factory.mktemp("saved") / "dense")


@pytest.fixture(autouse=True)
def empty_folder(module_in_folder, saved):
    """Each command runs in a folder of its own, with the saved network."""
    folder = module_in_folder("compress_nets", NETS)
    shutil.copytree(saved, folder / "dense")
    return folder


def weights_of(folder):
    return load_file(Path(folder) / "student" / "weights.safetensors")


def test_a_run_writes_the_student_and_what_happened(run):
    code, out, err = run("compress", "dense", *SHORT, "--steps", "2", "--out", "runs/made")
    assert code == 0
    assert max(map(len, out.splitlines()[:-1])) <= 80
    written = {path.relative_to("runs/made").as_posix() for path in Path("runs/made").rglob("*")}
    assert written == {
        *("results.json", "history.csv", "report.md", "run.yaml"),
        *("student", "student/recipe.json", "student/weights.safetensors"),
    }
    student = surgery.load("runs/made/student", trust=True)
    said = json.loads(Path("runs/made/results.json").read_text())
    score = surgery.evaluate(student, load_digits(300).test)
    assert said["student"]["score"] == {"correct": score.correct, "total": score.total}
    assert said["student"]["macs"] == surgery.cost(student).macs == said["measured"] <= said["limit"]
    assert said["command"].startswith("surgery compress dense --trust --dataset digits")
    assert [step["epochs"] for step in said["steps"]] == [1, 2]
    lines = [line.split() for line in out.splitlines()]
    assert f"{score.accuracy:.1%}" in next(line for line in lines if line[:1] == ["student"])
    assert len([line for line in lines if line[:1] in (["1"], ["2"]) and line[1] != "s;"]) == 2
    rows = list(csv.DictReader(Path("runs/made/history.csv").read_text().splitlines()))
    assert [(row["task"], row["epoch"]) for row in rows] == [("step 1", "1"), ("step 2", "1"), ("step 2", "2")]
    assert "step 2: recover, distill, epoch 2: loss" in err

    repeated = ["compress", "dense", "--dataset", "digits", "--config", "runs/made/run.yaml", "--json"]
    code, out, _ = run(*repeated, "--out", "again")
    assert code == 0
    assert same_tensors(weights_of("again"), weights_of("runs/made"))
    assert json.loads(out) == {**json.loads(Path("again/results.json").read_text()), "out": "again"}


def test_an_interrupted_run_goes_on_to_the_same_student(run, monkeypatch):
    assert run("compress", "dense", *SHORT, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "step 1: recover", 812)
        code, _, err = run("compress", "dense", *SHORT, "--out", "made")
    assert code == 130
    assert "what is done is kept in made.unfinished: give the same command again to go on" in err
    assert not Path("made").exists()
    code, _, err = run("compress", "dense", *SHORT, "--out", "made")
    assert code == 0
    assert "epoch 1:" not in err
    assert same_tensors(weights_of("made"), weights_of("whole"))
    assert not Path("made.unfinished").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "Missing option '--macs': say what the student may cost, by one budget"),
        (["--macs", "0.5", "--params", "3M"], "--macs and --params are budgets of different kinds"),
        (["--macs", "much"], "a budget of macs is a number above 0"),
        (["--macs", "0.5", "--steps", "0"], "--steps must be a whole number of at least 1"),
        (["--macs", "0.5", "--validation", "1"], "--validation must be a number above 0 and below 1"),
        (["--macs", "0.5", "--lr-least", "0.5", "--lr-most", "0.2"], "--lr-least is 0.5: it must be at most lr_most"),
        (["--macs", "0.5", "--importance", "luck"], "unknown importance 'luck'"),
        (["--params", "100"], "no model of these widths keeps to 100 parameters"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, given, said):
    code, out, err = run("compress", "dense", *GIVEN, *given, "--out", "made")
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert not Path("made").exists()
    assert not Path("made.unfinished").exists()


def test_random_weights_are_refused(run):
    code, _, err = run("compress", "resnet18", "--dataset", "digits", "--macs", "0.5", "--out", "made")
    assert code == 2
    assert "the model 'resnet18' has random weights, of which nothing can be kept" in err
