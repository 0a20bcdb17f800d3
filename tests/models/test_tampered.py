"""Saved folders that were damaged, mixed up or written by someone else: refused before anything is built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.models.saving import RECIPE, WEIGHTS
from surgery.storage.documents import sign


class Net(nn.Module):
    """Branches that are concatenated and cut: an index that is wrong by one fits, and computes another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        first, second = torch.cat([self.norm(self.a(x)), self.b(x)[:, :, 1:-1, 1:-1]], 1).chunk(2, 1)
        return self.c(first * second).mean((2, 3))


@pytest.fixture
def module():
    torch.manual_seed(0)
    return surgery.slim(surgery.trace(Net(), torch.randn(2, 3, 8, 8)), 0.5)


@pytest.fixture
def saved(module, tmp_path):
    return surgery.save(module, tmp_path / "saved")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, signed: bool = True) -> None:
    """Change a recipe as its writer could."""
    content = json.loads((folder / RECIPE).read_text())
    change(content)
    (folder / RECIPE).write_text(json.dumps(sign(content) if signed else content))


def refuse(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(surgery.CheckpointError, match=message):
        surgery.load(folder, model=Net(), **options)


def test_weights_of_another_model_of_the_same_shapes_are_refused(module, saved, tmp_path):
    for parameter in module.parameters():
        parameter.data += 1
    other = surgery.save(module, tmp_path / "other")
    shutil.copy(other / WEIGHTS, saved / WEIGHTS)
    refuse(saved, r"weights\.safetensors was changed after it was saved, .* \(--allow-changed-weights\)")
    loaded = surgery.load(saved, model=Net(), allow_changed_weights=True)
    assert torch.equal(loaded.get_parameter("a.weight"), module.get_parameter("a.weight"))


def test_every_flipped_bit_of_the_weights_is_refused(saved):
    content = bytearray((saved / WEIGHTS).read_bytes())
    for place in range(0, len(content), 37):
        content[place] ^= 1 << place % 8
        (saved / WEIGHTS).write_bytes(content)
        refuse(saved, r"weights\.safetensors")
        content[place] ^= 1 << place % 8
    (saved / WEIGHTS).write_bytes(content)
    surgery.load(saved, model=Net())


def test_swapped_tensors_of_the_same_shape_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    tensors["norm.weight"], tensors["norm.bias"] = tensors["norm.bias"], tensors["norm.weight"]
    save_file(tensors, saved / WEIGHTS)
    refuse(saved, "was changed after it was saved")


def test_another_dtype_or_shape_is_refused_even_of_weights_that_may_be_changed(saved):
    tensors = load_file(saved / WEIGHTS)
    for name, wrong in {
        "norm.weight": tensors["norm.weight"].double(),
        "c.bias": tensors["c.bias"].int(),
        "a.bias": tensors["a.bias"][:-1].clone(),
    }.items():
        save_file({**tensors, name: wrong}, saved / WEIGHTS)
        refuse(saved, f"{name} is .*, its recipe says F32", allow_changed_weights=True)
    save_file({**tensors, "more": torch.zeros(2)}, saved / WEIGHTS)
    refuse(saved, r"missing \[\], unexpected \['more'\]", allow_changed_weights=True)


def test_an_edited_index_is_refused(saved):
    def move(content: dict[str, Any]) -> None:
        indices = content["steps"][0]["indices"]
        name = next(iter(indices))
        indices[name] = [index + 1 if isinstance(index, int) else "1:4" for index in indices[name]]

    edit(saved, move, signed=False)
    refuse(saved, r"recipe\.json was damaged or edited after it was written: 'sha256'")
    refuse(saved, r"recipe\.json was damaged or edited", allow_changed_weights=True)


def test_a_digest_cannot_be_left_out(saved):
    edit(saved, lambda content: content.pop("sha256"), signed=False)
    refuse(saved, "recipe.json was damaged or edited")
    edit(saved, lambda content: content.update(schema=2), signed=False)
    refuse(saved, "recipe.json was damaged or edited")


def test_folders_of_versions_without_digests_are_loaded(saved):
    def older(content: dict[str, Any]) -> None:
        for field in ("sha256", "weights", "tensors"):
            content.pop(field)
        content["schema"] = 2

    before = surgery.load(saved, model=Net())
    edit(saved, older, signed=False)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(surgery.load(saved, model=Net())(x), before(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, r"recipe\.json: 'steps': expected 'array', got 'null'"),
        ({"source": 7}, r"'source': expected 'str \| null', got 'int'"),
        ({"inputs": None}, "'inputs': expected 'object', got 'null'"),
        ({"inputs": {"args": None, "kwargs": {"dict": {}}}}, "'args' must be a tuple"),
        ({"inputs": {"args": {"tuple": 3}, "kwargs": {"dict": {}}}}, r"'inputs\.args': 'tuple': expected 'array'"),
        ({"training": 1}, "'training': expected 'bool', got 'int'"),
        ({"frozen": [3]}, r"'frozen\[0\]': expected 'str', got 'int'"),
        ({"frozen": ["nothing"]}, "'frozen': the model has no 'nothing'"),
        ({"modes_other_than_training": ["nothing"]}, "'modes_other_than_training': the model has no 'nothing'"),
        ({"hooks": 3}, "'hooks': expected"),
        ({"schema": 10**30}, "schema"),
        ({"schema": "3"}, "'schema': expected 'int', got 'str'"),
        ({"more": 3}, "object contains unknown field 'more'"),
        ({"tensors": {"a": {"dtype": "float32", "shape": [-1]}}}, "'tensors.*': expected 'int' >= 0"),
        ({"tensors": {}}, r"weights\.safetensors does not fit its recipe"),
        ({"source": "\ud800"}, r"'\\ud800' is half a character"),
        ({"frozen": ["a\udc00"]}, r"'\\udc00' is half a character"),
        ({"\ud800": 3}, r"'\\ud800' is half a character"),
    ],
)
def test_a_malformed_recipe_names_the_field(saved, change, message):
    edit(saved, lambda content: content.update(change))
    refuse(saved, message)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"tensor": [2, 3, 8, 8], "dtype": "float33"}, 'torch has no dtype "float33"'),
        ({"tensor": [2, 3, 8, 8], "dtype": "nn"}, 'torch has no dtype "nn"'),
        ({"tensor": [2**40, 3, 8, 8], "dtype": "float32"}, " hold .* numbers, more than"),
        ({"tensor": [-2, 3, 8, 8], "dtype": "float32"}, "expected 'int' >= 0"),
        ({"tensor": [2, 3, 8], "dtype": "float32", "values": [1.0]}, "1 values for a tensor of shape"),
        ({"tensor": "2", "dtype": "float32"}, "expected 'array', got 'str'"),
        ({"dtype": "float32"}, "missing required field 'tensor'"),
    ],
)
def test_a_malformed_input_names_the_field(saved, tensor, message):
    edit(saved, lambda content: content.update(inputs={"args": {"tuple": [tensor]}, "kwargs": {"dict": {}}}))
    refuse(saved, f"inputs.*{message}")


