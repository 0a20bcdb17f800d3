"""What an operation would change: as data, as text, and from the command line without writing anything."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import surgery
from surgery import models as catalogue
from surgery.cli import main

MODEL = ["squeezenet1_1?num_classes=10", "--input-shape", "2,3,40,40"]


class Net(nn.Module):
    """Layers of several classes, and a parameter that is none's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.positions = nn.Parameter(torch.randn(4, 12))
        self.norm, self.attention = nn.LayerNorm(12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return surgery.trace(Net(), torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def resnet():
    return surgery.trace(catalogue.build("resnet18", num_classes=10, seed=0), torch.zeros(2, 3, 32, 32))


def test_layers_whose_shapes_differ_are_listed_with_both(resnet):
    wide = surgery.widen(resnet, {"layer1.0.conv1": 96})
    found = surgery.changes(resnet, wide)
    assert (found.added, found.removed) == ((), ())
    assert [old.name for old, _ in found.changed] == ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"]
    (old, new), (_, norm), _ = found.changed
    assert (old.kind, old.in_channels, old.out_channels) == ("Conv2d", 64, 64)
    assert (new.in_channels, new.out_channels, new.shapes) == (64, 96, {"weight": (96, 64, 3, 3)})
    assert (norm.in_channels, norm.shapes) == (None, {"weight": (96,), "bias": (96,)})
    assert found.cost == (surgery.cost(resnet), surgery.cost(wide))


def test_parameters_of_no_layer_and_packed_ones_are_listed_too(net):
    found = surgery.changes(net, surgery.widen(net, 2.0))
    layers = {new.name: (old, new) for old, new in found.changed}
    assert set(layers) == {"patches", "positions", "norm", "attention", "attention.out_proj", "head"}
    assert layers["positions"][1].kind == "Parameter"
    assert layers["positions"][1].shapes == {"": (4, 24)}
    assert layers["attention"][1].shapes["in_proj_weight"] == (72, 24)
    assert (layers["head"][0].in_channels, layers["head"][1].in_channels) == (12, 24)


def test_layers_come_and_go(resnet):
    deep = surgery.deepen(resnet, {"layer3": 1})
    found = surgery.changes(resnet, deep)
    assert found.changed == ()
    assert [layer.name.rpartition(".")[0] for layer in found.added] == ["layer3.2"] * len(found.added) != []
    assert surgery.changes(deep, resnet).removed == found.added


def test_the_text_says_what_differs_and_what_it_costs(resnet):
    text = str(surgery.changes(resnet, surgery.widen(resnet, {"layer1.0.conv1": 96})))
    summary, step, header, *rows = text.splitlines()
    assert summary.startswith("layers: 3 changed, 0 added, 0 removed; parameters 11.18 M -> 11.22 M, MACs an input ")
    assert step == "Reindex: layer1.0.conv1 to 96"
    assert header.split() == ["layer", "class", "in", "out", "shape"]
    assert rows[0].split() == ["layer1.0.conv1", "Conv2d", "64", "64", "->", "96", "64x64x3x3", "->", "96x64x3x3"]
    assert rows[1].split() == ["layer1.0.bn1", "BatchNorm2d", "64", "->", "96"]
    deep = surgery.deepen(resnet, {"layer3": 1})
    assert str(surgery.changes(resnet, deep)).splitlines()[3].endswith("256x256x3x3 added")
    assert str(surgery.changes(deep, resnet)).splitlines()[2].endswith("256x256x3x3 removed")


def test_nothing_changed_is_one_line(resnet):
    assert str(surgery.changes(resnet, resnet)).startswith("layers: 0 changed, 0 added, 0 removed; ")
    assert "\n" not in str(surgery.changes(resnet, resnet))


def test_changes_are_plain_data(net):
    found = surgery.changes(net, surgery.widen(net, {"patches": 24})).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["before"] == surgery.cost(net).to_dict()
    assert found["changed"][0] == {
        "before": {
            "name": "positions", "kind": "Parameter", "shapes": {"": [4, 12]}, "in_channels": None,
            "out_channels": None,
        },
        "after": {
            "name": "positions", "kind": "Parameter", "shapes": {"": [4, 24]}, "in_channels": None,
            "out_channels": None,
        },
    }  # fmt: skip


def test_only_traced_modules_are_compared(resnet):
    with pytest.raises(surgery.UsageError, match="Linear is not a traced module"):
        surgery.changes(resnet, nn.Linear(3, 4))


# ---- from the command line


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Run a command in an empty folder: its exit code, stdout, stderr, and what lies in the folder then."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capfd.readouterr(), [path.name for path in tmp_path.iterdir()])

    return call


@pytest.mark.parametrize(
    "arguments",
    [
        ["widen", *MODEL, "--width", "features.3=2.0"],
        ["deepen", *MODEL, "--at", "features.3.squeeze"],
        ["slim", *MODEL, "--rate", "features.3=0.5"],
    ],
)
def test_a_dry_run_prints_what_would_change_and_writes_nothing(run, arguments):
    code, out, err, there = run(*arguments, "--dry-run")
    assert (code, err, there) == (0, "", [])
    assert "features.3.squeeze" in out
    assert "nothing was written" in out
    assert "parameters 727.63 k -> " in out
    code, out, err, there = run(*arguments, "--dry-run", "--json")
    assert (code, err, there) == (0, "", [])
    result = json.loads(out)
    assert result["dry_run"]
    assert [*result["changed"], *result["added"]]
    assert result["before"]["params"] != result["after"]["params"]


def test_long_lists_are_cut_for_people_and_not_for_programs(run):
    arguments = ["widen", *MODEL, "--width", "1.5", "--dry-run"]
    _, out, _, _ = run("widen", "resnet18", "--input-shape", "2,3,32,32", "--width", "1.5", "--dry-run")
    assert "and 1 more layer (--json lists all)" in out
    assert "layer4.1.bn2" in out
    assert "\nfc " not in out
    assert "more layers" not in run(*arguments)[1]
    listed = json.loads(run(*arguments, "--json")[1])
    assert len(listed["changed"]) == 26
    assert listed["left_alone"] == {}


def test_without_a_folder_it_must_be_a_dry_run(run):
    code, out, err, there = run("widen", *MODEL, "--width", "1.5")
    assert (code, out, there) == (2, "", [])
    assert err == ("error: Missing option '--out': name the folder to write, or see what would change with --dry-run\n")


@pytest.mark.parametrize("way", ["uneven", "zero-sum"])
def test_exact_ways_to_break_the_symmetry_are_verified(run, way):
    options = ["--width", "1.5", "--mapping", "balanced", "--break-symmetry", way, "--noise", "0.1", "--out", "wide"]
    code, out, err, _ = run("widen", *MODEL, *options)
    assert (code, err) == (0, "")
    assert "verified in float64: relative difference" in out
    (step,) = surgery.recipe(surgery.load("wide")).steps
    assert step.noise == (surgery.Noise("zero-sum", 0.1, 0) if way == "zero-sum" else None)


def test_plain_noise_is_said_to_be_inexact_by_how_much_and_is_no_failure(run):
    options = ["--width", "1.5", "--break-symmetry", "noise", "--out", "wide", "--force"]
    code, out, err, there = run("widen", *MODEL, *options)
    assert (code, err, there) == (0, "", ["wide"])
    assert "inexact by choice: noise on the weights of copies changes the output; here by " in out
    result = json.loads(run("widen", *MODEL, *options, "--json")[1])
    assert result["inexact_by_choice"]
    assert result["verification"]["max_rel"] > 1e-6
    assert not result["verification"]["ok"]


def test_a_dry_run_says_that_plain_noise_is_inexact(run):
    options = ["--width", "1.5", "--break-symmetry", "noise", "--dry-run"]
    assert "inexact by choice: noise on the weights of copies changes the output" in run("widen", *MODEL, *options)[1]
    assert json.loads(run("widen", *MODEL, *options, "--json")[1])["inexact_by_choice"]


def test_any_other_difference_is_a_failure_and_nothing_is_written(run, monkeypatch):
    monkeypatch.setattr("surgery.cli.writing.EXACT", 0.0)
    code, out, err, there = run("widen", *MODEL, "--width", "1.5", "--break-symmetry", "zero-sum", "--out", "wide")
    assert (code, out, there) == (1, "", [])
    assert err.startswith("error: outputs differ by ")


def test_what_is_no_number_is_a_failure_with_noise_too(run, monkeypatch):
    nothing = surgery.Verification(float("nan"), float("nan"), 1e-10, "float64", 1)
    monkeypatch.setattr("surgery.verify", lambda *_, **__: nothing)
    code, out, err, there = run("widen", *MODEL, "--width", "1.5", "--break-symmetry", "noise", "--out", "wide")
    assert (code, out, there) == (1, "", [])
    assert err.startswith("error: outputs differ by nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mapping", "even"], "--mapping must be 'random' or 'balanced', not 'even'"),
        (["--break-symmetry", "nose"], "--break-symmetry must be 'uneven', 'zero-sum', 'noise' or None, not 'nose'"),
        (["--break-symmetry", "noise", "--noise", "0"], "--noise must be a number above 0, not 0.0"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(run, options, message):
    code, out, err, there = run("widen", *MODEL, "--width", "1.5", *options, "--out", "wide")
    assert (code, out, err, there) == (2, "", f"error: {message}\n", [])
