"""``surgery distill``: what it writes and says, how it goes on, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.cli.losses import LOSSES, LossOptions, objectives
from surgery.cli.output import Bars
from surgery.errors import UsageError
from surgery.training.distilling.objectives import DKD, KD, RKD, AttentionTransfer, Hint, ReviewKD
from tests.helpers import interrupt, same_tensors, without_epochs

NETS = """
    import torch
    from torch import nn

    def net(width, classes=10):
        torch.manual_seed(width)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * width, classes),
        )
"""
STUDENT, TEACHER = "distill_nets:net?width=3", "distill_nets:net?width=8"
ON_DIGITS = ["--trust", "--dataset", "digits", "--limit", "300"]
SHORT = [*ON_DIGITS, "--teacher-epochs", "3", "--hint-epochs", "1", "--epochs", "2"]
ONCE = ["distill", STUDENT, TEACHER, *SHORT]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(autouse=True)
def empty_folder(module_in_folder):
    """Each command runs in a folder of its own, in which the networks can be imported."""
    return module_in_folder("distill_nets", NETS)


def weights_of(folder):
    return load_file(Path(folder) / "student" / "weights.safetensors")


def score(folder):
    model = surgery.load(folder, trust=True)
    assert not model.training
    found = surgery.evaluate(model, surgery.load_data("digits", limit=300).test)
    return {"correct": found.correct, "total": found.total}


def test_a_run_writes_the_student_the_teacher_it_trained_and_what_happened(run, empty_folder):
    code, out, err = run(*ONCE, "--out", "runs/made")
    assert code == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    rows = {name: cells for name, *cells in lines if len(cells) == 5 and name}
    assert list(rows) == ["teacher", "student before", "student after"]
    assert "hint: 6 learned 0" in out
    assert "written to runs/made: student/, teacher/, history.csv and distill.json" in out
    assert without_epochs(err) == ["teacher …", "hints: cache …", "hints …", "distill: cache …", "distill …"]
    assert sorted(path.relative_to("runs").as_posix() for path in Path("runs").rglob("*")) == [
        "made",
        "made/distill.json",
        "made/history.csv",
        "made/run.yaml",
        *(
            f"made/{who}{file}"
            for who in ("student", "teacher")
            for file in ("", "/recipe.json", "/weights.safetensors")
        ),
    ]
    said = json.loads((empty_folder / "runs" / "made" / "distill.json").read_text())
    assert said["command"].startswith(f"surgery distill '{STUDENT}' '{TEACHER}' --trust --dataset digits --limit 300 ")
    assert said["settings"]["teacher_epochs"] == 3
    assert said["score"] == score("runs/made/student")
    assert said["teacher_score"] == score("runs/made/teacher")
    assert rows["student after"][0] == f"{said['score']['correct'] / 300:.1%}"
    assert rows["teacher"][0] == f"{said['teacher_score']['correct'] / 300:.1%}"
    assert said["names"] == [["6", "0"]]
    assert [len(said[name]["epochs"]) for name in ("teacher_history", "hints", "history")] == [3, 1, 2]
    assert said["history"]["epochs"][-1]["score"] == said["score"]
    table = list(csv.DictReader(Path("runs/made/history.csv").read_text().splitlines()))
    assert list(table[0]) == ["task", "epoch", "images", "loss", "lr", "accuracy", "seconds"]
    assert [(row["task"], row["epoch"]) for row in table] == [
        *(("teacher", "1"), ("teacher", "2"), ("teacher", "3")),
        *(("hints", "1"), ("distill", "1"), ("distill", "2")),
    ]
    assert [row["accuracy"] == "" for row in table] == [False, False, False, True, False, False]
    last = said["history"]["epochs"][-1]
    assert [float(table[-1][name]) for name in ("loss", "lr")] == [last["loss"], last["lr"]]
    assert float(table[-1]["accuracy"]) == last["score"]["correct"] / 300
    accuracy = f"accuracy {last['score']['correct'] / 300:.2%}, rate {last['lr']:.3g}"
    assert f"distill, epoch 2: loss {last['loss']:.4g}, {accuracy}" in err.splitlines()
    assert said["student"]["params"] == sum(
        p.numel() for p in surgery.load("runs/made/student", trust=True).parameters()
    )
    assert said["data"]["train_images"] == 300


def test_with_json_the_result_and_nothing_else_is_on_stdout(run):
    code, out, _ = run(*ONCE, "--out", "made", "--json")
    assert code == 0
    written = json.loads(Path("made/distill.json").read_text())
    assert json.loads(out) == {**written, "out": "made"}


def test_a_saved_teacher_is_taken_as_it_is_and_not_written_again(run):
    assert run(*ONCE, "--out", "first")[0] == 0
    code, *_ = run("distill", STUDENT, "first/teacher", *ON_DIGITS, "--epochs", "2", "--out", "second", "--json")
    assert code == 0
    first, second = (json.loads(Path(name, "distill.json").read_text()) for name in ("first", "second"))
    assert first["teacher_score"] == second["teacher_score"]
    assert second["teacher_history"] is None
    assert sorted(path.name for path in Path("second").iterdir()) == [
        "distill.json",
        "history.csv",
        "run.yaml",
        "student",
    ]


def test_a_student_that_was_saved_goes_on_learning_and_keeps_its_recipe(run):
    assert run(*ONCE, "--out", "first")[0] == 0
    assert run("slim", "first/student", "--trust", "--rate", "0.7", "--out", "slim")[0] == 0
    options = ["--trust", "--dataset", "digits", "--epochs", "2", "--joint", "--weight", "hint=1"]
    code, out, _ = run("distill", "slim", "first/teacher", *options, "--limit", "300", "--out", "second", "--json")
    assert code == 0
    assert json.loads(out)["hints"] is None
    student = surgery.load("second/student", trust=True)
    assert len(surgery.recipe(student).steps) == len(surgery.recipe(surgery.load("slim", trust=True)).steps) == 1
    assert student.state_dict().keys() == surgery.load("slim", trust=True).state_dict().keys()


def test_a_teacher_that_guesses_is_reported(run):
    _, out, _ = run("distill", STUDENT, TEACHER, *ON_DIGITS, "--hint-epochs", "0", "--epochs", "1", "--out", "made")
    assert "the teacher is no better than guessing: train it (--teacher-epochs)" in out
    assert "no better than guessing" not in run(*ONCE, "--out", "better")[1]


@pytest.mark.parametrize(("task", "step"), [("teacher", 7), ("hints: cache", 2), ("hints", 3), ("distill", 6)])
def test_an_interrupted_run_says_how_to_resume_and_ends_with_the_same_student(run, monkeypatch, task, step):
    assert run(*ONCE, "--out", "whole")[0] == 0
    with monkeypatch.context() as patched:
        interrupt(patched, task, step)
        code, out, err = run(*ONCE, "--out", "cut", "--checkpoint-every", "1")
    said = "what is done is kept in cut.unfinished: give the same command again to go on"
    assert (code, out, without_epochs(err)) == (130, "", [said])
    assert not Path("cut").exists()
    steps = []
    monkeypatch.setattr(Bars, "__call__", lambda bars, at, done, total: steps.append((at, done)))
    assert run(*ONCE, "--out", "cut")[0] == 0
    assert next(done for at, done in steps if at == task) == (1 if "cache" in task else step - 1)
    assert same_tensors(weights_of("whole"), weights_of("cut"))
    assert not Path("cut.unfinished").exists()


def test_a_killed_run_resumes_in_another_process(run, empty_folder):
    code = f"""
        import os
        from surgery.cli import main
        from surgery.cli.output import Bars

        Bars.__call__ = lambda bars, task, done, total: (task, done) == ("distill", 6) and os._exit(9)
        main({[*ONCE, "--out", "cut"]!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=empty_folder, env=ENVIRONMENT)
    assert done.returncode == 9
    assert {path.name for path in empty_folder.iterdir()} == {"distill_nets.py", "cut.unfinished"}
    assert run(*ONCE, "--out", "cut")[0] == run(*ONCE, "--out", "whole")[0] == 0
    assert same_tensors(weights_of("whole"), weights_of("cut"))


def test_a_command_with_other_settings_does_not_resume_an_earlier_run(run, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt(patched, "hints", 1)
        assert run(*ONCE, "--out", "made")[0] == 130
    code, _, err = run(*ONCE, "--seed", "1", "--out", "made")
    assert code == 2
    assert err.startswith("error: made.unfinished belongs to an unfinished run with seed 0 and not 1: use its settings")
    assert run(*ONCE, "--seed", "1", "--out", "made", "--force")[0] == 0
    assert json.loads(Path("made/distill.json").read_text())["settings"]["seed"] == 1


def test_force_replaces_an_earlier_result_but_no_other_folder(run, empty_folder):
    (empty_folder / "made").mkdir()
    (empty_folder / "made" / "thesis.txt").write_text("years of work")
    assert run(*ONCE, "--out", "made", "--force")[0] == 2
    shutil.rmtree("made")
    assert run(*ONCE, "--out", "made")[0] == 0
    code, _, err = run(*ONCE, "--out", "made")
    assert (code, err) == (2, "error: made exists: choose another folder, or replace it with --force\n")
    assert run(*ONCE, "--out", "made", "--epochs", "1", "--force")[0] == 0
    assert json.loads(Path("made/distill.json").read_text())["settings"]["epochs"] == 1


def test_a_cache_in_a_folder_serves_later_runs_and_changes_nothing(run):
    base = ["distill", STUDENT, "first/teacher", *ON_DIGITS, "--hint-epochs", "1", "--epochs", "2"]
    assert run(*ONCE, "--out", "first")[0] == 0
    told = [without_epochs(run(*base, "--out", out, "--cache", cache)[2])
            for out, cache in (("a", "kept"), ("b", "kept"), ("c", "none"))]  # fmt: skip
    assert told[0] == ["hints: cache …", "hints …", "distill: cache …", "distill …"]
    assert told[1] == told[2] == ["hints …", "distill …"]
    assert sorted(path.name for path in Path("kept").iterdir()) == ["distill", "hints"]
    assert same_tensors(weights_of("a"), weights_of("b"))
    for name, tensor in weights_of("a").items():
        assert torch.allclose(tensor, weights_of("c")[name], atol=1e-3), name


def test_several_processes_print_and_write_once(empty_folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "surgery"]
    done = subprocess.run([*command, *ONCE, "--out", "made", "--json"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert done.stderr.count("hints …") == 1
    assert said["score"] == score("made/student")
    assert {path.name for path in empty_folder.iterdir()} == {"distill_nets.py", "made"}


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


@pytest.mark.parametrize(
    ("names", "options", "expected", "label_weight"),
    [
        (["kd"], {}, (KD(),), None),
        (["none"], {"weight": ["labels=0.5"]}, (), 0.5),
        (["kd"], {"temperature": 5.0, "weight": ["kd=2"]}, (KD(temperature=5.0, weight=2.0, final_weight=2.0),), None),
        (["kd"], {"weight": ["kd=3,0.5"]}, (KD(weight=3.0, final_weight=0.5),), None),
        (["kd-divergence"], {"weight": ["labels=0.1"]}, (KD(4.0, 0.9, 0.9, form="divergence"),), 0.1),
        (["kd-divergence"], {"standardise": True}, (KD(2.0, 9.0, 9.0, form="divergence", standardise=True),), None),
        (
            ["kd-divergence"],
            {"standardise": True, "temperature": 3.0},
            (KD(3.0, 9.0, 9.0, form="divergence", standardise=True),),
            None,
        ),
        (["dkd", "rkd"], {"temperature": 2.0, "weight": ["rkd=3"]}, (DKD(temperature=2.0), RKD(weight=3.0)), None),
        (
            ["at", "review"],
            {"tap": ["a=b", "c.0=d"], "warmup_epochs": 2.5},
            (AttentionTransfer({"a": "b", "c.0": "d"}), ReviewKD({"a": "b", "c.0": "d"}, warmup_epochs=2.5)),
            None,
        ),
        (["kd"], {"hint": Hint("a", "b"), "weight": ["hint=7"]}, (KD(), Hint("a", "b", weight=7.0)), None),
    ],
)
def test_losses_by_name_have_the_given_settings(names, options, expected, label_weight):
    hint = options.pop("hint", None)
    assert objectives(LossOptions(loss=names, **options), hint) == (expected, label_weight)


@pytest.mark.parametrize("name", [*LOSSES, "none"])
def test_every_loss_teaches(run, name):
    options = ["--hint-epochs", "0", "--epochs", "1", "--loss", name]
    code, _, err = run("distill", STUDENT, TEACHER, *ON_DIGITS, *options, "--out", "made", "--json")
    assert code == 0, err
    before = surgery.models.build(STUDENT, trust=True).state_dict()
    assert not torch.equal(before["0.weight"], weights_of("made")["0.weight"])


def test_every_option_reaches_the_distillation(run, monkeypatch):
    asked = {}

    def take(student, teacher, data, settings, **options):
        asked.update(settings.to_dict(), **options)
        asked.update(image_size=data.image_size, images=data.counts[0])
        raise UsageError("enough")

    monkeypatch.setattr(surgery, "distill", take)
    options = (
        "--guided 0 --guided 3 --hint 3 --hint 0 --regressor fc --hint-epochs 7 --epochs 9 --joint --loss rkd "
        "--weight labels=0.3 --label-smoothing 0.1 --optimizer sgd --lr 0.2 --hint-lr 0.3 --schedule constant "
        "--batch-size 50 --augment flip --cache none --image-size 8 --precision bf16 --workers 1 "
        "--compile --erase 0.25 --mixup 0.2 --cutmix 0.5 --checkpoint-every 11 --seed 3 --channels-last "
        "--evaluation-batch 70"
    )
    assert run("distill", STUDENT, TEACHER, *ON_DIGITS, *options.split(), "--out", "made")[2] == "error: enough\n"
    layers = {"guided": ["0", "3"], "hint": ["3", "0"], "regressor": "fc"}
    expected = {
        **layers, "hint_epochs": 7, "epochs": 9, "objectives": (RKD(), Hint(**layers)), "label_weight": 0.3,
        "label_smoothing": 0.1, "optimizer": "sgd", "lr": 0.2, "hint_lr": 0.3, "schedule": "constant",
        "batch_size": 50, "cache": "none", "precision": "bf16", "workers": 1, "checkpoint_every": 11, "seed": 3,
        "test_each_epoch": True, "checkpoint": Path("made.unfinished"), "augment": "flip", "image_size": 8,
        "erase": 0.25, "mixup": 0.2, "cutmix": 0.5, "tracker": None, "compile": True,
        "images": 300, "channels_last": True, "momentum": 0.9, "weight_decay": None,
        "evaluation_batch": 70,
    }  # fmt: skip
    assert {name: value for name, value in asked.items() if name != "progress"} == expected


OUT = ["--out", "made"]
LONG = [*ON_DIGITS, *OUT]
TAUGHT = [*LONG, "--teacher-epochs", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["resnet18", "resnet34", *LONG],
            "the teacher 'resnet34' has random weights, from which nothing can be learned: train it first "
            "(--teacher-epochs 10), take published weights (--teacher-weights DEFAULT), or pass a saved folder\n",
        ),
        ([STUDENT, "fitnet1", *LONG], "the teacher 'fitnet1' has random weights"),
        ([STUDENT, TEACHER, "--dataset", "digits", *OUT], f"'{STUDENT.partition('?')[0]}' would import and run code"),
        ([STUDENT, TEACHER, *LONG, "--loss", "kdd"], "unknown loss 'kdd'; did you mean 'kd'"),
        ([STUDENT, TEACHER, *LONG, "--loss", "kd", "--loss", "kd"], "--loss kd is given more than once\n"),
        (
            [STUDENT, TEACHER, *LONG, "--loss", "kd", "--loss", "none"],
            "--loss none is for a student that learns l",
        ),
        (
            [STUDENT, TEACHER, *LONG, "--loss", "at", "--temperature", "2"],
            "--temperature is for kd, kd-divergence, ",
        ),
        (
            [STUDENT, TEACHER, *LONG, "--loss", "dkd", "--standardise"],
            "--standardise is for kd, kd-divergence: choose ",
        ),
        ([STUDENT, TEACHER, *LONG, "--warmup-epochs", "2"], "--warmup-epochs is for dkd, review: choose one of them "),
        ([STUDENT, TEACHER, *LONG, "--tap", "0=0"], "--tap is for at, review: choose one of them with --loss\n"),
        (
            [STUDENT, TEACHER, *LONG, "--loss", "at", "--tap", "0"],
            "--tap '0' is not of the form GUIDED=HINT, a lay",
        ),
        ([STUDENT, TEACHER, *LONG, "--weight", "2"], "--weight '2' is not of the form LOSS=NUMBER, or kd=FROM,TO\n"),
        ([STUDENT, TEACHER, *LONG, "--weight", "kd=1,2,3"], "--weight 'kd=1,2,3' is not of the form LOSS=NUMBER, or "),
        ([STUDENT, TEACHER, *LONG, "--weight", "labels=1,2"], "--weight 'labels=1,2' is not of the form LOSS=NUMBER, "),
        ([STUDENT, TEACHER, *LONG, "--weight", "rkd=1"], "--weight 'rkd=1': what is learned is kd, labels\n"),
        (
            [STUDENT, TEACHER, *LONG, "--loss", "rkd", "--weight", "rkd=1,2"],
            "the weight of RKD does not decay: give it one number\n",
        ),
        ([STUDENT, TEACHER, *LONG, "--weight", "kd=-1"], "weight of KD must be a number of at least 0, not -1.0\n"),
        ([STUDENT, TEACHER, *LONG, "--temperature", "0"], "temperature of KD must be a number above 0, not 0.0\n"),
        (
            [STUDENT, TEACHER, *LONG, "--hint", "0", "--hint-epochs", "0"],
            "--guided and --hint are of stage 1 and of --joint, and --hint-epochs 0 leaves both out\n",
        ),
        ([STUDENT, TEACHER, *LONG, "--guided", "9"], "unknown layer '9'"),
        (
            [STUDENT, TEACHER, *LONG, "--guided", "0", "--guided", "3"],
            "2 guided layers for 1 hints: each pair",
        ),
        ([STUDENT, TEACHER, *LONG, "--regressor", "linear"], "unknown regressor 'linear'"),
        ([STUDENT, TEACHER, *LONG, "--joint", "--regressor", "linear"], "unknown regressor 'linear'"),
        (
            [STUDENT, TEACHER, *LONG, "--epochs", "0", "--hint-epochs", "0"],
            "--hint-epochs and --epochs are 0: there is nothing to train",
        ),
        (
            [STUDENT, TEACHER, *LONG, "--teacher-epochs", "-1"],
            "--teacher-epochs must be a whole number of at least ",
        ),
        ([STUDENT, TEACHER, *LONG, "--image-size", "0"], "--image-size must be a whole number of at least 1, not 0\n"),
        (
            [STUDENT, TEACHER, *LONG, "--image-size", "9"],
            "the student cannot be run on 9 x 9 images, try another size",
        ),
        (
            [STUDENT, f"{TEACHER}&classes=7", *LONG],
            "'digits' has 10 classes, but from 2 images the teacher makes (2, 7)\n",
        ),
        (
            ["raft_small", TEACHER, *LONG],
            "model 'raft_small' takes two images of 3 x 440 x 1024, and the data are ",
        ),
        ([STUDENT, TEACHER, *LONG, "--device", "gpu"], "unknown device 'gpu'"),
        ([STUDENT, TEACHER, *LONG, "--device", "cuda"], "--device cuda: there is no GPU here that torch can use\n"),
        ([STUDENT, TEACHER, *LONG, "--precision", "fp8"], "unknown precision 'fp8'; did you mean "),
        ([STUDENT, TEACHER, *LONG, "--augment", "rotate"], "unknown augmentation 'rotate'"),
        (
            [STUDENT, TEACHER, *LONG, "--augment", "flip", "--cache", "memory"],
            "the images change from one reading to the next (augmentation), so the teacher's outputs cannot be ",
        ),
        ([STUDENT, TEACHER, *LONG, "--optimizer", "adam"], "unknown optimizer 'adam'; did you mean 'adamw'"),
        ([STUDENT, TEACHER, *LONG, "--schedule", "linear"], "unknown schedule 'linear'"),
        (
            [STUDENT, TEACHER, *LONG, "--checkpoint-every", "0"],
            "--checkpoint-every must be a whole number of at ",
        ),
        (
            [STUDENT, TEACHER, *LONG, "--label-smoothing", "1.5"],
            "--label-smoothing must be a number of at least ",
        ),
        ([STUDENT, *LONG], "Missing argument 'TEACHER'"),
        ([STUDENT, TEACHER, *TAUGHT, "--lr", "0"], "--lr must be a number above 0, not 0.0\n"),
        ([STUDENT, TEACHER, *TAUGHT, "--guided", "9"], "unknown layer '9'"),
        ([STUDENT, TEACHER, *TAUGHT, "--loss", "at", "--tap", "9=0"], "unknown layer '9'"),
        ([STUDENT, TEACHER, *TAUGHT, "--augment", "flip", "--cache", "kept"], "the images change from one reading to "),
    ],
)
def test_an_invalid_command_prints_one_line_exits_with_2_and_writes_nothing(
    run, empty_folder, monkeypatch, arguments, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("distill", *arguments)
    assert err.startswith(f"error: {message}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [path.name for path in empty_folder.iterdir()] == ["distill_nets.py"]
