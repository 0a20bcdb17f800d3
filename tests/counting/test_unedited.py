"""What cannot be edited is said: by a warning, as data, and on the command line."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery
from surgery.axes.analysis import analyse
from surgery.cli import main


class Half(nn.Module):
    """Two streams: one of them passes an op that has no rule."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(4, 6)
        self.c, self.d = nn.Linear(width, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(self.a(x).cumsum(-1)) + self.d(self.b(x).relu())


class Frozen(Half):
    def forward(self, x):
        return self.c(self.a(x).cumsum(-1))


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def make(width: int = 8) -> nn.Module:
    return Half(width)


def frozen() -> nn.Module:
    return Frozen()


def test_channels_and_work_that_cannot_be_edited_are_counted():
    found = surgery.unedited(surgery.trace(Half(), X))
    assert (found.channels, found.total) == (8, 14)
    assert found.groups == (("a", 8, "cumsum works along it"),)
    assert found.macs == pytest.approx((32 + 24) / (32 + 24 + 24 + 18))
    assert (
        str(found) == "8 of 14 channels (57% of the MACs) could not be edited: 'a' (8 channels: cumsum works along it)"
    )
    whole = surgery.unedited(surgery.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), X))
    assert (whole.channels, whole.total, whole.macs, whole.groups) == (0, 8, 0.0, ())


def test_the_figures_are_part_of_the_changes():
    traced = surgery.trace(Half(), X)
    found = surgery.changes(traced, surgery.slim(traced, 0.5))
    assert found.unedited == surgery.unedited(traced)
    assert found.to_dict()["unedited"]["groups"] == [{"name": "a", "channels": 8, "reason": "cumsum works along it"}]


@pytest.mark.parametrize("operation", ["slim", "widen"])
def test_an_operation_that_changes_nothing_says_why(operation):
    rate = 0.25 if operation == "slim" else 2.0
    traced = surgery.trace(Frozen(), X)
    expected = rf"{operation} changed nothing: no channels can be edited: 'a' \(8 channels: cumsum works along it\)"
    with pytest.warns(surgery.NothingChangedWarning, match=expected):
        surgery.verify(getattr(surgery, operation)(traced, rate), traced).raise_if_different()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(surgery, operation)(traced, 1.0)
        getattr(surgery, operation)(surgery.trace(Half(), X), rate)


def test_an_operation_that_rounds_to_what_there_is_says_so():
    traced = surgery.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), X)
    with pytest.warns(surgery.NothingChangedWarning, match="left with as many channels as it has"):
        surgery.slim(traced, 0.5, round_to=8)


def test_a_layer_that_cannot_be_edited_is_named_with_the_reason():
    traced = surgery.trace(Half(), X)
    for operation, amount in ((surgery.slim, 0.5), (surgery.widen, 2.0)):
        with pytest.raises(surgery.EditError, match=r"group 'a' cannot be edited: cumsum works along it"):
            operation(traced, {"a": amount})


def test_a_network_prepared_for_training_in_int8_is_traced_and_says_what_holds_it():
    quantization = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(quantization.QuantStub(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).train()
        net.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
        prepared = quantization.prepare_qat(net)
        traced = surgery.trace(prepared, X)
    with pytest.warns(surgery.NothingChangedWarning, match="fused_moving_avg_obs_fake_quant has no rule"):
        surgery.slim(traced, 0.25)
    assert surgery.unedited(traced).macs > 0.8


def test_the_command_line_says_what_could_not_be_edited(capsys):
    command = ["slim", f"{__name__}:make?width=16", "--trust", "--input-shape", "2,4", "--rate", "0.5", "--dry-run"]
    assert main(command) == 0
    assert "16 of 22 channels (73% of the MACs) could not be edited: 'a' (16 channels" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unedited"]["channels"] == 16


def test_the_command_line_says_why_nothing_changed(capsys):
    command = ["slim", f"{__name__}:frozen", "--trust", "--input-shape", "2,4", "--rate", "0.5", "--dry-run"]
    assert main(command) == 0
    assert "slim changed nothing: no channels can be edited: 'a' (8 channels" in capsys.readouterr().err


def line_of(what: str) -> str:
    """Where that text stands in this file, as reasons name lines."""
    code = Path(__file__).read_text().splitlines()
    return f"{Path(__file__).name}:{next(k for k, line in enumerate(code, 1) if what in line)}"


def test_reasons_come_with_their_part_of_the_work_and_the_line():
    traced = surgery.trace(Half(), X)
    found = surgery.held_back(traced)
    by_reason = {one.reason: one for one in found}
    assert [one.macs for one in found] == sorted((one.macs for one in found), reverse=True)
    parts = {reason: round(98 * one.macs) for reason, one in by_reason.items()}
    assert parts == {
        "cumsum works along it": 32,
        "c relates it to an axis that holds no channels": 24,
        "network input": 24,
        "network output": 18,
    }
    held = by_reason["cumsum works along it"]
    assert (held.channels, held.groups, held.more) == (8, ("a",), 0)
    assert held.line == line_of("self.c(self.a(x).cumsum(-1)) + self.d(")
    assert by_reason["network input"].line == ""
    assert str(held) == f"33% of the MACs: cumsum works along it ({held.line})"
    assert json.loads(json.dumps(held.to_dict()))["groups"] == ["a"]
    assert sum(one.macs for one in surgery.held_back(traced) if not one.reason.startswith("network")) == pytest.approx(
        surgery.unedited(traced).macs
    )


def test_what_several_layers_do_alike_is_one_reason():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Half() for _ in range(3))

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    found = surgery.held_back(surgery.trace(Many(), X))
    one = next(one for one in found if one.reason.endswith("relates it to an axis that holds no channels"))
    assert (one.reason.split()[0], one.more, one.channels) == ("layers.0.c", 2, 24)
    assert round(3 * 98 * one.macs) == 3 * 24
    assert sum(one.macs for one in found) == pytest.approx(1)


def test_outputs_that_are_let_go_hold_nothing():
    traced = surgery.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), X)
    assert {one.reason: one.channels for one in surgery.held_back(traced)} == {"network output": 3, "network input": 4}
    assert [one.reason for one in surgery.held_back(traced, outputs="free")] == ["network input"]


def test_lines_survive_copies_edits_and_a_saved_file(tmp_path):
    traced = surgery.trace(Half(), X)
    slim = surgery.slim(traced, {"b": 0.5})
    loaded = surgery.load(surgery.save(slim, tmp_path / "slim"), model=Half())
    for module in (copy.deepcopy(traced), slim, loaded):
        one = next(one for one in surgery.held_back(module) if one.reason == "cumsum works along it")
        assert one.line == line_of("self.c(self.a(x).cumsum(-1)) + self.d(")


def test_lines_of_python_that_is_not_traced_are_named():
    class Choice(Half):
        def forward(self, x):
            y = self.a(x)
            if y.sum() > 1e9:
                y = y * 2
            return self.c(torch.cumsum(y, -1)) + self.d(self.b(x).relu())

    reasons = analyse(surgery.trace(Choice(), X)).reasons
    lines = {str(reason): getattr(reason, "line", "") for _, reason in reasons}
    assert lines["sum reduces it outside the traced parts"] == line_of("if y.sum() > 1e9")
    assert lines["comes from Python outside the traced parts"] == line_of("torch.cumsum(y, -1)) + self.d")


def test_a_model_of_layers_alone_has_no_lines():
    assert {one.line for one in surgery.held_back(surgery.trace(nn.Sequential(nn.Linear(4, 3)), X))} == {""}
