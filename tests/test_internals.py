"""docs/internals.md lists the private names of other packages that the package uses, and each of them exists."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

ROOT = Path(__file__).parents[1]
LISTED = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "internals.md").read_text(), flags=re.MULTILINE)
PRIVATE = re.compile(r"_[A-Za-z]\w*")
READERS = {"getattr", "setattr", "hasattr", "delattr", "attrgetter"}

INSTANCES: dict[str, Callable[[], Any]] = {
    "torch.nn.Module": nn.Module,
    "torch.nn.LSTM": lambda: nn.LSTM(1, 1),
    "torch.ao.nn.quantized.Linear": lambda: torch.ao.nn.quantized.Linear(1, 1),
    "torch.Tensor": lambda: torch.zeros(1),
    "torch.UntypedStorage": lambda: torch.zeros(1).untyped_storage(),
    "torch.autocast": lambda: torch.autocast("cpu"),
    "torch.fx.Graph": fx.Graph,
    "torch.fx.GraphModule": lambda: fx.GraphModule(nn.Module(), fx.Graph()),
    "torch._dynamo.eval_frame.OptimizedModule": lambda: torch.compile(nn.Identity(), backend="eager"),
}
"""Classes whose attributes are made when their objects are, and how to make one."""

NAMESPACES = (torch, torch.Tensor, torch.ops.aten, nn.Module(), nn.Conv2d, nn.MultiheadAttention)
"""What a string that is a private name may stand for an attribute of."""


FOREIGN = {name for name in vars(nn.Module()) if PRIVATE.fullmatch(name)}
"""What `torch.nn.Module` keeps its parts in: never the package's own."""


def private_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """The private names in a module's source that belong to others, with their lines.

    A name is somebody else's if it is reached through an import of another package, if the package defines none of
    that name, or if it is in `FOREIGN`.
    """
    imported = set(_imported(tree))
    for node in ast.walk(tree):
        names: list[object] = []
        theirs = False
        if isinstance(node, ast.Attribute):
            names, theirs = [node.attr], _root(node) in imported
        elif isinstance(node, ast.Import):
            names, theirs = [part for alias in node.names for part in alias.name.split(".")], True
        elif isinstance(node, ast.ImportFrom) and not _is_own(node):
            names, theirs = [*str(node.module).split("."), *(alias.name for alias in node.names)], True
        elif isinstance(node, ast.Call) and _root(node.func, last=True) in READERS:
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.search(node.value):
            name, theirs = node.value.removeprefix("aten::"), node.value.startswith("aten::")
            names = [name] if PRIVATE.fullmatch(name) and any(hasattr(space, name) for space in NAMESPACES) else []
        for name in names:
            if isinstance(name, str) and PRIVATE.fullmatch(name) and (theirs or name in FOREIGN or name not in own):
                yield node.lineno, name


def _imported(tree: ast.AST) -> Iterator[str]:
    """The names that a module's imports of other packages bind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not _is_own(node)):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)


def _is_own(node: ast.ImportFrom) -> bool:
    return node.level > 0 or str(node.module).partition(".")[0] == "surgery"


def _root(node: ast.expr, last: bool = False) -> str:
    """The first name of a dotted expression, or its last."""
    if isinstance(node, ast.Attribute):
        return node.attr if last else _root(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def defined_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def used_names() -> dict[str, list[str]]:
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "surgery").rglob("*.py"))}
    own = {name for tree in trees.values() for name in defined_names(tree)}
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for line, name in private_names(tree, own):
            found.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{line}")
    return found


def find(name: str) -> Any:
    """What a dotted name stands for; of a class in `INSTANCES`, the attribute of an object."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        start = ".".join(parts[:length])
        try:
            value = INSTANCES[start]() if start in INSTANCES else importlib.import_module(start)
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


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", LISTED)
def test_a_listed_name_exists_in_the_installed_version(name):
    find(name)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import torch._dynamo", "_dynamo"),
        ("import torchvision as t; x = t.models._mine", "_mine"),
        ("from torch.utils import _pytree as pytree", "_pytree"),
        ("from torch._ops import OpOverload", "_ops"),
        ("x = tensor._base", "_base"),
        ("x = getattr(tensor, '_base', None)", "_base"),
        ("x = own['_buffers']", "_buffers"),
        ("x = 'aten::_trilinear'", "_trilinear"),
    ],
)
def test_every_way_to_use_a_private_name_is_found(line, name):
    assert set(private_names(ast.parse(line), {"_buffers", "_mine", "_mvit", "_trilinear"})) == {(1, name)}


def test_what_the_package_defines_is_its_own():
    source = "from surgery.a import _b\nx = self._mine\ny = '_suffix'\n"
    assert list(private_names(ast.parse(source), {"_mine"})) == []
