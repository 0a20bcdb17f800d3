"""Recipes as text, and models saved as text and tensors alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import models as catalogue


@pytest.fixture
def operated():
    model = catalogue.build("resnet18", num_classes=10, seed=0)
    traced = surgery.trace(model, torch.zeros(2, 3, 32, 32), source="torchvision:resnet18?num_classes=10")
    return surgery.slim(surgery.deepen(surgery.widen(traced, {"layer2": 1.25}), {"layer1": 1}), 0.5).eval()


def test_recipes_survive_json(operated):
    recipe = surgery.recipe(operated)
    assert [type(s).__name__ for s in recipe.steps] == ["Reindex", "InsertBlock", "Reindex"]
    assert surgery.Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["steps"][2]["indices"]["conv1"] == ["0:32"]


def test_a_recipe_replays(operated):
    model = catalogue.build("resnet18", num_classes=10, seed=0)
    traced = surgery.trace(model, torch.zeros(2, 3, 32, 32)).eval()
    again = surgery.apply(traced, surgery.Recipe.from_json(surgery.recipe(operated).to_json()))
    assert surgery.verify(again, operated, torch.randn(2, 3, 32, 32)).max_abs == 0.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "source": null, "steps": [{"step": "Nothing"}]}'])
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(surgery.UsageError, match=r"not a recipe|unknown step 'Nothing'"):
        surgery.Recipe.from_json(text)


def test_a_recipe_of_another_schema_is_refused():
    with pytest.raises(surgery.UsageError, match="recipe has schema 99, this version reads 1"):
        surgery.Recipe.from_json('{"schema": 99, "source": null, "steps": []}')


def test_a_fresh_process_rebuilds_a_saved_model_bit_for_bit(operated, tmp_path):
    surgery.save(operated, tmp_path / "student")
    x = torch.randn(3, 3, 32, 32)
    save_file({"x": x}, tmp_path / "x.safetensors")
    script = (
        "import sys, torch, surgery\n"
        "from safetensors.torch import load_file, save_file\n"
        "module = surgery.load(sys.argv[1] + '/student')\n"
        "save_file({'y': module(load_file(sys.argv[1] + '/x.safetensors')['x']).detach()}, sys.argv[1] + '/y')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert torch.equal(load_file(tmp_path / "y")["y"], operated(x))


def test_a_saved_directory_holds_text_and_tensors_and_no_pickle(operated, tmp_path):
    saved = surgery.save(operated, tmp_path / "student")
    assert sorted(p.name for p in saved.iterdir()) == ["recipe.json", "weights.safetensors"]
    json.loads((saved / "recipe.json").read_text())
    assert set(load_file(saved / "weights.safetensors")) == set(operated.state_dict())


def test_modes_flags_dtypes_and_ties_survive(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.bn(self.a(x)))

    model = Tied().double().train()
    model.bn.eval()
    model.b.bias.requires_grad_(False)
    surgery.save(surgery.trace(model, torch.zeros(2, 4).double()), tmp_path / "tied")
    loaded = surgery.load(tmp_path / "tied", model=Tied())
    assert [loaded.training, loaded.a.training, loaded.bn.training] == [True, True, False]
    assert [p.requires_grad for p in (loaded.a.bias, loaded.b.bias)] == [True, False]
    assert loaded.a.weight is loaded.b.weight
    assert loaded.a.weight.dtype == torch.float64
    assert torch.equal(loaded.a.weight, model.a.weight)


def test_loading_draws_nothing_from_the_global_random_state(operated, tmp_path):
    surgery.save(operated, tmp_path / "student")
    state = torch.random.get_rng_state()
    surgery.load(tmp_path / "student")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_folder_of_other_things_is_never_replaced(operated, tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(surgery.UsageError, match="exists: choose another folder"):
        surgery.save(operated, target)
    with pytest.raises(surgery.UsageError, match=r"is not replaced: it holds no recipe\.json"):
        surgery.save(operated, target, force=True)
    assert [p.name for p in tmp_path.rglob("*")] == ["student", "notes.txt"]


def test_an_empty_folder_is_filled_and_a_saved_model_replaced_when_forced(operated, tmp_path):
    surgery.save(operated, tmp_path)
    with pytest.raises(surgery.UsageError, match="exists: choose another folder"):
        surgery.save(operated, tmp_path)
    surgery.save(operated, tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.json", "weights.safetensors"]


def test_what_cannot_be_loaded_says_why(operated, tmp_path):
    with pytest.raises(surgery.UsageError, match=r"is not a saved model: it has no recipe\.json"):
        surgery.load(tmp_path)
    unnamed = surgery.trace(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    surgery.save(unnamed, tmp_path / "unnamed")
    with pytest.raises(surgery.UsageError, match="does not say where its architecture comes from: pass model="):
        surgery.load(tmp_path / "unnamed")
    assert surgery.load(tmp_path / "unnamed", model=nn.Sequential(nn.Linear(3, 2))) is not None
    saved = surgery.save(operated, tmp_path / "student")
    tensors = load_file(saved / "weights.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:, :-1].contiguous()
    save_file(tensors, saved / "weights.safetensors")
    with pytest.raises(surgery.SurgeryError, match=r"fc\.weight is \(10, 255\), the model has \(10, 256\)"):
        surgery.load(saved)
    del tensors["fc.weight"]
    save_file(tensors, saved / "weights.safetensors")
    with pytest.raises(surgery.SurgeryError, match=r"does not fit its recipe: missing \['fc\.weight'\]"):
        surgery.load(saved)
    (saved / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(surgery.UsageError, match=r"weights\.safetensors cannot be read"):
        surgery.load(saved)
