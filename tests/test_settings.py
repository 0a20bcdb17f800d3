"""Settings: one dataclass for the API, the command line and the identity of a resumed run."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery.cli import app
from surgery.cli.fields import settings_of
from surgery.deploy.measure.runners import RUNTIMES as RUNNERS
from surgery.settings import OPTIMIZERS, RUNTIMES, SCHEDULES, Settings, accepts
from surgery.training import optimizers

KINDS = [
    surgery.TrainSettings,
    surgery.DistillSettings,
    surgery.EvolveSettings,
    surgery.LotterySettings,
    surgery.TimingSettings,
    surgery.BudgetSettings,
    surgery.TradeoffSettings,
    surgery.CompressSettings,
]


def functions() -> list[Any]:
    found = [getattr(surgery, name) for name in surgery.__all__]
    return [one for one in found if inspect.isroutine(one)]


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__name__)
def test_no_public_function_has_more_than_12_parameters(function):
    assert len(inspect.signature(function).parameters) <= 12


def test_every_choice_in_settings_has_an_implementation():
    assert OPTIMIZERS.keys() == optimizers.OPTIMIZERS.keys()
    assert set(SCHEDULES) == optimizers.SCHEDULES.keys()
    assert set(RUNTIMES) == RUNNERS.keys()


def test_settings_of_the_same_name_have_the_same_default():
    """Only what a procedure counts, and the optimizer of hints, differ."""
    usual = surgery.TrainSettings()
    for kind in (surgery.DistillSettings, surgery.EvolveSettings, surgery.LotterySettings):
        own = kind().training()
        assert replace(own, optimizer="sgd") == usual
    assert surgery.TradeoffSettings().batch_size == usual.batch_size
    assert surgery.TradeoffSettings().peak_lr == usual.peak_lr
    importance = [
        inspect.signature(function).parameters["importance"].default
        for function in (surgery.slim, surgery.slim_to_budget, surgery.sensitivity)
    ]
    assert {*importance, surgery.TradeoffSettings().importance} == {"prefix"}


@accepts(surgery.TrainSettings, old="new")
def takes(model: str, settings: surgery.TrainSettings = surgery.TrainSettings(), *, new: int = 0) -> Any:
    return model, settings, new


def test_fields_are_keywords_and_take_precedence():
    assert takes("a", epochs=3)[1] == surgery.TrainSettings(epochs=3)
    given = surgery.TrainSettings(epochs=3, lr=0.5)
    assert takes("a", given, epochs=4)[1] == replace(given, epochs=4)
    assert takes("a", settings=given)[1] is given
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        takes("a", epoch=3)


def test_an_old_keyword_works_with_a_warning():
    with pytest.warns(DeprecationWarning, match="takes: old= is now new="):
        assert takes("a", old=2)[2] == 2
    with (
        pytest.warns(DeprecationWarning, match="old= is now new="),
        pytest.raises(surgery.UsageError, match="was given both new= and its old name old="),
    ):
        takes("a", old=2, new=3)


def test_settings_of_a_procedure_contain_those_of_its_trainings():
    plain = surgery.TrainSettings(epochs=3, lr=0.5)
    assert surgery.EvolveSettings.of(plain, {"long": True}) == surgery.EvolveSettings(epochs=3, lr=0.5, long=True)
    with pytest.raises(surgery.UsageError, match=r"settings must be a surgery\.TrainSettings, not"):
        takes("a", surgery.TimingSettings())
    with pytest.raises(surgery.UsageError, match=r"settings must be a surgery\.TrainSettings, not \{'epochs': 3\}"):
        takes("a", {"epochs": 3})


def test_the_identity_has_what_the_weights_depend_on_and_the_rate_that_is_used():
    one, other = surgery.TrainSettings(), surgery.TrainSettings(lr=0.02, workers=2, checkpoint_every=5)
    assert one.identity() == other.identity()
    changed = surgery.TrainSettings(augment="flip", erase=0.1, mixup=0.1, cutmix=0.1, compile=True)
    assert {
        "workers",
        "evaluation_batch",
        "test_each_epoch",
        "checkpoint_every",
        "tracker",
    } == changed.to_dict().keys() - changed.identity().keys()
    assert changed.identity().keys() - one.identity().keys() == {"augment", "erase", "mixup", "cutmix", "compile"}
    assert one.identity() != surgery.TrainSettings(seed=1).identity()
    assert surgery.TrainSettings(lr=np.float32(0.5), seed=np.int64(1)) == surgery.TrainSettings(lr=0.5, seed=1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_field_has_a_help_text_and_refuses_what_it_cannot_be(kind: type[Settings]):
    for one in fields(kind):  # type: ignore[arg-type]
        assert one.metadata["help"].endswith((".", "]"))
        with pytest.raises(surgery.UsageError, match=one.name.replace("_", ".")):
            kind(**{one.name: object()})


VERBS = {
    "distill": (surgery.DistillSettings, {"label_weight", "test_each_epoch"}),
    "evolve": (surgery.EvolveSettings, set()),
    "compress": (surgery.CompressSettings, {"test_each_epoch"}),
    "tradeoff": (surgery.TradeoffSettings, set()),
    "bench": (surgery.TimingSettings, {"warmup", "confidence", "memory"}),
    "sensitivity": (surgery.TimingSettings, {"batch_size", "device", "confidence", "memory"}),
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_of_a_verb_are_the_fields_of_its_settings(verb):
    kind, without = VERBS[verb]
    (callback,) = (one.callback for one in app.registered_commands if one.callback.__name__ == verb)
    options = inspect.signature(callback).parameters
    for one in fields(kind):
        assert (one.name in options) != (one.name in without)
        if one.name in options:
            assert str(options[one.name].default) == str(one.default)


def test_a_resumed_command_is_known_by_what_its_result_depends_on():
    context = SimpleNamespace(params={"epochs": 3, "workers": 2, "out": "a", "loss": ["kd"], "data_root": None})
    assert settings_of(context) == {"epochs": 3, "loss": ["kd"], "data_root": None}  # type: ignore[arg-type]


def test_results_hold_a_new_module_and_old_names_warn():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    before = [parameter.clone() for parameter in model.parameters()]
    history = surgery.train(model, surgery.load_data("digits", limit=40), epochs=1)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not torch.equal(history.module[1].weight, model[1].weight)
    with pytest.warns(DeprecationWarning, match=r"History\.model is now \.module"):
        assert history.model is history.module
