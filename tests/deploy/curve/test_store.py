"""Kept models: a damaged one is named and forgotten, so that it alone is trained again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import surgery
from surgery.deploy.curve.store import NOTE, RECORD, Store
from surgery.storage.documents import sign
from surgery.training.history import Epoch, History, Score

HISTORY = History((Epoch(8, 0.5, 0.1, Score(3, 4), 1.5),), 2)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return surgery.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))


@pytest.fixture
def folder(module, tmp_path):
    store = Store(tmp_path)
    for key in ("a", "b"):
        surgery.save(module, store.place(key))
        (store.place(key) / "model.onnx").write_bytes(b"a graph")
        store.keep(key, {"train": HISTORY}, Score(3, 4), {"seed": 0})
    store.note("n", {"rates": {"0": 0.5}})
    return tmp_path


def test_what_was_kept_is_found(folder, module):
    kept = Store(folder).find("a")
    assert kept is not None
    assert (kept.score, dict(kept.training)) == (Score(3, 4), {"train": HISTORY})
    assert torch.equal(kept.into(module).get_parameter("0.weight"), module.get_parameter("0.weight"))
    assert Store(folder).find_note("n") == {"key": "n", "rates": {"0": 0.5}}


@pytest.mark.parametrize("name", ["recipe.json", "weights.safetensors", "model.onnx", RECORD])
def test_a_damaged_model_is_named_and_forgotten_and_no_other(folder, name):
    file = folder / "a" / name
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 5):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.warns(surgery.DamageWarning, match=rf"a/{name}.*: that is made again"):
            assert Store(folder).find("a") is None
        assert not (folder / "a").exists()
        file.parent.mkdir()
        for other in (folder / "b").iterdir():
            (folder / "a" / other.name).write_bytes(other.read_bytes())
    assert Store(folder).find("b") is not None


def test_a_model_of_an_earlier_run_is_taken_where_the_copy_is_damaged(folder, tmp_path_factory):
    here = tmp_path_factory.mktemp("run")
    assert Store(here, [folder]).find("a") is not None
    (here / "a" / "weights.safetensors").write_bytes(b"")
    with pytest.warns(surgery.DamageWarning, match=r"weights\.safetensors is damaged"):
        assert Store(here, [folder]).find("a") is not None


@pytest.mark.parametrize(
    "change",
    [{"training": None}, {"score": {"correct": "3"}}, {"files": {}}, {"key": 3}, {"more": 1}, {"training": {"t": {}}}],
)
def test_a_malformed_record_is_named(folder, change):
    record = folder / "a" / RECORD
    record.write_text(json.dumps(sign({**json.loads(record.read_text()), **change})))
    with pytest.warns(surgery.DamageWarning, match="a/.*: that is made again"):
        assert Store(folder).find("a") is None


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ('{"key": "a"}', "missing required field")])
def test_a_broken_record_of_an_earlier_run_is_named(tmp_path, text, message):
    (tmp_path / "old" / "dense").mkdir(parents=True)
    (tmp_path / "old" / "dense" / RECORD).write_text(text)
    with pytest.warns(surgery.DamageWarning, match=f"dense/{RECORD}.*{message}"):
        store = Store(tmp_path / "new", [tmp_path / "old"])
    assert store.find("a") is None


def test_a_damaged_note_is_named_and_made_again(folder):
    (folder / f"n.{NOTE}").write_text((folder / f"n.{NOTE}").read_text().replace("0.5", "0.6"))
    with pytest.warns(surgery.DamageWarning, match="was damaged or edited after it was written"):
        assert Store(folder).find_note("n") is None


def test_records_of_the_version_without_digests_are_read(folder):
    record = folder / "a" / RECORD
    content = json.loads(record.read_text())
    record.write_text(json.dumps({key: content[key] for key in ("key", "score", "training", "made_by")}))
    assert Store(folder).find("a") is not None
