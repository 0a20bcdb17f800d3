"""Models of timm as sources."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import surgery
from surgery import models
from surgery.cli import main

INSTALLED = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not INSTALLED, reason="timm is not installed")
SMALL = "timm:vit_tiny_patch16_224?depth=1&embed_dim=12&img_size=32&num_heads=2"


@pytest.mark.skipif(INSTALLED, reason="timm is installed")
def test_without_timm_the_error_is_one_line_that_says_what_to_do(capsys):
    with pytest.raises(surgery.UsageError, match=r"^'timm:' sources need timm, .*: pip install 'surgery\[timm\]'$"):
        models.build("timm:resnet18")
    assert main(["inspect", "timm:resnet18"]) == 2
    assert "pip install 'surgery[timm]'" in capsys.readouterr().err


@needs_timm
def test_a_model_is_built_as_asked_and_runs_on_its_example_inputs():
    module = models.build(SMALL, num_classes=7, seed=0)
    assert module.training
    assert module(models.example_inputs(SMALL, batch_size=3)).shape == (3, 7)
    assert torch.equal(module.head.weight, models.build(SMALL, num_classes=7, seed=0).head.weight)
    assert models.canonical("timm:resnet18", num_classes=3) == "timm:resnet18?num_classes=3"
    assert models.canonical("timm:resnet18.a1_in1k", weights="DEFAULT") == "timm:resnet18.a1_in1k"
    assert models.example_inputs("timm:resnet18?in_chans=1", image_size=32).shape == (2, 1, 32, 32)


@needs_timm
@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("timm:resnet1", "unknown model of timm 'resnet1'"),
        ("timm:resnet18.a9", "unknown weights of 'resnet18' 'a9'"),
        ("timm:resnet18?weights=a9", "unknown weights of 'resnet18' 'a9'"),
        ("timm:resnet18?depths=3", "'timm:resnet18' cannot be built with depths=3: TypeError"),
    ],
)
def test_what_timm_does_not_have_is_refused_by_name(source, what):
    with pytest.raises(surgery.UsageError, match=what):
        models.build(source)


@needs_timm
def test_a_fixed_size_is_refused_with_the_keyword_that_sets_it():
    with pytest.raises(surgery.UsageError, match="built for inputs of 32 x 32, not 48 x 48; img_size= builds it"):
        models.open_model(SMALL, input_shape=(2, 3, 48, 48))


@needs_timm
def test_its_models_are_listed_by_the_file_that_defines_them(capsys):
    known = {model.entry.name: model.entry for model in models.list_models("resnet1*", library="timm")}
    assert known["resnet18"].family == "resnet"
    assert known["resnet18"].input_size == (3, 224, 224)
    assert main(["models", "mixnet_s", "--library", "timm", "--json"]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)["models"]] == ["mixnet_s"]


@needs_timm
def test_a_slim_model_is_saved_and_loaded_without_naming_its_class(tmp_path, capsys):
    assert main(["slim", SMALL, "--rate", "0.5", "--out", str(tmp_path / "slim"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["ok"]
    slim = surgery.load(tmp_path / "slim")
    assert slim.blocks[0].mlp.fc1.out_features == 24
    traced = models.open_model(SMALL, seed=0)
    assert surgery.verify(surgery.widen(traced, 2.0), traced).ok
