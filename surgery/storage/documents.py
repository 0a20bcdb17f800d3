"""Files of plain JSON: written whole, with a digest of themselves, and read strictly, whoever wrote them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from surgery.errors import CheckpointError

DIGEST = "sha256"
"""The field of a file that holds the digest of all its others."""

_LONGEST = 2**26
"""Bytes of the longest file that is read."""

_MOST = 2**22
"""The most values that a file may hold: short numbers are ten times as large in memory as in text."""

_DEEPEST = 64

T = TypeVar("T")


def read_object(path: Path, *, signed: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: a regular file.
        signed: check the digest that `sign` has added, where there must be one.

    Returns:
        its content.

    Raises:
        CheckpointError: it is not a regular file, is too long, cannot be read or is not an object; or its digest is
            missing or not that of its content.
    """
    size = refuse_special(path)
    if size > _LONGEST:
        raise CheckpointError(f"{path} is no file of this package: it has {size} bytes, more than {_LONGEST}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    content = parse_object(text, str(path))
    if signed:
        check_signature(content, str(path))
    return content


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse the text of one JSON object; ``where`` says in errors what the text is.

    Raises:
        CheckpointError: it is too long, holds too many values or half a character, or is not a JSON object.
    """
    try:
        refuse_long(text, where)
        content = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{where} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    _refuse_deep(content, where)
    try:  # an escape such as \ud800 is JSON, but no text
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where} cannot be read: {_half(error)}") from error
    return check_type(content, dict[str, Any], where)


def _half(error: UnicodeEncodeError) -> str:
    return f"{error.object[error.start : error.end]!r} is half a character"


def _refuse_deep(content: Any, where: str) -> None:
    """Raise `CheckpointError` for data nested so deeply that a function that calls itself would fail on it."""
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(_DEEPEST):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [part for parts in inner for part in parts if isinstance(part, (dict, list))]
        if not level:
            return
    raise CheckpointError(f"{where} cannot be read: it is nested too deeply")


def refuse_long(text: str | bytes, where: str) -> None:
    """Raise `CheckpointError` for JSON text that this package does not read, since it would take too much memory."""
    text = text.encode() if isinstance(text, str) else text
    nested = text.count(b"[") + text.count(b"{")
    if len(text) > _LONGEST or text.count(b",") > _MOST or nested > _MOST // 8:
        raise CheckpointError(f"{where} holds more values than a file of this package may")


def check_type(value: Any, kind: type[T], where: str) -> T:
    """Return plain JSON data as an instance of ``kind``; nothing but an integer to a float is converted.

    Args:
        value: what `json.loads` returns.
        kind: a type with annotations that msgspec reads: a dataclass, a `msgspec.Struct`, ``tuple[int, ...]``.
        where: what the value is, for the error.

    Raises:
        CheckpointError: it is of another type or out of the bounds of its type; names the field.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: {_half(error)}") from error
    except (msgspec.ValidationError, OverflowError) as error:
        found = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", str(error), re.DOTALL)
        said, field = found.groups() if found else (str(error), None)
        what = f"{said[:1].lower()}{said[1:]}".replace("`", "'")
        raise CheckpointError(f"{where}: {f'{field!r}: ' if field else ''}{what}") from error


def refuse_special(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        CheckpointError: there is none, it is a folder, a device or a pipe, or a link leads out of its folder.
    """
    try:
        found = path.stat()
        inside = not path.is_symlink() or path.resolve().is_relative_to(path.parent.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not read: it is not a regular file")
    if not inside:
        raise CheckpointError(f"{path} is not read: it is a link out of its folder")
    return found.st_size


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sign(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain JSON data with the SHA-256 of its canonical text added: sorted keys, no spaces."""
    plain = json.loads(json.dumps(content))
    return {**plain, DIGEST: _digest(plain)}


def check_signature(content: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` unless the digest that `sign` has added is that of the content."""
    if content.get(DIGEST) != _digest(content):
        raise CheckpointError(
            f"{where} was damaged or edited after it was written: {DIGEST!r} is not the digest of its content"
        )


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Sign plain JSON data and write it; the file appears whole, or stays as it was."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(sign(content), indent=1) + "\n")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _digest(content: Mapping[str, Any]) -> str:
    others = {key: value for key, value in content.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
