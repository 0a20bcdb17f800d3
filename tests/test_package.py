"""The shape of the package and of its tests: no import circle, every folder at its level, documented names, one home
for each helper."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections import defaultdict
from pathlib import Path

import networkx
import pytest

import surgery
from tests.sweeps import FAST, HEAVY, ORACLE
from tests.zoo import FAMILIES

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"errors", "lazy", "units", "version"},
    {"storage"},
    {"progress", "settings", "selectors"},
    {"graph"},
    {"axes"},
    {"rules", "layers"},
    {"edit"},
    {"operations", "taps", "models"},
    {"counting"},
    {"training"},
    {"deploy"},
    {"cli"},
    {"__main__"},
]
"""The folders and files of the package, from the lowest level to the highest."""


@functools.cache
def imports() -> networkx.DiGraph:
    """The modules of the package, and which one imports which."""
    modules = {_module_name(path): path for path in (ROOT / "surgery").rglob("*.py")}
    graph = networkx.DiGraph()
    graph.add_nodes_from(modules)
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [one if one in modules else node.module for one in wanted]
            else:
                continue
            graph.add_edges_from((name, one) for one in wanted if one in modules and one != name)
    return graph


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _circles(graph: networkx.DiGraph) -> list[list[str]]:
    return [sorted(circle) for circle in networkx.strongly_connected_components(graph) if len(circle) > 1]


def _room(module: str) -> str:
    return module.split(".")[1]


def test_no_modules_import_each_other_in_a_circle():
    assert _circles(imports()) == []


def test_no_folders_import_each_other_in_a_circle():
    edges = {(a, b) for a, b in imports().edges if min(a.count("."), b.count("."))}
    rooms = networkx.DiGraph((_room(a), _room(b)) for a, b in edges if _room(a) != _room(b))
    assert _circles(rooms) == []


def test_every_module_imports_from_its_own_level_or_a_lower_one():
    level = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
    inner = [(a, b) for a, b in imports().edges if min(a.count("."), b.count("."))]
    assert {_room(module) for edge in inner for module in edge} <= level.keys()
    assert {(a, b) for a, b in inner if level[_room(a)] < level[_room(b)]} == set()


@pytest.mark.parametrize("name", [n for n in surgery.__all__ if inspect.isfunction(getattr(surgery, n))])
def test_a_public_function_says_what_it_returns_and_shows_an_example(name):
    function = getattr(surgery, name)
    text = inspect.getdoc(function) or ""
    assert inspect.signature(function).return_annotation in (None, "None") or "Returns:" in text
    assert re.search(r"Examples?:", text)


def test_tests_stand_in_the_folder_of_what_they_test():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {folder for folder in folders if not (ROOT / "surgery" / folder).is_dir()} == {Path("benchmarks")}


def test_no_helper_of_the_tests_is_written_twice():
    found = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(ast.unparse(node).splitlines()) > 3:
                found[ast.unparse(node)].append(path.name)
    assert {code: files for code, files in found.items() if len(files) > 1} == {}


def test_every_test_that_is_called_slow_exists():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in (*FAST, ORACLE) if f"def {name}(" not in code} == set()
    assert FAMILIES.keys() >= HEAVY
