"""Tensors that are set aside while others are worked on: in memory up to a bound, beyond it in temporary files."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor


class Kept(Protocol):
    """Gives back a tensor that was set aside: the same one, or with ``own`` one that may be written to."""

    def __call__(self, *, own: bool = False) -> Tensor: ...


_ROOM = 2**25
"""Bytes that are kept in memory."""
_ROOM_ELSEWHERE = 2**32
"""Bytes that are kept in the memory of an accelerator."""


class Shelf:
    """Sets tensors aside. Files go when the context is left.

    Example:
        >>> with Shelf() as shelf:
        ...     back = shelf.put("rows", tensor)
        ...     tensor = back()
        ...     shelf.clear("rows")
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[str, Path] = {}
        self._held: dict[str, int] = {}
        self._used = 0
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, name: str, tensor: Tensor) -> Kept:
        """Set a tensor aside, under a name that others may have too.

        Returns:
            what gives it back for as long as the name is not cleared.
        """
        room = _ROOM if tensor.device.type == "cpu" else _ROOM_ELSEWHERE
        if self._used + tensor.nbytes <= room:
            self._used += tensor.nbytes
            self._held[name] = self._held.get(name, 0) + tensor.nbytes
            return lambda *, own=False: tensor.clone() if own else tensor
        return self._write(self._file(name), tensor)

    def clear(self, name: str) -> None:
        """Forget what was set aside under a name."""
        self._used -= self._held.pop(name, 0)
        if name in self._files:
            self._files.pop(name).unlink()

    def _file(self, name: str) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="surgery-")
        return self._files.setdefault(name, Path(self._folder.name) / str(next(self._numbers)))

    def _write(self, path: Path, tensor: Tensor) -> Kept:
        whole = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        with path.open("ab") as file:
            start = file.tell()
            whole.tofile(file)
        shape, dtype, device, count = tensor.shape, tensor.dtype, tensor.device, tensor.nbytes

        def read(*, own: bool = False) -> Tensor:
            found = torch.from_numpy(np.fromfile(path, np.uint8, count, offset=start))
            return found.to(device).view(dtype).view(shape)

        return read
