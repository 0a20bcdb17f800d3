"""The errors this package raises: each says what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from numbers import Integral

UNWRITABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it would be larger than this process may write",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "its name is too long",
}
"""Reasons for which nothing can be written, by the number of the error."""


class SurgeryError(Exception):
    """Base of every error raised on purpose by this package."""


class UsageError(SurgeryError, ValueError):
    """The caller asked for something that cannot be: a wrong name, rate, shape or folder. The CLI exits with 2."""


class CheckpointError(UsageError):
    """A stored file is damaged, malformed or of something else; the message names the file and the field."""


class TraceError(SurgeryError):
    """The model could not be turned into a graph."""


class EditError(SurgeryError):
    """An edit cannot be made exactly, so it was not made."""


class VerificationError(SurgeryError):
    """Two modules that should agree do not. The CLI exits with 1."""


class ExportError(SurgeryError):
    """A model could not be exported, or its export does not match it."""


class SurgeryWarning(UserWarning):
    """The warnings of this package. The command line prints each, and no others."""


class WeightsWarning(SurgeryWarning):
    """Published weights do not fit the model everywhere, so some initial values stay."""


class NothingChangedWarning(SurgeryWarning):
    """An operation on a whole model left it as it is, because nothing of it can be edited."""


class BudgetWarning(SurgeryWarning):
    """A budget is kept by the smallest model that was allowed alone: channels may have been given up to noise."""


class ImportanceWarning(SurgeryWarning):
    """An importance criterion cannot score some groups, which are scored by another one."""


class DamageWarning(SurgeryWarning):
    """A stored part of a run was damaged, and is made again."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, in Python's words, torch's or ONNX Runtime's."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in said for text in _MEMORY))


_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc",
           "failed to allocate", "bad allocation")  # fmt: skip


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """Make a `UsageError` for a ``kind`` that does not exist, which lists the closest names, or all if they are few."""
    options = sorted(set(known))
    text = name if isinstance(name, str) else ""
    close = difflib.get_close_matches(text, options, n=4, cutoff=0.5) or [o for o in options if text and text in o][:4]
    all_of_them = f": one of {', '.join(map(repr, options))}" if len(options) <= 10 else f" ({len(options)} are known)"
    hint = f"; did you mean {', '.join(map(repr, close))}?" if close else all_of_them
    return UsageError(f"unknown {kind} {name!r}{hint}")


def whole_number(what: str, value: object, least: int) -> int:
    """Return ``value`` as an int; raise `UsageError` unless it is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UsageError(f"{what} must be a whole number of at least {least}, not {value!r}")
    return int(value)