@pytest.mark.parametrize(
    "index", [["0:1000000000"], [2**63], [10**30], [-7], [7], ["0:"], [":"], ["-1:3"], [None], [[0]], 7, []]
)
def test_a_malformed_index_names_the_step(saved, index):
    edit(saved, lambda content: content["steps"].__setitem__(0, {"step": "Reindex", "indices": {"a": index}}))
    refuse(saved, r"recipe\.json: .*[sS]tep")


@pytest.mark.parametrize(
    "step",
    [
        {"step": ["Reindex"]},
        {},
        {"step": "InsertIdentity", "after": "a", "name": "new", "form": "layer", "kernel": [3, 3], "norm": True,
         "activation": "", "channels": 10**12},
        {"step": "InsertIdentity", "after": "a", "name": "..", "form": "layer", "kernel": [], "norm": True,
         "activation": "", "channels": 3},
        {"step": "Reindex", "indices": {"a": [0]}, "noise": {"kind": "plain", "scale": -1.0}},
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_carried_out_is_one_line(saved, step):
    edit(saved, lambda content: content["steps"].append(step))
    refuse(saved, r"recipe\.json: .*step")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"7",
        b"[" * 1000 + b"]" * 1000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"[" * 200_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": [' + b"[]," * 1_000_000 + b"1]}",
        b'{"schema": 2, "a": ["\\ud800"]}',
    ],
    ids=[
        "empty",
        "no text",
        "a number",
        "nested lists",
        "nested objects",
        "open lists",
        "a long number",
        "many lists",
        "half a character",
    ],
)
def test_what_is_no_json_object_is_refused(saved, text):
    (saved / RECIPE).write_bytes(text)
    refuse(saved, r"recipe\.json")


