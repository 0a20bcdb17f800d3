"""The file from which an interrupted training resumes, written between steps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from surgery.errors import CheckpointError, UsageError
from surgery.storage.documents import check_type, digest_file, parse_object, refuse_special
from surgery.storage.locks import hold
from surgery.training.history import Epoch, Grown

_FORMAT = 2
"""Since 2, a checkpoint ends with a digest."""

_SEAL = b"surgery-sha256:"
"""What stands before the digest at the end of the file."""

_REMEDY = "; remove it to repeat this training, and nothing else"


@dataclass
class Progressed:
    """The progress of a training.

    Attributes:
        steps: steps done, including skipped ones.
        skipped: epochs skipped at the beginning.
        epochs: records of finished epochs.
        growths: records of growths.
        within: steps done of the current epoch, including skipped ones.
        counted: steps taken of the current epoch.
        summed: sum of their losses.
        seconds: time they took.
    """

    steps: int = 0
    skipped: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    growths: list[Grown] = field(default_factory=list)
    within: int = 0
    counted: int = 0
    summed: float = 0.0
    seconds: float = 0.0

    @property
    def epoch(self) -> int:
        """The number of the current epoch."""
        return self.skipped + len(self.epochs)


@dataclass(frozen=True)
class Checkpoint:
    """A file from which a training resumes, and what identifies the training."""

    path: Path
    identity: Mapping[str, Any]

    def hold(self) -> AbstractContextManager[None]:
        """Make the folder of the file, and be the only one that writes the file.

        Raises:
            UsageError: it cannot be written, or another training is writing it.
        """
        return hold(self.path)

    def save(
        self,
        progressed: Progressed,
        model: nn.Module,
        optimizer: Optimizer | None,
        scaler: torch.amp.GradScaler | None,
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace the file. Without an optimizer it marks a finished training.

        Args:
            best: the weights of the best epoch so far, where one is kept.

        Raises:
            OSError: it cannot be written, as on a full disk; the earlier file is kept.
        """
        state = {
            "format": _FORMAT,
            "identity": self._identity,
            "progressed": json.dumps(asdict(progressed)),
            "model": model.state_dict(),
            "optimizer": optimizer and optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            **({} if best is None else {"best": best}),
        }
        try:
            torch.save(state, self._part)
            _seal(self._part)
            os.replace(self._part, self.path)
        except BaseException as error:
            self._part.unlink(missing_ok=True)
            if isinstance(error, RuntimeError):  # what torch raises on a full disk
                raise OSError(f"the checkpoint {self.path} cannot be written: {error}") from error
            raise

    def read(self) -> Saved | None:
        """Read the file; None if it does not exist.

        Raises:
            UsageError: it belongs to another training, or the identity is not JSON data.
            CheckpointError: it is damaged, or no checkpoint.
        """
        now = json.loads(self._identity)
        if not self.path.exists() and not self.path.is_symlink():
            return None
        state = _load(self.path)
        before = parse_object(state.identity, f"{self.path}: 'identity'")
        other = [
            f"{key} {before.get(key)} and not {now.get(key)}"
            for key in {**now, **before}
            if before.get(key) != now.get(key)
        ]
        if other or set(before) != set(now):
            raise UsageError(
                f"{self.path} is the checkpoint of another training, with {', '.join(other) or 'other settings'}: "
                "resume with the same settings, or remove it to start over"
            )
        where = f"{self.path}: 'progressed'"
        return Saved(check_type(parse_object(state.progressed, where), Progressed, where), state, self.path)

    @property
    def _part(self) -> Path:
        """The file that is written before it replaces the checkpoint."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def _identity(self) -> str:
        return json.dumps(plain_identity(self.identity))


class _State(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The content of a checkpoint; without an optimizer it is that of a finished training."""

    format: int
    identity: str
    progressed: str
    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any] | None
    best: dict[str, Any] | None = None


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint."""

    progressed: Progressed
    _state: _State
    _path: Path

    @property
    def finished(self) -> bool:
        return self._state.optimizer is None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The weights of the best epoch so far; None where none are kept."""
        return self._state.best

    def restore(self, model: nn.Module, optimizer: Optimizer | None, scaler: torch.amp.GradScaler | None) -> None:
        """Load the state of the model, the optimizer and the scaler.

        Raises:
            CheckpointError: they are of another structure.
        """
        try:
            model.load_state_dict(self._state.model)
            if optimizer is not None and self._state.optimizer is not None:
                optimizer.load_state_dict(self._state.optimizer)
            if scaler is not None and self._state.scaler:
                scaler.load_state_dict(self._state.scaler)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._path} does not fit the training: {error}") from error


def is_finished(path: Path) -> bool:
    """Whether this checkpoint marks a finished training."""
    if not path.exists():
        return False
    try:
        return bool(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["optimizer"] is None)
    except Exception:  # `Checkpoint.read` refuses the file
        return False


def _load(path: Path) -> _State:
    """Read a checkpoint once its bytes are known to be those that were written."""
    refuse_special(path)
    sealed = _check_seal(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what unpickling happens to raise
        raise CheckpointError(f"{path} is not a checkpoint of a training: {error}{_REMEDY}") from error
    number = state.get("format") if isinstance(state, dict) else None
    if number == _FORMAT and not sealed:
        raise CheckpointError(f"{path} is damaged: its digest is missing{_REMEDY}")
    if number not in (1, _FORMAT):
        raise CheckpointError(f"{path} is a checkpoint of another version: remove it to start over")
    return check_type(state, _State, str(path))


def _seal(path: Path) -> None:
    """Append the digest of a zip file to it, as the comment that zip files may end with."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment
        file.write((len(_SEAL) + 64).to_bytes(2, "little"))
    digest = digest_file(path)
    with path.open("ab") as file:
        file.write(_SEAL + digest.encode())


def _check_seal(path: Path) -> bool:
    """Compare a file with the digest at its end. False if there is none."""
    length = len(_SEAL) + 64
    with path.open("rb") as file:
        rest = max(file.seek(0, os.SEEK_END) - length, 0)
        file.seek(rest)
        end = file.read()
        if not end.startswith(_SEAL):
            return False
        file.seek(0)
        found = hashlib.sha256()
        while rest:
            part = file.read(min(rest, 2**20))
            found.update(part)
            rest -= len(part)
    if found.hexdigest().encode() != end[len(_SEAL) :]:
        raise CheckpointError(f"{path} is damaged: it has not the bytes that were written{_REMEDY}")
    return True


def plain_identity(identity: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what identifies a training as plain JSON data; selectors of layers may be keys and values in it.

    Raises:
        UsageError: a value that a later run cannot be compared by, such as a class or a function.
    """
    return {
        key if isinstance(key, str) else json.dumps(_plain(key, str(key))): _plain(value, str(key))
        for key, value in identity.items()
    }


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return plain_identity(value)
    if isinstance(value, (list, tuple)):
        return [_plain(part, key) for part in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Set):
        return sorted(_plain(part, key) for part in value)
    if callable(value) and not isinstance(value, nn.Module):
        name = getattr(value, "__name__", repr(value))
        raise UsageError(
            f"a checkpoint cannot store {name}: select layers by text, such as 'layer3', 'layer*.conv2' or "
            "'nn.Conv2d', or pass no checkpoint"
        )
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise UsageError(f"what identifies a training must be plain JSON data: {key!r} is {value!r}")
