"""How the reference reads the source: an example is code, a public name in backticks is a link to it, and a
setting has the help and the default that its `option` gives."""

from __future__ import annotations

import ast
import re
import textwrap
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
    """Rewrites each docstring before it is parsed, and documents settings."""

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        call = _value(attr)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "option":
            default, help_text = call.args
            attr.value = ast.unparse(default)
            attr.docstring = griffe.Docstring(_Constants(attr.module).read(help_text), parent=attr)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"(?<!`)`(surgery\.[\w.]+)`(?!`)", _link, text)


class _Constants(dict[str, Any]):
    """The constants of a module by name, from its source. What is not a constant stands for nothing."""

    def __init__(self, module: griffe.Module) -> None:
        super().__init__()
        self.module = module

    def read(self, value: ast.expr) -> Any:
        return eval(compile(ast.Expression(value), "<constant>", "eval"), {}, self)

    def __missing__(self, name: str) -> Any:
        member = self.module.members.get(name)
        if member is None:
            raise KeyError(name)
        if isinstance(member, griffe.Alias):
            member = member.final_target
        value = _value(member)
        return _Constants(member.module).read(value) if value is not None else lambda *values: None


def _value(member: griffe.Object) -> ast.expr | None:
    """What is assigned to a name, as it is written; None for a function or class."""
    (statement,) = ast.parse(textwrap.dedent(member.source)).body or [None]
    return statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f"[{found[0]}][{name}]" if name in PUBLIC else found[0]
