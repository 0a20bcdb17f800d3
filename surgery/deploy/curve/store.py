"""Models that were trained and measured before, known by all that their weights depend on."""

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
from surgery.models.checkpoint import RECIPE, WEIGHTS, load_weights
from surgery.training.data.data import Data
from surgery.training.data.fingerprint import images_digest, training_digest
from surgery.training.history import Epoch, History, Score

RECORD = "trained.json"
"""The file by which a folder is known as that of a trained model; written last."""

NOTE = "budget.json"
"""The file in a model's folder that says how its widths were found."""

_PACKAGES = ("surgery", "torch", "onnxruntime")


@dataclass(frozen=True)
class Kept:
    """A model that is there already: its folder, how it was trained, by stage, and its score if it was taken."""

    folder: Path
    training: Mapping[str, History]
    score: Score | None

    def into(self, module: nn.Module) -> nn.Module:
        """A copy of the module, as it was before it was trained, with the weights that it got."""
        trained = copy.deepcopy(module)
        load_weights(trained, self.folder / WEIGHTS)
        return trained


class Store:
    """A folder of trained models, each in one of its own by the name of its key, and older ones to take over from."""

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
        """Where the model of a key is, or is to be written."""
        return self._folder / key

    def unfinished(self, key: str) -> Path:
        """Where the checkpoints are of a training that is not over."""
        return self._folder / f"{key}.training"

    def find_note(self, key: str) -> dict[str, Any] | None:
        """What was noted under a key, by this run or an earlier one."""
        return self._notes.get(key)

    def note(self, key: str, content: Mapping[str, Any]) -> None:
        """Note plain JSON data, with its key, for this run or a later one to go on with."""
        self._notes[key] = {**content, "key": key}
        write_note(self._folder / f"{key}.{NOTE}", self._notes[key])

    def find(self, key: str) -> Kept | None:
        """The model of a key, taken over from an earlier run if need be; None where it is still to be trained."""
        place = self.place(key)
        if not (place / RECORD).is_file() and key in self._earlier:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self._earlier[key], place)
        if not all((place / name).is_file() for name in (RECORD, RECIPE, WEIGHTS)):
            shutil.rmtree(place, ignore_errors=True)  # what was being written when the run was cut off
            return None
        record = _read(place / RECORD)
        score = record["score"] and Score(**record["score"])
        return Kept(place, {stage: _history(content) for stage, content in record["training"].items()}, score)

    def keep(self, key: str, training: Mapping[str, History], score: Score | None, made_by: Mapping[str, Any]) -> Kept:
        """Note that the model in its place is complete, and forget its checkpoints."""
        stages = {stage: history.to_dict() for stage, history in training.items()}
        record = {"key": key, "score": score and asdict(score), "training": stages, "made_by": dict(made_by)}
        write_note(self.place(key) / RECORD, record)
        shutil.rmtree(self.unfinished(key), ignore_errors=True)
        return Kept(self.place(key), training, score)


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain JSON data, all of it or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def key_of(made_by: Mapping[str, Any]) -> str:
    """A name for what depends on all of ``made_by``, plain JSON data, and on the versions of what computes it."""
    versions = environment().versions
    text = json.dumps([made_by, {name: versions.get(name) for name in _PACKAGES}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_identity(data: Data) -> dict[str, Any]:
    """What tells one data set from another, as plain JSON data."""
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
    """``source`` also as ``target``: the same files where the file system can, copies of them elsewhere."""

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


def _history(content: Mapping[str, Any]) -> History:
    epochs = [Epoch(**{**e, "score": e["score"] and Score(**e["score"])}) for e in content["epochs"]]
    return History(tuple(epochs), content["steps"])
