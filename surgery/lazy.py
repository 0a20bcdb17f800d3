"""Packages whose public names are imported at their first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], dict[str, str]]:
    """Make a package import its public names lazily (PEP 562).

    Args:
        package: its qualified name.
        homes: for each module below the package, the public names that live in it, separated by spaces.

    Returns:
        the ``__getattr__`` of the package, which finds public names and submodules; and the home of each public name.

    Example:
        >>> __getattr__, _HOME = lazy_names(__name__, {"sources": "Source parse"})
    """
    home = {name: f"{package}.{module}" for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name in home:
            value = getattr(import_module(home[name]), name)
            setattr(import_module(package), name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find, home
