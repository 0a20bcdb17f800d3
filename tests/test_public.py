"""The public package: what it exports, and what importing it costs in modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import surgery
from surgery.lazy import public_names

HEAVY = ("torch", "torchvision", "scipy", "networkx", "onnx", "onnxruntime", "matplotlib", "sklearn", "accelerate")


def loaded_by(code: str, *names: str) -> set[str]:
    """Those of the packages ``names`` that a fresh interpreter has loaded after running ``code``."""
    after = f"{code}\nimport sys\nprint(*sorted(set(sys.modules) & set({names!r})), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", after], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import surgery", *HEAVY, "rich", "typer") == set()


@pytest.mark.parametrize("package", [surgery, surgery.models], ids=["surgery", "models"])
def test_the_stub_is_the_list_of_public_names_and_says_where_each_is_defined(package):
    home = public_names(Path(package.__file__).with_suffix(".pyi"))
    assert list(package.__all__) == sorted(home)
    assert set(package.__all__) <= set(dir(package))
    for name, module in home.items():
        value = getattr(package, name)
        assert value.__module__ == module if isinstance(value, type | FunctionType) else value is not None


def test_no_public_name_is_hidden_by_a_module_of_the_same_name():
    for package in (surgery, surgery.models):
        folder = Path(package.__file__).parent
        modules = {path.stem for path in folder.iterdir() if path.suffix in ("", ".py")}
        home = public_names(folder / "__init__.pyi")
        assert modules & {name for name, module in home.items() if module != package.__name__} == set()


def test_a_part_of_the_package_is_an_attribute_of_it_and_nothing_else_is():
    assert loaded_by("import surgery; surgery.errors; surgery.units", "surgery.errors", "surgery.units") == {
        "surgery.errors",
        "surgery.units",
    }
    with pytest.raises(AttributeError, match="module 'surgery' has no attribute 'widn'; did you mean widen"):
        surgery.widn  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'widn' from 'surgery'"):
        exec("from surgery import widn")


def test_a_rule_registered_before_anything_else_is_not_overwritten_by_the_package_s_own():
    code = """
import surgery, torch
from surgery.graph.rule_table import rule_for
@surgery.oprule(torch.nn.ReLU)
def mine(op, x): ...
surgery.dimension_groups
assert rule_for(None, torch.nn.ReLU()).relate is mine
"""
    assert loaded_by(code, "surgery.rules") == {"surgery.rules"}
