"""Trained models, kept under a key of all that their weights depend on."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery.deploy.measure.environment import environment
from surgery.errors import UsageError
from surgery.models.saving import RECIPE, WEIGHTS, load_weights
from surgery.training.data.data import Data
from surgery.training.data.fingerprint import images_digest, training_digest
from surgery.training.history import Epoch, History, Score

RECORD = "trained.json"
"""The file that marks the folder of a trained model; written last."""

NOTE = "budget.json"
"""The file in a model's folder with the search for its widths."""

_PACKAGES = ("surgery", "torch", "onnxruntime")


@dataclass(frozen=True)
class Kept:
    """A stored model: its folder, the records of its training by stage, and its score if there is one."""

    folder: Path
    training: Mapping[str, History]
    score: Score | None

    def into(self, module: nn.Module) -> nn.Module:
        """Return a copy of the module, given as before its training, with the trained weights."""
        trained = copy.deepcopy(module)
        load_weights(trained, self.folder / WEIGHTS)
        return trained


class Store:
    """A folder with a subfolder for each trained model, named by its key; models of ``earlier`` folders are copied."""

    def __init__(self, folder: Path, earlier: Iterable[str | os.PathLike[str]] = ()) -> None:
        self._folder = folder
        self._earlier: dict[str, Path] = {}
        for run in earlier:
            for record in sorted(Path(run).glob(f"*/{RECORD}")):
                self._earlier.setdefault(_read(record)["key"], record.parent)
        notes = [*folder.glob(f"*/{NOTE}"), *folder.glob(f"*.{NOTE}")]
        notes += [note for run in earlier for note in Path(run).glob(f"*/{NOTE}")]
        self._notes = {content["key"]: content for content in map(_plain, notes)}

    def place(self, key: str) -> Path:
        """The folder of the model of a key."""
        return self._folder / key

    def unfinished(self, key: str) -> Path:
        """The folder of checkpoints of an unfinished training."""
        return self._folder / f"{key}.training"

    def find_note(self, key: str) -> dict[str, Any] | None:
        """Find the note under a key, of this run or an earlier one."""
        return self._notes.get(key)

    def note(self, key: str, content: Mapping[str, Any]) -> None:
        """Store plain JSON data under a key, for this run or a later one."""
        self._notes[key] = {**content, "key": key}
        write_note(self._folder / f"{key}.{NOTE}", self._notes[key])

    def find(self, key: str) -> Kept | None:
        """Find the model of a key, here or in an earlier run; None if it is not trained yet."""
        place = self.place(key)
        if not (place / RECORD).is_file() and key in self._earlier:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self._earlier[key], place)
        if not all((place / name).is_file() for name in (RECORD, RECIPE, WEIGHTS)):
            shutil.rmtree(place, ignore_errors=True)  # the run was interrupted while it wrote this
            return None
        record = _read(place / RECORD)
        score = record["score"] and Score(**record["score"])
        training = {
            stage: History(tuple(map(Epoch.from_dict, content["epochs"])), content["steps"])
            for stage, content in record["training"].items()
        }
        return Kept(place, training, score)

    def keep(self, key: str, training: Mapping[str, History], score: Score | None, made_by: Mapping[str, Any]) -> Kept:
        """Mark the model in its folder as complete, and remove its checkpoints."""
        stages = {stage: history.to_dict() for stage, history in training.items()}
        record = {"key": key, "score": score and asdict(score), "training": stages, "made_by": dict(made_by)}
        write_note(self.place(key) / RECORD, record)
        shutil.rmtree(self.unfinished(key), ignore_errors=True)
        return Kept(self.place(key), training, score)


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain JSON data atomically."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def key_of(made_by: Mapping[str, Any]) -> str:
    """A key of ``made_by``, plain JSON data, and of the versions of the packages."""
    versions = environment().versions
    text = json.dumps([made_by, {name: versions.get(name) for name in _PACKAGES}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_identity(data: Data) -> dict[str, Any]:
    """The identity of a data set, as plain JSON data."""
    return {
        "source": data.source,
        "counts": list(data.counts),
        "image_size": data.image_size,
        "channels": data.channels,
        "augment": data.augment,
        "train": training_digest(data.train),
        "test": images_digest(data.test),
    }


def link_folder(source: Path, target: Path) -> None:
    """Make ``target`` a copy of ``source``, by hard links where the file system has them."""

    def link(file: str, other: str) -> None:
        try:
            os.link(file, other)
        except OSError:
            shutil.copy2(file, other)

    shutil.copytree(source, target, copy_function=link)


def _read(path: Path) -> dict[str, Any]:
    content = _plain(path)
    if not {"key", "score", "training"} <= set(content):
        raise UsageError(f"{path} is not complete: remove its folder to train that model again")
    return content


def _plain(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): remove its folder to train that model again") from error
    assert isinstance(content, dict)
    return content
