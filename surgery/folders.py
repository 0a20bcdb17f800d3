"""Folders of results, which appear whole or not at all, and folders of unfinished runs."""

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
"""The file that marks the folder of an unfinished run."""

LOCK = ".lock"
"""The file that a run locks in its folder. The system unlocks it when the run ends."""


@contextmanager
def staged_folder(out: str | os.PathLike[str], *, marker: str, force: bool = False) -> Iterator[Path]:
    """Make an empty folder next to ``out`` that becomes ``out`` when the block ends; remove it if the block raises.

    Args:
        out: the folder of results.
        marker: the file that marks results of the same kind, as in `refuse_folder`.
        force: replace earlier results.

    Raises:
        UsageError: as `refuse_folder` does, before anything is written.
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
    """Make or reopen the folder `unfinished`, for what a run needs to resume after an interruption.

    It is removed when the block ends. If the block raises, it stays for a later run with the same settings, and the
    error gets a note that says so; without a file in it, it is removed.

    Args:
        out: where the run's results will be.
        settings: plain JSON data that identifies the run.
        force: start again where the folder belongs to a run with other settings.

    Raises:
        UsageError: the folder belongs to a run with other settings or to something else, or a run is writing there.
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
                    f"{folder} belongs to an unfinished run with {', '.join(other) or 'other settings'}: use its "
                    "settings to resume it, or start again with force=True (--force)"
                )
            _restart(folder, wanted)
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
    """Return the folder of an unfinished run: ``OUT.unfinished``, next to ``out``."""
    out = Path(out) if Path(out).name else Path(out).absolute()
    return out.with_name(f"{out.name}.unfinished")


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder with its settings, unless another run makes it at the same moment."""
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


def _restart(folder: Path, settings: Mapping[str, Any]) -> None:
    """Empty the locked folder and give it other settings; replace the earlier ones last."""
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
    """Hold the folder's lock; raise `UsageError` while another run, in this process or another, holds it."""
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
    """Read the settings in the folder of an unfinished run."""
    try:
        content = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} is in the way: it has no {SETTINGS} that can be read, so no unfinished run wrote it"
        ) from error
    assert isinstance(content, dict)
    return content


def _remove(folders: list[Path]) -> None:
    """Remove those that are empty."""
    for folder in folders:
        with suppress(OSError):  # not empty: someone else has used it meanwhile
            folder.rmdir()


def refuse_folder(out: str | os.PathLike[str], *, marker: str, force: bool) -> None:
    """Raise `UsageError` unless ``out`` can be written.

    It must not exist, unless ``force`` is given and it is empty or holds the file ``marker``, which an earlier run
    wrote. No other folder is ever replaced.
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
    """Write one or more rows with the same keys as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
