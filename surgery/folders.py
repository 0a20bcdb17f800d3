"""Folders of results that appear whole or not at all, and of runs that are not over."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from surgery.errors import UsageError

SETTINGS = "settings.json"
"""The file by which a folder is known as that of a run that is not over."""

LOCK = ".lock"
"""The file in such a folder that the run which writes there holds locked. The system unlocks it when the run ends."""


@contextmanager
def staged_folder(out: str | os.PathLike[str], *, marker: str, force: bool = False) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` when the block ends, and is removed if the block raises.

    Raises `UsageError`, before anything is written, where `refuse_folder` does.
    """
    out = Path(out)
    refuse_folder(out, marker=marker, force=force)
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield staging
        staging.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove(missing)
        raise


@contextmanager
def unfinished_folder(
    out: str | os.PathLike[str], settings: Mapping[str, Any], *, force: bool = False
) -> Iterator[Path]:
    """The folder of `unfinished`, for what a run needs to go on after it was cut off.

    It is removed when the block ends. If the block raises, it stays, and a later run with the same settings finds it as
    it was left; the error gets a note that says so. If no file was put into it, it is removed then, too.

    Args:
        out: where the run's results will be.
        settings: plain JSON data that tells runs apart.
        force: begin anew where the folder is of a run with other settings.

    Raises:
        UsageError: the folder is of a run with other settings, or of something else, or another run is writing there.
    """
    folder = unfinished(out)
    wanted = json.loads(json.dumps(settings))
    missing = [above for above in folder.parents if not above.exists()]
    if folder.exists():
        _settings(folder)  # nothing is written into a folder of something else, not even a lock
    else:
        _begin(folder, wanted)
    with _locked(folder):
        before = _settings(folder)
        other = [f"{k} {before.get(k)} and not {v}" for k, v in wanted.items() if k not in before or before[k] != v]
        if other or set(before) - set(wanted):
            if not force:
                raise UsageError(
                    f"{folder} is of a run that is not over, with {', '.join(other) or 'other settings'}: use the "
                    "settings of then to go on with it, or begin anew with force=True (--force)"
                )
            _begin_anew(folder, wanted)
        try:
            yield folder
        except BaseException as error:
            if {file.name for file in folder.rglob("*") if not file.is_dir()} <= {SETTINGS, LOCK}:
                shutil.rmtree(folder, ignore_errors=True)
                _remove(missing)
            else:
                error.add_note(f"what is done is kept in {folder}")
            raise
        shutil.rmtree(folder)


def unfinished(out: str | os.PathLike[str]) -> Path:
    """``OUT.unfinished``, beside ``out``."""
    out = Path(out) if Path(out).name else Path(out).absolute()
    return out.with_name(f"{out.name}.unfinished")


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, with its settings in it, unless another run does at the same moment."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    (staging / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    staging.chmod(0o755)
    try:
        staging.rename(folder)
    except OSError:
        shutil.rmtree(staging)
        if not folder.exists():
            raise


def _begin_anew(folder: Path, settings: Mapping[str, Any]) -> None:
    """Empty the folder, which is locked, and give it other settings; those of before are the last to go."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (SETTINGS, LOCK):
            path.unlink()
    part = folder / f"{SETTINGS}.part"
    part.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(part, folder / SETTINGS)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises `UsageError` where another run, of this process or another, is inside such a block for the folder."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"another run is writing to {folder}: wait until it is over, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _settings(folder: Path) -> dict[str, Any]:
    """What the folder of a run that is not over says of it."""
    try:
        content = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is in the way: it has no {SETTINGS} that can be read, so it is not of a run that is not over"
        ) from error
    assert isinstance(content, dict)
    return content


def _remove(folders: list[Path]) -> None:
    """Those of them that are empty."""
    for folder in folders:
        with suppress(OSError):  # not empty: someone else has used it meanwhile
            folder.rmdir()


def refuse_folder(out: str | os.PathLike[str], *, marker: str, force: bool) -> None:
    """Raise `UsageError` unless ``out`` can be written.

    It may not exist; with ``force`` it may, if it is empty or holds a file ``marker``, by which it is known as the
    result of an earlier run. No other folder is ever replaced.
    """
    out = Path(out)
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise UsageError(f"cannot write {out}: {above} is a file")
    if not out.exists():
        return
    if not force:
        raise UsageError(f"{out} exists: choose another folder, or replace it with force=True (--force)")
    if any(out.iterdir()) and not (out / marker).is_file():
        raise UsageError(f"{out} is not replaced: it holds no {marker}, so it was not made by this command")


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows that have the same keys, of which there is at least one, as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
