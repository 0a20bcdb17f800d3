"""Folders of results, which appear whole or not at all, and folders of unfinished runs."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, UsageError
from surgery.storage.documents import DIGEST, check_signature, read_object, write_object
from surgery.storage.locks import aside, hold, locked, make_staging, refused, remove_empty, sweep
from surgery.storage.renaming import exchange, rename_new

SETTINGS = "settings.json"
"""The file that marks the folder of an unfinished run."""

LOCK = ".lock"
"""The file that a run locks in its folder. The system unlocks it when the run ends."""


@contextmanager
def staged_folder(out: str | os.PathLike[str], *, marker: str, force: bool = False) -> Iterator[Path]:
    """Make an empty folder next to ``out`` that becomes ``out`` when the block ends; remove it if the block raises.

    Nobody else writes ``out`` meanwhile. A run that is killed leaves the earlier results or the new ones, whole; what
    else it left is removed by the next run.

    Args:
        out: the folder of results.
        marker: the file that marks results of the same kind, as in `refuse_folder`.
        force: replace earlier results.

    Raises:
        UsageError: as `refuse_folder` does, before anything is written, and for what has appeared at ``out`` meanwhile;
            another run is writing there, or nothing can be written there.
    """
    out = Path(os.path.realpath(out))  # what a link leads to is replaced, not the link
    refuse_folder(out, marker=marker, force=force)
    with hold(out):
        refuse_folder(out, marker=marker, force=force)
        staging = make_staging(out)
        try:
            yield staging
            with refused(out):
                staging.chmod(folder_mode())
            _place(staging, out, marker, force)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _place(staging: Path, out: Path, marker: str, force: bool) -> None:
    """Rename the new results to ``out``, and remove the earlier ones that were there."""
    refuse_folder(out, marker=marker, force=force)
    try:
        with refused(out):
            if not out.exists():
                try:
                    return rename_new(staging, out)
                except FileExistsError:
                    raise UsageError(f"{out} has appeared meanwhile: choose another folder") from None
            old = staging
            if not exchange(staging, out):
                old = aside(staging)
                out.rename(old)
                rename_new(staging, out)
    except BaseException:
        if aside(staging).exists() and not out.exists():  # between the two renames
            aside(staging).rename(out)
        raise
    if any(old.iterdir()) and not (old / marker).is_file():  # it has changed since it was looked at
        if old is not staging or not exchange(staging, out):
            out.rename(staging)
            old.rename(out)
        raise UsageError(f"{out} is not replaced: something else was written there meanwhile")
    shutil.rmtree(old, ignore_errors=True)
    return None


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
    with hold(folder):
        with refused(folder):
            there = folder.exists()
        if there:
            _settings(folder)  # nothing is written into a folder of something else, not even a lock
        else:
            _begin(folder, wanted)
    with locked(folder / LOCK, folder):
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
                remove_empty(missing)
            else:
                error.add_note(f"what is done is kept in {folder}")
            raise
        done = make_staging(folder)
        folder.rename(done)  # a run that is killed while it removes files leaves nothing in the way of the next
    shutil.rmtree(done)


def file_mode() -> int:
    """The mode of a new file by the user's umask."""
    return 0o666 & ~_umask()


def folder_mode() -> int:
    """The mode of a new folder by the user's umask."""
    return 0o777 & ~_umask()


def _umask() -> int:
    """The umask, which can only be read by setting it: meanwhile it lets nobody else in."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def unfinished(out: str | os.PathLike[str]) -> Path:
    """Return the folder of an unfinished run: ``OUT.unfinished``, next to ``out``."""
    out = Path(out) if Path(out).name else Path(out).absolute()
    return out.with_name(f"{out.name}.unfinished")


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder with its settings, unless another program makes it at the same moment."""
    staging = make_staging(folder)
    write_object(staging / SETTINGS, settings)
    staging.chmod(folder_mode())
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
    write_object(folder / SETTINGS, settings)


def _settings(folder: Path) -> dict[str, Any]:
    """Read the settings in the folder of an unfinished run."""
    try:
        content = read_object(folder / SETTINGS)
    except CheckpointError as error:
        raise UsageError(
            f"{folder} is in the way: it has no {SETTINGS} that can be read, so no unfinished run wrote it ({error})"
        ) from error
    if DIGEST in content:  # there was none in earlier versions
        try:
            check_signature(content, str(folder / SETTINGS))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove {folder} to start that run again") from error
    return {name: value for name, value in content.items() if name != DIGEST}


def refuse_file(out: Path, *, force: bool) -> None:
    """Raise `UsageError` for a file that exists, unless ``force``."""
    if out.exists() and not force:
        sweep(out)
        raise UsageError(f"{out} exists: choose another file, or replace it with --force")


def refuse_folder(out: str | os.PathLike[str], *, marker: str, force: bool) -> None:
    """Raise `UsageError` unless ``out`` can be written.

    It must not exist, unless ``force`` is given and it is empty or holds the file ``marker``, which an earlier run
    wrote. No other folder is ever replaced.
    """
    out = Path(out)
    with refused(out):
        above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not above.is_dir():
            raise UsageError(f"cannot write {out}: {above} is a file")
        if not out.exists():
            return
        if not force:
            sweep(out)
            raise UsageError(f"{out} exists: choose another folder, or replace it with force=True (--force)")
        if any(out.iterdir()) and not (out / marker).is_file():
            raise UsageError(f"{out} is not replaced: it holds no {marker}, so it was not made by this command")


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one or more rows with the same keys as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
