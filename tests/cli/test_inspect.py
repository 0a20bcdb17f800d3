"""What each dimension group carries, and how groups are shown: as a table, as paths and as a drawing."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import nn

import surgery
from surgery.counting.cost import cost, weight_macs
from surgery.counting.group_cost import group_costs

SVG = "{http://www.w3.org/2000/svg}"


class Net(nn.Module):
    """A stem of 4 channels, a residual block around 6, a concatenation with 2, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 6, 1, bias=False)
        self.up = nn.Conv2d(6, 4, 1, bias=False)
        self.side = nn.Conv2d(3, 2, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = torch.relu(self.norm(self.stem(x)))
        y = y + self.up(torch.relu(self.down(y)))
        return self.head(torch.cat([y, torch.relu(self.side(x))], 1).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return surgery.trace(Net().eval(), torch.randn(2, 3, 8, 8))


def test_a_group_carries_the_parameters_and_macs_that_go_with_its_channels(net):
    costs = group_costs(net, surgery.dimension_groups(net))
    stem = costs["stem"]  # all of stem, norm, down and up, and four columns of six of the head
    assert stem.params == (4 * 27 + 4) + 8 + 24 + 24 + 5 * 4
    assert stem.macs == 64 * (4 * 27 + 24 + 24) + 5 * 4
    assert (costs["down"].params, costs["down"].macs) == (48, 64 * 48)
    assert (costs["side"].params, costs["side"].macs) == (6 + 5 * 2, 64 * 6 + 5 * 2)
    assert (costs["head"].params, costs["head"].macs) == (35, 30)


def test_a_weight_whose_two_axes_are_in_one_group_counts_once():
    square = surgery.trace(
        nn.Sequential(nn.Conv2d(2, 8, 1, bias=False), Residual(), nn.Conv2d(8, 1, 1, bias=False)).eval(),
        torch.randn(1, 2, 4, 4),
    )
    costs = group_costs(square, surgery.dimension_groups(square))
    assert costs["0"].params == 16 + 64 + 8
    assert costs["0"].macs == 16 * (16 + 64 + 8)


class Mixes(nn.Module):
    """Adds to a stem what it reads from the stem and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
        self.mix, self.head = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(4, 1, 1, bias=False)

    def forward(self, x):
        y = self.stem(x)
        return self.head(y + self.mix(torch.cat([y, self.side(x)], 1)))


def test_a_weight_that_is_partly_read_and_wholly_written_by_a_group_is_its_own_whole():
    mixes = surgery.trace(Mixes().eval(), torch.randn(1, 3, 4, 4))
    costs = group_costs(mixes, surgery.dimension_groups(mixes))
    assert costs["stem"].params == 12 + 24 + 4
    assert costs["side"].params == 6 + 8


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x):
        return x + self.conv(x)


def test_macs_by_weight_add_up_to_the_cost_and_products_of_activations_have_no_name():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(3, 5, 8)
    found = weight_macs(layer, x)
    assert sum(found.values()) == cost(layer, x).macs
    assert list(found) == [
        "self_attn.in_proj_weight",
        "",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]
    assert found[""] == 2 * 5 * 5 * 8
    assert found["self_attn.in_proj_weight"] == 5 * 24 * 8


def drawn(traced, **words):
    groups, macs = surgery.dimension_groups(traced), weight_macs(traced)
    return surgery.draw_groups(
        traced, groups, group_costs(traced, groups, macs), macs, title=words.pop("title", "a net"), **words
    )


def test_a_drawing_has_a_box_for_each_layer_in_the_order_of_the_forward_pass(net):
    boxes = [g for g in ET.fromstring(drawn(net)).iter(f"{SVG}g") if g.find(f"{SVG}text[@class='shape']") is not None]
    names = ["".join(g.find(f"{SVG}text").itertext()) for g in boxes]
    assert names == ["stem", "down", "up", "side", "head"]
    shapes = [g.find(f"{SVG}text[@class='shape']").text for g in boxes]
    assert shapes == ["3x3  3 → 4", "1x1  4 → 6", "1x1  6 → 4", "1x1  3 → 2", "6 → 5"]
    heights = [float(g.find(f"{SVG}rect").get("y")) for g in boxes]
    assert all(b - a == heights[1] - heights[0] > 0 for a, b in pairwise(heights))
    assert [g.get("class") for g in boxes] == [None] * 4 + ["frozen"]
    assert boxes[0].find(f"{SVG}title").text.startswith("stem.weight: 3x3  3 → 4\n108 parameters, 6.91 k MACs\n")


def test_a_drawing_tells_the_figures_of_each_group_on_its_line(net):
    told = {g.find(f"{SVG}title").text for g in ET.fromstring(drawn(net)).iter(f"{SVG}g") if g.get("class") == "group"}
    stem = next(text for text in told if text.startswith("stem: "))
    assert stem.startswith("stem: 4 channels in 4 units\n188 parameters, 10.00 k MACs\neditable\n")
    assert "consumer: head.weight[1]" in stem
    head = next(text for text in told if text.startswith("head: "))
    assert "cannot be edited: network output" in head


@pytest.mark.parametrize("name", ["densenet121", "squeezenet1_1"])
def test_no_two_lines_of_a_drawing_lie_on_each_other(name):
    traced = surgery.trace(surgery.models.build(name).eval(), surgery.models.example_inputs(name))
    lines = [line for line in ET.fromstring(drawn(traced)).iter(f"{SVG}line") if line.get("class") == "line"]
    assert len(lines) == len(surgery.dimension_groups(traced))
    columns = {}
    for line in lines:
        columns.setdefault(line.get("x1"), []).append((float(line.get("y1")), float(line.get("y2"))))
    for spans in columns.values():
        assert all(a[1] < b[0] for a, b in pairwise(sorted(spans)))


def test_lines_next_to_each_other_have_different_colours():
    traced = surgery.trace(surgery.models.build("resnet50").eval(), torch.randn(1, 3, 64, 64))
    lines = [line for line in ET.fromstring(drawn(traced)).iter(f"{SVG}line") if line.get("class") == "line"]
    spans = [(float(x.get("y1")), float(x.get("y2")), x.get("stroke")) for x in lines if not x.get("stroke-dasharray")]
    assert not [
        (a, b) for k, a in enumerate(spans) for b in spans[:k] if a[2] == b[2] and a[0] <= b[1] and b[0] <= a[1]
    ]


def test_a_drawing_needs_no_other_file_and_escapes_what_it_is_given(net):
    text = drawn(net, title="<script>&", subtitle="a < b")
    root = ET.fromstring(text)
    assert "<script>&" in [t.text for t in root.iter(f"{SVG}text")]
    assert text.count("http") == 1  # the name of the language
    assert "href" not in text


SMALL = ["squeezenet1_1?num_classes=10", "--input-shape", "2,3,32,32"]


def test_inspect_lists_what_each_group_carries(run):
    result = json.loads(run("inspect", *SMALL, "--json")[1])
    group = next(g for g in result["groups"] if g["name"] == "features.0")
    assert group["params"] == 64 * 27 + 64 + 16 * 64
    assert group["macs"] == 64 * 27 * 15**2 + 16 * 64 * 7**2
    assert {"name": "features.3.squeeze.weight", "axis": 1, "role": "consumer"} in group["members"]
    assert result["macs_of_no_weight"] == 0
    code, out, _ = run("inspect", *SMALL)
    assert code == 0
    line = next(line for line in out.splitlines() if line.split()[:1] == ["features.0"])
    assert line.split() == ["features.0", "64", "64", "3", "2.82", "k", "438.98", "k", "yes"]


def test_inspect_tells_why_two_layers_are_tied(run):
    code, out, _ = run("inspect", *SMALL, "--why", "features.0", "features.3.squeeze")
    assert code == 0
    path = ["features.0.weight[0]", "features.0", "features.1", "features.2", "features.3.squeeze"]
    shown = [line.strip() for line in out.splitlines() if line.strip().startswith("features")]
    assert shown[-6:] == [*path, "features.3.squeeze.weight[1]"]
    paths = json.loads(run("inspect", *SMALL, "--why", "features.0.weight[0]", "features.3.squeeze", "--json")[1])
    assert paths["paths"]["features.0"][-1] == "features.3.squeeze.weight[1]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--why", "features.0", "classifier.1"],
            "nothing ties features.0 to classifier.1: the first is in features.0,",
        ),
        (["--why", "features.0", "classifer.1"], "unknown layer 'classifer.1'; did you mean 'classifier.1"),
        (["--svg", "taken.svg"], "taken.svg exists: choose another file, or replace it with --force"),
        (["--svg", "no/such.svg"], "cannot write no/such.svg: there is no folder "),
    ],
)
def test_what_cannot_be_shown_is_one_clear_line_and_nothing_is_written(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.svg").write_text("mine")
    code, out, err = run("inspect", *SMALL, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("taken.svg", "mine")]


def test_inspect_draws_the_groups_into_a_file(run, tmp_path):
    file = tmp_path / "groups.svg"
    code, out, _ = run("inspect", *SMALL, "--svg", file)
    assert code == 0
    assert f"drawn to {file}" in out.replace("\n", "")
    assert "Dimension groups of torchvision:squeezenet1_1?num_classes=10" in file.read_text()
    ET.parse(file)
    assert json.loads(run("inspect", *SMALL, "--svg", file, "--force", "--json")[1])["svg"] == str(file)


def test_inspect_says_what_holds_the_work_back_largest_first_in_80_columns(run, monkeypatch):
    monkeypatch.setattr("surgery.cli.output.Console", lambda **given: Console(**{**given, "width": 80}))
    code, out, _ = run("inspect", *SMALL)
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    held = json.loads(run("inspect", *SMALL, "--json")[1])["held_back"]
    assert [one["reason"] for one in held] == ["network input", "network output"]
    assert f"{sum(one['macs'] for one in held):.1%} of the MACs lie at channels that cannot be edited" in out
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert rows[1:] == [[f"{one['macs']:.1%}", *one["reason"].split(), str(one["channels"])] for one in held]
    assert held[0]["macs"] >= held[1]["macs"] > 0
