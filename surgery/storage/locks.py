"""One writer at a time: locks, and what writers that were killed have left next to their results.

The lock libraries leave their files behind, since removing one safely takes a look at it once it is locked.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import UNWRITABLE, UsageError

LOCKED, WRITING, REPLACED = ".surgery-lock", ".surgery-writing", ".surgery-replaced"
"""How the names end of a lock, of what becomes a result, and of a result while another one takes its place."""


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Be the only one that writes a file or folder; first remove what earlier writers of it that were killed left.

    The lock is a file next to ``out``, which is removed at the end. If the block raises, folders that were made for it
    are removed as well.

    Raises:
        UsageError: another process, or this one, is writing ``out``, or its folder cannot be written to.
    """
    out = Path(os.path.abspath(out))
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        with refused(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.with_name(f".{_short(out.name)}{LOCKED}"), out):
            with refused(out):
                _clear(out)
            yield
    except BaseException:
        remove_empty(missing)
        raise


def sweep(out: Path) -> None:
    """Remove what a writer of ``out`` left that was killed when its result was whole, unless another one writes now."""
    out = Path(os.path.abspath(out))
    name = _short(out.name)
    with suppress(OSError, UsageError):
        names = {path.name for path in out.parent.iterdir()}
        if any(n == f".{name}{LOCKED}" or (n.startswith(f".{name}-") and n.endswith(WRITING)) for n in names):
            with hold(out):
                pass


@contextmanager
def locked(lock: Path, out: Path) -> Iterator[None]:
    """Hold the lock of what is written to ``out``. The system unlocks it when the process ends.

    Raises:
        UsageError: another process, or this one, holds it, or it cannot be made.
    """
    with refused(out):
        descriptor = _acquire(lock)
    if descriptor is None:
        raise UsageError(f"another run is writing to {out}: wait until it is over, or choose another folder")
    try:
        yield
    finally:
        if sys.platform != "win32":  # where a file that is open cannot be removed
            with suppress(FileNotFoundError):  # its folder may have been moved
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    lock.unlink()
        os.close(descriptor)


@contextmanager
def refused(out: Path) -> Iterator[None]:
    """Make of an `OSError` in the block a `UsageError` that says why ``out`` cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"cannot write {out}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Say why a file cannot be written, in one line."""
    number = error.errno if isinstance(error, OSError) else None
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return said if number is None else {**UNWRITABLE, **_FORBIDDEN}.get(number, said)


_FORBIDDEN = {
    errno.EACCES: "its folder does not permit it",
    errno.EPERM: "its folder does not permit it",
    errno.ENOENT: "its folder cannot hold files",
    errno.ENOTDIR: "a part of its path is a file",
    errno.EEXIST: "a part of its path is a file",
}


def make_staging(out: Path) -> Path:
    """Make an empty folder next to ``out``, which the next run that holds ``out`` removes if this one is killed."""
    with refused(out):
        return Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{_short(out.name)}-", suffix=WRITING))


def aside(staging: Path) -> Path:
    """Return the name for what the content of ``staging`` replaces."""
    return staging.with_name(staging.name.removesuffix(WRITING) + REPLACED)


def remove_empty(folders: list[Path]) -> None:
    """Remove those that are empty."""
    for folder in folders:
        with suppress(OSError):  # not empty: someone else has used it meanwhile
            folder.rmdir()


def _clear(out: Path) -> None:
    """Remove what killed runs left; where one was killed between two renames, put the earlier result back."""
    prefix = f".{_short(out.name)}-"
    left = [path for path in out.parent.iterdir() if path.name.startswith(prefix)]
    for path in left:
        if path.name.endswith(REPLACED) and not os.path.lexists(out):
            path.rename(out)
        elif path.name.endswith((WRITING, REPLACED)):
            shutil.rmtree(path, ignore_errors=True)


def _short(name: str) -> str:
    """A name to which an ending can be added: that of a long one is its beginning and its digest."""
    data = os.fsencode(name)
    return name if len(data) <= 200 else f"{name[:40]}-{hashlib.sha256(data).hexdigest()[:16]}"


if sys.platform == "win32":
    import msvcrt

    def _acquire(lock: Path) -> int | None:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

else:
    import fcntl

    def _acquire(lock: Path) -> int | None:
        """Lock the file and return its descriptor; None if another one has it locked."""
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # some file systems say the latter
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            with suppress(FileNotFoundError):  # removed by its owner after it was opened here
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    return descriptor
            os.close(descriptor)
