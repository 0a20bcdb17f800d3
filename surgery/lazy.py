"""Packages whose public names are imported at their first use."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def attach_stub(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make a package import the names in its stub lazily (PEP 562).

    The stub, ``__init__.pyi``, is the only list of public names: type checkers and editors read it, and so does this.

    Args:
        package: the ``__name__`` of the package.
        file: its ``__file__``; the stub is next to it.

    Returns:
        the package's ``__getattr__``, ``__dir__`` and ``__all__``.

    Example:
        >>> __getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
    """
    home = public_names(Path(file).with_suffix(".pyi"))

    def find(name: str) -> Any:
        if home.get(name, package) != package:
            value = getattr(import_module(home[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        close = " or ".join(difflib.get_close_matches(name, home))
        hint = f"; did you mean {close}?" if close else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")

    return find, lambda: sorted({*vars(sys.modules[package]), *home}), sorted(home)


def public_names(stub: Path) -> dict[str, str]:
    """Return the names that a stub exports (``from module import name as name``), each with its module."""
    imports = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
