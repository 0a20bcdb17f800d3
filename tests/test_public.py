"""The public package: what it exports, and what importing it costs in modules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import surgery

HEAVY = ("torch", "torchvision", "scipy", "networkx", "onnx", "onnxruntime", "matplotlib", "sklearn", "accelerate")


def loaded_by(code: str, *names: str) -> set[str]:
    """Those of the packages ``names`` that a fresh interpreter has loaded after running ``code``."""
    after = f"{code}\nimport sys\nprint(*sorted(set(sys.modules) & set({names!r})), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", after], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import surgery", *HEAVY, "rich", "typer") == set()


def test_every_public_name_can_be_had_and_is_listed():
    assert set(surgery.__all__) <= set(dir(surgery))
    assert all(getattr(surgery, name) is not None for name in surgery.__all__)


@pytest.mark.parametrize("package", [surgery, surgery.models], ids=["surgery", "models"])
def test_type_checkers_are_told_of_the_same_names_as_the_interpreter(package):
    tree = ast.parse(Path(package.__file__).read_text())
    told = {
        alias.name: f"{node.module}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "surgery"
        for alias in node.names
        if alias.asname == alias.name
    }
    assert told == package._HOME


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    for package in (surgery, surgery.models):
        modules = {path.stem for path in Path(package.__file__).parent.iterdir() if path.suffix in ("", ".py")}
        assert modules & set(package._HOME) == set()


def test_a_part_of_the_package_is_an_attribute_of_it_and_nothing_else_is():
    assert loaded_by("import surgery; surgery.errors; surgery.units", "surgery.errors", "surgery.units") == {
        "surgery.errors",
        "surgery.units",
    }
    with pytest.raises(AttributeError, match="module 'surgery' has no attribute 'widn'"):
        surgery.widn  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'widn' from 'surgery'"):
        exec("from surgery import widn")


def test_a_rule_registered_before_anything_else_is_not_overwritten_by_the_package_s_own():
    code = """
import surgery, torch
from surgery.graph.table import rule_for
@surgery.oprule(torch.nn.ReLU)
def mine(op, x): ...
surgery.dimension_groups
assert rule_for(None, torch.nn.ReLU()).relate is mine
"""
    assert loaded_by(code, "surgery.rules") == {"surgery.rules"}
