"""What cannot be edited is said: by a warning, as data, and on the command line."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import surgery
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
