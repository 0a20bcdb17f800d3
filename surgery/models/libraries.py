"""Libraries whose models have a source of their own, ``PREFIX:...``: one row each, and one file that knows the library.

That file has four functions:

``parse(text, query, keywords) -> Source``
    reads what stands behind ``PREFIX:`` and behind ``?``; ``keywords`` replace those of the query. The result's
    ``entry`` says what the model takes. Raises `UsageError` for what the library does not have.
``build(source) -> nn.Module``
    builds the model, in training mode, without network access unless the source asks for weights.
``inputs(source, shape, generator)``
    makes random inputs, the first of this shape, as `surgery.trace` takes them.
``models() -> list[KnownModel]``
    lists what can be built by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from surgery.errors import UsageError


@dataclass(frozen=True)
class Library:
    """A library in the registry."""

    prefix: str
    """What its sources begin with, before the colon."""
    package: str
    """The package to import."""
    extra: str
    """The extra of this package that installs it."""
    file: str
    """The module that knows it."""


_ROWS = (
    Library("hf", "transformers", "hf", "surgery.models.hf"),
    Library("timm", "timm", "timm", "surgery.models.timm"),
)

LIBRARIES: Mapping[str, Library] = {row.prefix: row for row in _ROWS}
"""The libraries besides torchvision, by the prefix of their sources."""


def open_library(prefix: str) -> Any:
    """Import the file that knows a library.

    Args:
        prefix: a key of `LIBRARIES`.

    Returns:
        the module with the functions that are described above.

    Raises:
        UsageError: the library is not installed.

    Example:
        >>> open_library("hf").models()[0].entry.kind
        'features'
    """
    row = LIBRARIES[prefix]
    if find_spec(row.package) is None:
        how = f"pip install 'surgery[{row.extra}]'"
        raise UsageError(f"'{prefix}:' sources need {row.package}, which is not installed: {how}")
    return import_module(row.file)
