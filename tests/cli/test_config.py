"""Options from a YAML file, and the file in the folder of a run that repeats it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import surgery
from surgery.deploy.curve.points import DataSummary, Tradeoff
from surgery.deploy.measure.environment import environment
from surgery.training.data.data import Normalisation
from tests.deploy.curve.test_tradeoff_page import point


@pytest.fixture
def given(monkeypatch, tmp_path):
    """What `surgery.tradeoff` is called with, which does no more than make its folder."""
    monkeypatch.chdir(tmp_path)
    data = DataSummary("digits", 100, 1000, tuple("0123456789"), 8, Normalisation())
    settings = surgery.TradeoffSettings(threads=1)
    result = Tradeoff("resnet18", data, settings, (point("1", 950, 4.0),), None, (), environment(), 1.0, "surgery")
    calls = []

    def tradeoff(source, **options):
        calls.append({"source": source, **options})
        options["directory"].mkdir()
        return replace(result, settings=options["settings"])

    monkeypatch.setattr(surgery, "tradeoff", tradeoff)
    return calls


FILE = """
model: resnet18
dataset: digits
split-rates: [1.0, 0.5]
candidate: [widen=1.5, macs=40%]
finetune_epochs: 2
lr: 1e-2
optimizer: adamw
test-each-epoch: true
skip-bad: false
limit: 64
"""


def test_options_of_a_file_are_those_of_the_command(run, given):
    Path("mine.yaml").write_text(FILE)
    assert run("tradeoff", "--config", "mine.yaml", "--out", "made")[0] == 0
    (call,) = given
    assert (call["source"], call["dataset"], call["rates"]) == ("resnet18", "digits", [1.0, 0.5])
    assert call["candidates"] == ["widen=1.5", "macs=40%"]
    settings = surgery.TradeoffSettings(
        finetune_epochs=2, lr=0.01, optimizer="adamw", test_each_epoch=True, skip_bad=False, limit=64
    )
    assert call["settings"] == settings


def test_the_file_of_the_guide_is_one(run, given):
    guide = (Path(surgery.__file__).parents[1] / "docs" / "guide" / "shell.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    Path("run.yaml").write_text(block)
    assert run("tradeoff", "--config", "run.yaml", "--device", "cpu", "--out", "made")[0] == 0
    assert given[0]["candidates"] == ["macs=40%", "slim:layer4=0.5+deepen:layer3=1"]
    assert given[0]["settings"].augment == "flip-crop"


def test_what_the_command_line_says_comes_before_the_file(run, given):
    Path("mine.yaml").write_text(FILE)
    words = ["resnet34", "--config", "mine.yaml", "--limit", "32", "--candidate", "widen=2.0", "--out", "made"]
    assert run("tradeoff", *words)[0] == 0
    assert (given[0]["source"], given[0]["candidates"]) == ("resnet34", ["widen=2.0"])
    assert (given[0]["settings"].limit, given[0]["settings"].finetune_epochs) == (32, 2)


def test_the_file_in_the_folder_of_a_run_repeats_it(run, given):
    words = ["--dataset", "digits", "--split-rates", "1.0,layer3=0.5;layer4=0.25", "--latency-budget", "5ms"]
    words += ["--weights", "best.pth", "--optimizer", "rmsprop", "--skip-bad", "--lr", "0.003", "--seed", "3"]
    assert run("tradeoff", "resnet18", *words, "--out", "first")[0] == 0
    content = yaml.safe_load(Path("first/run.yaml").read_text())
    assert content["model"] == "resnet18"
    assert (content["batch-size"], content["schedule"]) == (64, "one-cycle")  # defaults may change, and the file stays
    assert not {"out", "force", "json", "config"} & content.keys()
    assert run("tradeoff", "--config", "first/run.yaml", "--out", "second", "--json")[0] == 0
    first, second = ({name: call[name] for name in call if name not in ("directory", "command", "progress")}
                     for call in given)  # fmt: skip
    assert first == second
    assert Path("second/run.yaml").read_text() == Path("first/run.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--config: cannot read mine.yaml: No such file or directory"),
        ("- a\n- b", "--config: mine.yaml must hold options, each as NAME: VALUE"),
        ("a: [", "--config: mine.yaml is not YAML: "),
        ("epoch: 3", "unknown option in mine.yaml 'epoch'; did you mean 'epochs'"),
        ("out: made", "unknown option in mine.yaml 'out'"),
        ("epochs: {dense: 3}", "--config: epochs in mine.yaml must be a text, a number, true or false, or a list"),
        ("epochs: 0.5", "Invalid value for '--epochs': "),
        ("epochs: -1", "--epochs must be a whole number of at least 0, not -1"),
    ],
)
def test_a_file_that_says_nothing_useful_is_refused_in_one_line(run, given, text, message):
    if text is not None:
        Path("mine.yaml").write_text(text)
    code, out, err = run("tradeoff", "resnet18", "--dataset", "digits", "--config", "mine.yaml", "--out", "made")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert given == []
