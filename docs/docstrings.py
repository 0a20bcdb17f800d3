"""How the reference reads docstrings: an example is code, and a public name in backticks is a link to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

STUBS = {"surgery.": "__init__.pyi", "surgery.models.": "models/__init__.pyi"}
PACKAGE = Path(__file__).parents[1] / "surgery"
PUBLIC = {
    prefix + name
    for prefix, stub in STUBS.items()
    for name in re.findall(r" as (\w+)$", (PACKAGE / stub).read_text(), flags=re.MULTILINE)
}


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"(?<!`)`(surgery\.[\w.]+)`(?!`)", _link, text)


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f"[{found[0]}][{name}]" if name in PUBLIC else found[0]