@pytest.mark.parametrize("field", [{"source": "\ud800"}, {"steps": [{"step": "\ud800"}]}, {"\ud800": 1}])
def test_half_a_character_is_refused_in_a_recipe_of_ones_own(field):
    data = {"schema": 2, "source": None, "steps": [], **field}
    for read in (lambda: surgery.Recipe.from_json(json.dumps(data)), lambda: surgery.Recipe.from_json(str(data))):
        with pytest.raises(surgery.CheckpointError, match=r"half a character|cannot be read"):
            read()


def test_a_recipe_that_is_too_long_is_not_read(saved):
    with (saved / RECIPE).open("ab") as file:
        file.truncate(10 * 2**30)  # sparse
    refuse(saved, r"recipe\.json is no file of this package: it has \d+ bytes")


@pytest.mark.parametrize("name", [RECIPE, WEIGHTS])
def test_special_files_are_refused(saved, tmp_path, name):
    content = saved / name
    outside = tmp_path / "outside"
    content.rename(outside)
    content.symlink_to(outside)
    refuse(saved, f"{name} is not read: it is a link out of its folder")
    content.unlink()
    os.mkfifo(content)
    refuse(saved, f"{name} is not read: it is not a regular file")
    content.unlink()
    content.symlink_to("/dev/zero")
    refuse(saved, f"{name} is not read: it is not a regular file")
    content.unlink()
    content.symlink_to(name)
    refuse(saved, f"{name} cannot be read")
    content.unlink()
    content.mkdir()
    refuse(saved, f"{name} is not read: it is not a regular file")


def test_a_link_within_the_folder_is_followed(saved):
    (saved / WEIGHTS).rename(saved / "blob")
    (saved / WEIGHTS).symlink_to("blob")
    surgery.load(saved, model=Net())


@pytest.fixture
def no_fetching(monkeypatch):
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("it fetches")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18?weights=DEFAULT", "names weights to fetch, which a file may not"),
        ("torchvision:resnet18?weights=IMAGENET1K_V1", "names weights to fetch, which a file may not"),
        ("resnet18?pretrained=true", "takes no pretrained here"),
        ("fcn_resnet50?pretrained_backbone=true", "takes no pretrained_backbone here"),
        ("fcn_resnet50?weights_backbone=DEFAULT", "takes no weights_backbone here"),
        ("resnet18?num_classes=-3", "cannot be built with num_classes=-3"),
        ("resnet18?num_classes=10000000000", "num_classes=10000000000: it is out of range"),
        ("resnet18?num_classes=2000000000", "would take .* MiB of memory, and .* MiB are free"),
        ("mobilenet_v2?width_mult=inf", "width_mult=inf: it is out of range"),
        ("mobilenet_v2?width_mult=nan", "width_mult=nan: it is out of range"),
        ("resnet18?nothing=1", "unexpected keyword argument 'nothing'"),
        ("nothing", "unknown model 'nothing'"),
        ("?", "unknown model"),
        ("hf:/etc", "names a file to read, which a file may not"),
    ],
)
def test_a_source_in_a_file_fetches_nothing_and_has_bounds(saved, no_fetching, source, message):
    edit(saved, lambda content: content.update(source=source))
    with pytest.raises(surgery.CheckpointError, match=f"recipe.json: 'source': .*{message}"):
        surgery.load(saved)


def test_channels_last_survives(tmp_path):
    traced = surgery.trace(Net().to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8))
    surgery.save(traced, tmp_path / "saved")
    loaded = surgery.load(tmp_path / "saved", model=Net())
    assert loaded.get_parameter("a.weight").is_contiguous(memory_format=torch.channels_last)
    assert not loaded.get_parameter("a.weight").is_contiguous()
    assert torch.equal(loaded.get_parameter("a.weight"), traced.get_parameter("a.weight"))
