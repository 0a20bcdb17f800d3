"""Recipes as text, and models saved as text and tensors alone."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

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


def test_what_was_loaded_does_not_change_with_the_file(operated, tmp_path):
    surgery.save(operated, tmp_path / "model")
    loaded = surgery.load(tmp_path / "model")
    file = tmp_path / "model" / "weights.safetensors"
    with file.open("r+b") as stored:  # as `cp` over it does
        size = stored.seek(0, os.SEEK_END)
        stored.seek(size // 2)
        stored.write(bytes(size - size // 2))
    tensors = [*loaded.parameters(), *loaded.buffers()]
    expected = [*operated.parameters(), *operated.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)  # a copy of one is no copy of all


def test_a_saved_directory_holds_text_and_tensors_and_no_pickle(operated, tmp_path):
    saved = surgery.save(operated, tmp_path / "student")
    assert sorted(p.name for p in saved.iterdir()) == ["recipe.json", "weights.safetensors"]
    json.loads((saved / "recipe.json").read_text())
    assert set(load_file(saved / "weights.safetensors")) == set(operated.state_dict())


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770), (0o077, 0o600, 0o700)]
)
def test_what_is_saved_has_the_modes_of_the_users_umask(operated, tmp_path, mask, file, folder):
    before = os.umask(mask)
    try:
        surgery.save(operated, tmp_path / "made")
    finally:
        assert os.umask(before) == mask
    found = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "made", *(tmp_path / "made").iterdir()]
    }
    assert found == {"made": folder, "recipe.json": file, "weights.safetensors": file}


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
    with pytest.raises(surgery.SurgeryError, match=r"fc\.weight is F32 \(10, 255\), its recipe says F32 \(10, 256\)"):
        surgery.load(saved)
    del tensors["fc.weight"]
    save_file(tensors, saved / "weights.safetensors")
    with pytest.raises(surgery.SurgeryError, match=r"does not fit its recipe: missing \['fc\.weight'\]"):
        surgery.load(saved)
    (saved / "weights.safetensors").write_bytes(b"rubbish")
    with pytest.raises(surgery.UsageError, match=r"weights\.safetensors cannot be read"):
        surgery.load(saved)


class Stored(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = Body()
        self.dense = Dense()
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.dense(self.body(self.stem(x))).mean((2, 3)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.b(torch.relu(self.n(self.a(x))))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer0, self.layer1 = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1)

    def forward(self, x):
        y = torch.cat([x, torch.relu(self.layer0(x))], 1)
        return torch.cat([y, torch.relu(self.layer1(y))], 1)


STORED = Path(__file__).parent / "stored" / "schema1"
"""Saved by the version before steps carried themselves out: widened unevenly and with noise, deepened in every form,
slimmed; in float64."""


def test_a_model_of_schema_1_is_loaded_and_computes_what_it_did(tmp_path):
    assert json.loads((STORED / "recipe.json").read_text())["schema"] == 1
    loaded = surgery.load(STORED, model=Stored())
    x = torch.linspace(-1, 1, 2 * 3 * 6 * 6, dtype=torch.float64).reshape(2, 3, 6, 6)
    expected = torch.tensor(
        [
            [-0.4821511884603764, -0.23622495082407838, 0.4485049469078562],
            [-0.35405186945149286, -0.3362483736194654, 0.48158068466302417],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(loaded(x).detach(), expected, rtol=1e-12, atol=0)
    kinds = [type(step).__name__ for step in surgery.recipe(loaded).steps]
    assert kinds == ["Reindex", "Reindex", "InsertIdentity", "InsertBlock", "InsertDense", "InsertIdentity", "Reindex"]
    surgery.save(loaded, tmp_path / "now")
    assert json.loads((tmp_path / "now" / "recipe.json").read_text())["schema"] == 3
    assert torch.equal(surgery.load(tmp_path / "now", model=Stored())(x), loaded(x))


def test_what_schema_1_left_out_or_ignored_is_migrated(tmp_path):
    saved = shutil.copytree(STORED, tmp_path / "old")
    content = json.loads((saved / "recipe.json").read_text())
    steps = surgery.recipe(surgery.load(STORED, model=Stored())).steps
    for step in content["steps"]:
        step["unknown"] = 1
        if step["step"] == "InsertIdentity":
            assert (step.pop("pieces"), step.pop("eps")) == (1, 2.0**-17)
    (saved / "recipe.json").write_text(json.dumps(content))
    assert surgery.recipe(surgery.load(saved, model=Stored())).steps == steps
    (saved / "recipe.json").write_text(json.dumps({**content, "schema": 2}))
    with pytest.raises(surgery.UsageError, match="step Reindex has no field 'unknown'"):
        surgery.load(saved, model=Stored())
