"""``surgery evolve``: what it writes and says, how it goes on, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.cli.output import Bars
from surgery.storage.folders import unfinished_folder
from tests.helpers import interrupt, same_tensors, without_epochs

NETS = """
    import torch
    from torch import nn

    def net(width=8):
        torch.manual_seed(width)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * width, 10),
        )
"""
NET = "evolve_nets:net"
ON_DIGITS = ["--trust", "--dataset", "digits", "--limit", "300"]
SHORT = [*ON_DIGITS, "--generations", "2", "--epochs", "2", "--lr", "0.05"]
ONCE = ["evolve", NET, *SHORT]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(autouse=True)
def empty_folder(module_in_folder):
    """Each command runs in a folder of its own, in which the network can be imported."""
    return module_in_folder("evolve_nets", NETS)


def weights(folder):
    return [load_file(Path(folder, name, "weights.safetensors")) for name in ("dense", "slim")]


def score(folder):
    found = surgery.evaluate(surgery.load(folder, trust=True), surgery.load_data("digits", limit=300).test)
    return {"correct": found.correct, "total": found.total}


def test_a_run_writes_both_models_a_picture_and_what_happened(run):
    code, out, err = run(*ONCE, "--long", "--lottery", "0.5", "--out", "runs/made")
    assert code == 0
    said = json.loads(Path("runs/made/evolve.json").read_text())
    assert said["command"] == f"surgery evolve {NET} {' '.join(SHORT)} --long --lottery 0.5 --out runs/made"
    assert said["settings"]["generations"] == 2
    assert [len(generation["history"]["epochs"]) for generation in said["generations"]] == [2, 2]
    assert len(said["long"]["history"]["epochs"]) == 4
    assert [ticket["sparsity"] for ticket in said["lottery"]] == [0.0, 0.5]
    assert said["generations"][-1]["dense"] == score("runs/made/dense")
    assert said["generations"][-1]["slim"] == score("runs/made/slim")
    for name in ("dense", "slim"):
        assert said["model"][name] == surgery.cost(surgery.load(f"runs/made/{name}", trust=True)).to_dict()
    assert said["data"]["train_images"] == 300

    def cell(score):
        return f"{score['correct'] / 300:.1%}"

    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    rows = {name: cells[:-1] for name, *cells in lines if cells}
    for number, generation in enumerate(said["generations"], 1):
        assert rows[str(number)] == [cell(generation["dense"]), cell(generation["slim"])]
    assert rows["long, nothing reset"] == [cell(said["long"]["dense"]), cell(said["long"]["slim"])]
    assert rows["lottery, sparsity 0.5"] == [cell(said["lottery"][-1]["score"])]
    assert rows["dense"][0] == f"{said['model']['dense']['params'] / 1000:.2f} k"
    assert rows["slim"][0] == f"{said['model']['slim']['params'] / 1000:.2f} k"
    assert "300 training and 300 test images of 8 x 8" in out
    assert "written to runs/made: dense/, slim/, generations.png, history.csv and evolve.json" in out
    assert without_epochs(err) == ["generation-1 …", "generation-2 …", "long …", "dense …", "ticket-1 …"]
    table = list(csv.DictReader(Path("runs/made/history.csv").read_text().splitlines()))
    trainings = [("generation-1", 2), ("generation-2", 2), ("long", 4), ("dense", 2), ("ticket-1", 2)]
    assert [(row["task"], row["epoch"]) for row in table] == [
        (task, str(number)) for task, epochs in trainings for number in range(1, epochs + 1)
    ]
    histories = [generation["history"] for generation in (*said["generations"], said["long"], *said["lottery"])]
    assert [float(row["loss"]) for row in table] == [e["loss"] for history in histories for e in history["epochs"]]
    assert Path("runs/made/generations.png").read_bytes().startswith(b"\x89PNG")
    files = [f"made/{who}{file}" for who in ("dense", "slim") for file in ("", "/recipe.json", "/weights.safetensors")]
    found = sorted(path.relative_to("runs").as_posix() for path in Path("runs").rglob("*"))
    assert found == sorted(
        ["made", *(f"made/{name}" for name in ("evolve.json", "generations.png", "history.csv", "run.yaml")), *files]
    )


def test_the_slim_model_serves_the_other_verbs(run):
    assert run(*ONCE, "--out", "made")[0] == 0
    slim = surgery.load("made/slim", trust=True)
    dense = surgery.load("made/dense", trust=True)
    surgery.verify(slim, surgery.slim(dense, 0.5), torch.randn(2, 3, 8, 8)).raise_if_different()
    assert run("export", "made/slim", "--trust", "--out", "slim.onnx")[0] == 0
    code, out, _ = run("bench", "made/dense", "slim.onnx", "--trust", "--min-runs", "2", "--min-seconds", "0", "--json")
    assert code == 0
    assert set(json.loads(out)["results"]) == {"made/dense", "slim.onnx"}
    assert run("inspect", "made/slim", "--trust")[0] == 0
    assert run("evolve", "made/slim", *SHORT, "--out", "again")[0] == 0


def test_with_json_the_result_and_nothing_else_is_on_stdout(run):
    code, out, _ = run(*ONCE, "--out", "made", "--json")
    assert code == 0
    assert json.loads(out) == {**json.loads(Path("made/evolve.json").read_text()), "out": "made"}


def test_scattered_weights_give_no_slim_model(run):
    code, out, _ = run(*ONCE, "--kind", "wels", "--out", "made")
    assert code == 0
    assert "scattered weights are no smaller network: there is no slim model" in out
    assert "fit-hypothesis" in out
    assert sorted(path.name for path in Path("made").iterdir()) == [
        "dense",
        "evolve.json",
        "generations.png",
        "history.csv",
        "run.yaml",
    ]


@pytest.mark.parametrize(("task", "step"), [("generation-1", 7), ("generation-2", 6), ("long", 13), ("ticket-1", 4)])
def test_an_interrupted_run_says_how_to_resume_and_ends_with_the_same_models(run, monkeypatch, task, step):
    command = [*ONCE, "--long", "--lottery", "0.5", "--recalibrate", "--augment", "flip-crop"]
    assert run(*command, "--out", "whole")[0] == 0
    with monkeypatch.context() as patched:
        interrupt(patched, task, step)
        code, out, err = run(*command, "--out", "cut", "--checkpoint-every", "1")
    said = "what is done is kept in cut.unfinished: give the same command again to go on"
    assert (code, out, without_epochs(err)) == (130, "", [said])
    assert not Path("cut").exists()
    steps = []
    monkeypatch.setattr(Bars, "__call__", lambda bars, at, done, total: steps.append((at, done)))
    assert run(*command, "--out", "cut")[0] == 0
    assert next(done for at, done in steps if at == task) == step - 1
    assert all(map(same_tensors, weights("whole"), weights("cut")))
    whole, cut = (json.loads(Path(name, "evolve.json").read_text()) for name in ("whole", "cut"))
    assert [(g["dense"], g["slim"]) for g in whole["generations"]] == [
        (g["dense"], g["slim"]) for g in cut["generations"]
    ]
    assert whole["lottery"][-1]["score"] == cut["lottery"][-1]["score"]
    assert not Path("cut.unfinished").exists()


def test_a_killed_run_resumes_in_another_process(run, empty_folder):
    code = f"""
        import os
        from surgery.cli import main
        from surgery.cli.output import Bars

        Bars.__call__ = lambda bars, task, done, total: (task, done) == ("generation-2", 6) and os._exit(9)
        main({[*ONCE, "--out", "cut"]!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=empty_folder, env=ENVIRONMENT)
    assert done.returncode == 9
    assert {path.name for path in empty_folder.iterdir()} == {"evolve_nets.py", "cut.unfinished"}
    assert run(*ONCE, "--out", "cut")[0] == run(*ONCE, "--out", "whole")[0] == 0
    assert all(map(same_tensors, weights("whole"), weights("cut")))


def test_epochs_are_followed_while_a_run_goes_on_and_all_of_them_in_one_run_of_a_tracker(run, monkeypatch):
    told = []

    class Tracker:
        name = "mlflow"

        def __init__(self, where):
            told.append(where)

        def start(self): ...

        def store_init_configuration(self, values): ...

        def log(self, values, step):
            told.append((next(iter(values)), step))

        def finish(self):
            told.append("finish")

    monkeypatch.setattr("accelerate.tracking.MLflowTracker", Tracker)
    monkeypatch.setattr("accelerate.utils.is_mlflow_available", lambda: True)
    command = [*ONCE, "--lottery", "0.5", "--tracker", "mlflow:mine", "--out", "made"]
    with monkeypatch.context() as patched:
        interrupt(patched, "ticket-1", 5)
        assert run(*command)[0] == 130
    trainings = ["generation-1", "generation-2", "dense", "ticket-1"]
    epochs = [(task, number) for task in trainings for number in (1, 2)][:-1]
    table = Path("made.unfinished/history.csv").read_text().splitlines()
    assert [(row["task"], int(row["epoch"])) for row in csv.DictReader(table)] == epochs
    assert told == ["mine", *((f"{task}/images", number) for task, number in epochs), "finish"]
    assert run(*command)[0] == 0
    assert told[-3:] == ["mine", ("ticket-1/images", 2), "finish"]
    assert Path("made/run.yaml").read_text().count("tracker: mlflow:mine") == 1


def test_a_command_with_other_settings_does_not_resume_an_earlier_run(run, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, "generation-2", 1)
        assert run(*ONCE, "--out", "made")[0] == 130
    code, _, err = run(*ONCE, "--seed", "1", "--out", "made")
    assert code == 2
    assert err.startswith("error: made.unfinished belongs to an unfinished run with seed 0 and not 1: use its setti")
    assert run(*ONCE, "--seed", "1", "--out", "made", "--force")[0] == 0
    assert json.loads(Path("made/evolve.json").read_text())["settings"]["seed"] == 1


def test_a_command_into_the_folder_of_a_running_one_is_refused_in_one_line(run):
    said = "error: another run is writing to made.unfinished: wait until it is over, or choose another folder\n"
    with unfinished_folder("made", {"seed": 0}):
        assert run(*ONCE, "--out", "made") == run(*ONCE, "--out", "made", "--force") == (2, "", said)
    assert not Path("made.unfinished").exists()


def test_several_processes_print_and_write_once(empty_folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "surgery"]
    arguments = [*ONCE, "--recalibrate", "--augment", "flip-crop", "--out", "made", "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert done.stderr.count("generation-2 …") == 1
    assert said["generations"][-1]["slim"] == score("made/slim")
    assert {path.name for path in empty_folder.iterdir()} == {"evolve_nets.py", "made"}


def test_every_option_changes_the_result(run):
    """Each option alone leads to another dense or slim model."""
    options = [
        [], ["--split-rate", "0.7"], ["--split-rate", "0=0.5"], ["--epochs", "1"], ["--generations", "1"],
        ["--kind", "wels"], ["--recalibrate"], ["--keep", "biases"], ["--keep", "norms"], ["--keep", "statistics"],
        ["--initialiser", "authors"], ["--lr", "0.02"], ["--schedule", "constant"], ["--batch-size", "50"],
        ["--weight-decay", "0.1"], ["--label-smoothing", "0.1"], ["--augment", "flip"], ["--optimizer", "adamw"],
        ["--precision", "bf16"], ["--seed", "1"],
    ]  # fmt: skip
    found = []
    for option in options:
        assert run(*ONCE, *option, "--out", "made", "--force")[0] == 0
        files = sorted(Path("made").glob("*/weights.safetensors"))
        found.append([file.read_bytes() for file in files])
        assert found[-1] not in found[:-1], option


def test_every_option_reaches_the_evolution(run, monkeypatch):
    seen = {}

    def asked(network, data, rate, generations, settings, **options):
        seen.update(settings.to_dict(), **options, rate=rate, generations=generations)
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "evolve", asked)
    base = ["evolve", NET, *ON_DIGITS, "--out", "made"]
    run(*base)
    usual = {"rate": 0.5, "generations": 5, **surgery.EvolveSettings().to_dict()}
    assert {name: seen[name] for name in usual} == usual
    assert seen["reset"] == {"initialiser": "own", "trust": True}
    run(*base, "--optimizer", "adamw", "--keep", "norms", "--keep", "biases")
    assert seen["optimizer"] == "adamw"
    assert seen["reset"] == {"initialiser": "own", "trust": True, "norms": False, "biases": False}


LONG = [*ON_DIGITS, "--out", "made"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [NET, *LONG, "--split-rate", "half"],
            "--split-rate 'half' is neither a number nor of the form LAYER=NUMBER\n",
        ),
        ([NET, *LONG, "--split-rate", "0"], "split rate must be in (0, 1], not 0.0\n"),
        ([NET, *LONG, "--split-rate", "layer9=0.5"], "unknown layer 'layer9'"),
        ([NET, *LONG, "--kind", "wels", "--split-rate", "0=0.5"], "WELS takes one rate for the whole network\n"),
        ([NET, *LONG, "--kind", "keel"], "unknown kind 'keel'; did you mean 'kels'"),
        (
            [NET, *LONG, "--kind", "wels", "--recalibrate"],
            "--recalibrate is for the slim network, and WELS gives none\n",
        ),
        ([NET, *LONG, "--generations", "0"], "--generations must be a whole number of at least 1, not 0\n"),
        ([NET, *LONG, "--epochs", "0"], "--epochs must be a whole number of at least 1, not 0\n"),
        ([NET, *LONG, "--keep", "weights"], "unknown part to keep 'weights'"),
        ([NET, *LONG, "--initialiser", "paper"], "unknown initialiser 'paper'"),
        ([NET, *LONG, "--lottery", "1"], "sparsity must be in [0, 1), not 1.0\n"),
        (
            [NET, *LONG, "--lottery", "0.5", "--generations", "1"],
            "--lottery prunes after each training but the last: it needs --generations 2 or more\n",
        ),
        ([NET, *LONG, "--optimizer", "adam"], "unknown optimizer 'adam'; did you mean 'adamw'"),
        ([NET, *LONG, "--schedule", "linear"], "unknown schedule 'linear'"),
        ([NET, *LONG, "--lr", "0"], "--lr must be a number above 0, not 0.0\n"),
        ([NET, *LONG, "--weight-decay", "-1"], "--weight-decay must be a number of at least 0, not -1.0\n"),
        ([NET, *LONG, "--label-smoothing", "1.5"], "--label-smoothing must be a number of at least "),
        ([NET, *LONG, "--batch-size", "1"], "--batch-size must be a whole number of at least 2, "),
        ([NET, *LONG, "--checkpoint-every", "0"], "--checkpoint-every must be a whole number of at "),
        ([NET, *LONG, "--image-size", "0"], "--image-size must be a whole number of at least 1, not 0\n"),
        ([NET, *LONG, "--image-size", "12"], "the model cannot be run on 12 x 12 images"),
        ([NET, *LONG, "--augment", "rotate"], "unknown augmentation 'rotate'"),
        ([NET, *LONG, "--precision", "fp8"], "unknown precision 'fp8'; did you mean "),
        ([NET, *LONG, "--device", "cuda"], "--device cuda: there is no GPU here that torch can use\n"),
        ([NET, "--dataset", "digits", "--out", "made"], "'evolve_nets:net' would import and run code"),
        (["raft_small", *LONG], "model 'raft_small' takes two images of 3 x 440 x 1024, and the data are "),
        (["nowhere/", *LONG], "there is no saved model at nowhere/\n"),
        ([NET, "--trust", "--dataset", "mnist", "--out", "made"], "unknown data set 'mnist'"),
        ([NET, "--trust", "--dataset", "digits"], "Missing option '--out'"),
        (
            [NET, *ON_DIGITS, "--out", "evolve_nets.py/made"],
            "cannot write evolve_nets.py/made: ",
        ),
    ],
)
def test_an_invalid_command_prints_one_line_exits_with_2_and_writes_nothing(
    run, empty_folder, monkeypatch, arguments, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("evolve", *arguments)
    assert err.startswith(f"error: {message}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [path.name for path in empty_folder.iterdir()] == ["evolve_nets.py"]


def test_force_replaces_an_earlier_result_but_no_other_folder(run):
    Path("made").mkdir()
    Path("made", "thesis.txt").write_text("years of work")
    assert run(*ONCE, "--out", "made", "--force")[0] == 2
    Path("made", "thesis.txt").unlink()
    assert run(*ONCE, "--out", "made", "--force")[0] == 0
    code, _, err = run(*ONCE, "--out", "made")
    assert (code, err) == (2, "error: made exists: choose another folder, or replace it with --force\n")
