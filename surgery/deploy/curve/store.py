"""Trained models, kept under a key of all that their weights depend on."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from torch import nn

from surgery.deploy.measure.environment import environment
from surgery.errors import CheckpointError, DamageWarning
from surgery.models.saving import RECIPE, WEIGHTS, load_weights
from surgery.storage.documents import (
    DIGEST,
    check_signature,
    check_type,
    digest_file,
    read_object,
    refuse_special,
    write_object,
)
from surgery.training.data.data import Data
from surgery.training.data.fingerprint import images_digest, training_digest
from surgery.training.history import Epoch, History, Score

RECORD = "trained.json"
"""The file that marks the folder of a trained model; written last."""

NOTE = "budget.json"
"""The file in a model's folder with the search for its widths."""

_PACKAGES = ("surgery", "torch", "onnxruntime")


T = TypeVar("T")


class StoredHistory(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The record of a training; what grew is not kept."""

    epochs: tuple[Epoch, ...]
    steps: int
    growths: list[Any] = []

    def history(self) -> History:
        """The same, as training returns it."""
        return History(self.epochs, self.steps)


class Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The content of the file that marks a trained model; ``files`` are the digests of those next to it."""

    key: str
    score: Score | None
    training: dict[str, StoredHistory]
    made_by: dict[str, Any] = {}
    files: dict[str, str] | None = None
    sha256: str = ""


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
    """A folder with a subfolder for each trained model, named by its key; models of ``earlier`` folders are copied.

    A model whose files are not those that were written is named in a `DamageWarning`, and trained again.
    """

    def __init__(self, folder: Path, earlier: Iterable[str | os.PathLike[str]] = ()) -> None:
        self._folder = folder
        self._earlier: dict[str, Path] = {}
        runs = [Path(run) for run in earlier]
        for record in (record for run in runs for record in sorted(run.glob(f"*/{RECORD}"))):
            found = _read_if_whole(record, Record)
            if found is not None:
                self._earlier.setdefault(found.key, record.parent)
        notes = [*folder.glob(f"*/{NOTE}"), *folder.glob(f"*.{NOTE}")]
        notes += [note for run in runs for note in run.glob(f"*/{NOTE}")]
        contents = (_read_if_whole(note, dict[str, Any]) for note in notes)
        self._notes = {
            str(content["key"]): {name: value for name, value in content.items() if name != DIGEST}
            for content in contents
            if content and "key" in content
        }

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
        """Find the model of a key, here or in an earlier run; None if it is not trained yet, or was damaged."""
        place = self.place(key)
        record = _find_record(place)
        if record is None and key in self._earlier:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self._earlier[key], place)
            record = _find_record(place)
        if record is None:
            shutil.rmtree(place, ignore_errors=True)  # the run was interrupted while it wrote this
            return None
        return Kept(place, {stage: one.history() for stage, one in record.training.items()}, record.score)

    def keep(self, key: str, training: Mapping[str, History], score: Score | None, made_by: Mapping[str, Any]) -> Kept:
        """Mark the model in its folder as complete, and remove its checkpoints."""
        place = self.place(key)
        stages = {stage: history.to_dict() for stage, history in training.items()}
        record = {
            "key": key,
            "score": score and asdict(score),
            "training": stages,
            "made_by": dict(made_by),
            "files": {path.name: digest_file(path) for path in sorted(place.iterdir()) if path.is_file()},
        }
        write_object(place / RECORD, record)
        shutil.rmtree(self.unfinished(key), ignore_errors=True)
        return Kept(place, training, score)


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain JSON data, with its digest, atomically."""
    write_object(path, {name: value for name, value in content.items() if name != DIGEST})


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


def _read_if_whole(path: Path, kind: type[T]) -> T | None:
    """Read a file of a store; warn and return None if it is damaged or malformed.

    Versions before digests wrote none; their files are read, by the same schema.
    """
    try:
        content = read_object(path)
        if DIGEST in content or "files" in content:
            check_signature(content, str(path))
        return check_type(content, kind, str(path))
    except CheckpointError as error:
        _warn(error)
        return None


def _find_record(place: Path) -> Record | None:
    """The record of the model in a folder; None if there is none, or a file is not the one that was written."""
    record = _read_if_whole(place / RECORD, Record) if (place / RECORD).exists() else None
    return record if record is not None and _are_whole(place, record.files) else None


def _are_whole(place: Path, files: Mapping[str, str] | None) -> bool:
    """Whether the files of a model are those that were written; warns of one that is not."""
    for name in {RECIPE, WEIGHTS, *(files or ())}:
        path = place / name
        try:
            refuse_special(path)
            if files is not None and digest_file(path) != files.get(name):
                raise CheckpointError(f"{path} is damaged: it has not the bytes that were written")
        except CheckpointError as error:
            _warn(error)
            return False
    return True


def _warn(error: CheckpointError) -> None:
    warnings.warn(f"{error}: that is made again", DamageWarning, stacklevel=4)
