"""docs/internals.md lists the private names of other packages that the package uses, and each of them exists."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

ROOT = Path(__file__).parents[1]
LISTED = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "internals.md").read_text(), flags=re.MULTILINE)
PRIVATE = re.compile(r"_[A-Za-z]\w*")
READERS = {"getattr", "setattr", "hasattr", "delattr", "attrgetter"}

INSTANCES: dict[str, Any] = {
    "torch.nn.Module": nn.Module(),
    "torch.Tensor": torch.zeros(1),
    "torch.UntypedStorage": torch.zeros(1).untyped_storage(),
    "torch.fx.Graph": fx.Graph(),
    "torch.fx.GraphModule": fx.GraphModule(nn.Module(), fx.Graph()),
    "torch.autocast": torch.autocast("cpu"),
    "torch.nn.LSTM": nn.LSTM(1, 1),
    "torch.ops.aten.relu.default": torch.ops.aten.relu.default,
    "collections.namedtuple": torch.max(torch.zeros(1), 0),
}
"""Objects whose attributes are made when they are: asked instead of their classes."""


def private_names(source: str, own: set[str]) -> Iterator[tuple[int, str]]:
    """The private names in a module's source that belong to others, with their lines.

    A name is somebody else's if the package defines none of that name, or if it is one of those that `torch.nn.Module`
    keeps its parts in.
    """
    foreign = {name for name in vars(nn.Module()) if PRIVATE.fullmatch(name)}

    def is_foreign(name: object) -> bool:
        return isinstance(name, str) and bool(PRIVATE.fullmatch(name)) and (name in foreign or name not in own)

    for node in ast.walk(ast.parse(source)):
        names: list[object] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] != "surgery":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and _name(node.func) in READERS:
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if node.value in foreign else re.findall(r"^aten::(_\w+)$", node.value)
        yield from ((node.lineno, str(name)) for name in names if is_foreign(name))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def defined_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def used_names() -> dict[str, list[str]]:
    sources = {path: path.read_text() for path in sorted((ROOT / "surgery").rglob("*.py"))}
    own = {name for source in sources.values() for name in defined_names(source)}
    found: dict[str, list[str]] = {}
    for path, source in sources.items():
        for line, name in private_names(source, own):
            found.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{line}")
    return found


def find(name: str) -> Any:
    """What a dotted name stands for: of a class in `INSTANCES`, an attribute of its object."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        start = ".".join(parts[:length])
        try:
            value = INSTANCES[start] if start in INSTANCES and length < len(parts) else importlib.import_module(start)
        except ImportError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def test_private_names_of_others_are_listed_and_no_others_are():
    used = used_names()
    listed = {part for name in LISTED for part in name.split(".") if PRIVATE.fullmatch(part)}
    unlisted = {name: places for name, places in used.items() if name not in listed}
    assert unlisted == {}, "add them to docs/internals.md, with what they are used for"
    assert listed - used.keys() == set(), "no longer used: take them out of docs/internals.md"


@pytest.mark.parametrize("name", LISTED)
def test_a_listed_name_exists_in_the_installed_version(name):
    find(name)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import torch._dynamo", "_dynamo"),
        ("from torch.utils import _pytree as pytree", "_pytree"),
        ("from torch._ops import OpOverload", "_ops"),
        ("x = tensor._base", "_base"),
        ("x = getattr(tensor, '_base', None)", "_base"),
        ("x = own['_buffers']", "_buffers"),
        ("x = 'aten::_trilinear'", "_trilinear"),
    ],
)
def test_every_way_to_use_a_private_name_is_found(line, name):
    assert list(private_names(line, {"_buffers", "_mine"})) == [(1, name)]
    assert list(private_names("from surgery.a import _b\nx = self._mine\ny = '_suffix'", {"_mine"})) == []
