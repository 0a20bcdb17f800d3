"""Folders of results that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import UsageError


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
        for folder in missing:
            with suppress(OSError):  # not empty: someone else has used it meanwhile
                folder.rmdir()
        raise


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
