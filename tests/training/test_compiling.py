"""Training under torch.compile: what it runs, what comes back, and what it says without a compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import UsageError
from surgery.settings import TrainSettings
from surgery.training.loop import label_loss
from tests.helpers import assert_same, killed_after

DIGITS = 160

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 64, "test_each_epoch": True}


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 10)
        )


@pytest.fixture
def compiled(monkeypatch):
    """What torch.compile is given; it captures graphs, and runs them as they are, which takes no compiler."""
    given = []
    original = torch.compile

    def compile_eagerly(model):
        given.append(model)
        return original(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    return given


def test_a_compiled_training_is_the_same_training_and_gives_back_a_plain_module(digits, compiled):
    plain = surgery.train(net(), digits, **SETTINGS)
    assert compiled == []
    seen = []

    def loss_fn(model, batch, epoch):
        seen.append(type(model).__name__)
        return label_loss(model(batch[0]), batch[1])

    history = surgery.train(net(), digits, compile=True, loss_fn=loss_fn, **SETTINGS)
    assert len(compiled) == 1
    assert set(seen) == {"OptimizedModule"}
    assert type(history.module) is nn.Sequential
    assert_same(history.module, plain.module)
    assert [(one.loss, one.score) for one in history.epochs] == [(one.loss, one.score) for one in plain.epochs]


def test_a_checkpoint_holds_the_plain_model_and_resumes_exactly(digits, compiled, tmp_path):
    expected = surgery.train(net(), digits, compile=True, **SETTINGS)
    settings = {**SETTINGS, "checkpoint": tmp_path / "a.pt", "checkpoint_every": 1, "compile": True}
    with pytest.raises(KeyboardInterrupt):
        surgery.train(net(), digits, **settings, progress=killed_after(2))
    names = torch.load(tmp_path / "a.pt", weights_only=True)["model"].keys()
    assert names == net().state_dict().keys()
    assert_same(surgery.train(net(), digits, **settings).module, expected.module)
    with pytest.raises(UsageError, match="is the checkpoint of another training, with compile True and not None"):
        surgery.train(net(), digits, **{**settings, "compile": False})


def test_more_models_of_a_class_are_compiled_than_dynamo_would_by_itself(digits, compiled):
    data, widths = surgery.load_data("digits", limit=20), range(3, 15)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for width in widths:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Linear(width, 10))
        surgery.train(model, data, epochs=1, batch_size=20, compile=True)
    assert counter["stats"]["unique_graphs"] == len(widths)


def test_students_and_generations_are_compiled_too(digits, compiled, model):
    surgery.distill(model, model, digits, hint_epochs=1, epochs=1, compile=True)
    assert len(compiled) == 2
    found = surgery.evolve(model, digits, generations=2, epochs=1, compile=True)
    assert len(compiled) == 4
    assert type(found.module).__name__ == type(model).__name__


def test_without_a_compiler_it_is_refused_in_one_line(digits, monkeypatch):
    from torch._inductor.exc import InvalidCxxCompiler

    class Broken(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", Broken)
    with pytest.raises(UsageError, match=r"^the model cannot be compiled here \(No working C\+\+ compiler found.*\):"):
        surgery.train(net(), digits, compile=True, **SETTINGS)


def test_an_error_of_the_loss_is_not_taken_for_one_of_the_compiler(digits, compiled):
    def loss_fn(model, batch, epoch):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        surgery.train(net(), digits, compile=True, loss_fn=loss_fn, **SETTINGS)


def test_identities_of_trainings_that_are_not_compiled_are_as_before():
    assert "compile" not in TrainSettings().identity()
    assert TrainSettings(compile=True).identity()["compile"] is True
