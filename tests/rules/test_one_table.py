"""What the package knows of torch's ops stands in `surgery/rules/` and nowhere else."""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery.graph import rule_table

ROOT = Path(surgery.__file__).parent
SCOPE = {"torch": torch, "nn": nn, "F": F, "operator": operator, "Tensor": torch.Tensor}
EXCEPTIONS = {
    "graph/fused.py": "containers of torch whose kernels pass by the parts that they hold: no ops themselves",
    "deploy/onnx/reads.py": "what asks for sizes in a run that an exporter records: no op of a network",
}


def tables(code: str) -> Iterator[tuple[int, list[str]]]:
    """The lines of collections, unions and ladders of comparisons that name two ops of torch or more, and the names."""
    for node in ast.walk(ast.parse(code)):
        found = [name for part in parts_of(node) if (name := op_name(part))]
        if len(set(found)) > 1:
            yield node.lineno, found  # type: ignore[attr-defined]


def parts_of(node: ast.AST) -> list[Any]:
    match node:
        case ast.Tuple() | ast.List() | ast.Set():
            return [part.value if isinstance(part, ast.Starred) else part for part in node.elts]
        case ast.Dict():
            return [*node.keys, *node.values]
        case ast.BinOp(op=ast.BitOr()):
            return [node.left, node.right]
        case ast.BoolOp():
            return [part for test in node.values for part in compared(test)]
        case ast.If():
            return list(ladder(node))
    return []


def ladder(node: ast.If) -> Iterator[Any]:
    """What the tests of ``if … elif …`` compare with."""
    yield from compared(node.test)
    if len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        yield from ladder(node.orelse[0])


def compared(test: ast.expr) -> list[Any]:
    if isinstance(test, ast.Compare):
        return [test.left, *test.comparators]
    return (
        test.args[1:] if isinstance(test, ast.Call) and ast.unparse(test.func) in ("isinstance", "issubclass") else []
    )


def op_name(node: Any) -> str:
    """The name of a layer's class or of a function that computes a tensor; empty for anything else."""
    if not isinstance(node, ast.Attribute) or ast.unparse(node).partition(".")[0] not in SCOPE:
        return ""
    name = ast.unparse(node)
    try:
        value = eval(name, dict(SCOPE))
    except AttributeError:
        return ""
    if isinstance(value, type):
        return name if issubclass(value, nn.Module) and value is not nn.Module else ""
    return name if callable(value) and not name.startswith("torch.backends") else ""


def test_there_is_no_table_of_ops_outside_the_rules():
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith("rules/") and place not in EXCEPTIONS:
            found.update({f"{place}:{line}": ops for line, ops in tables(path.read_text())})
    assert found == {}


@pytest.mark.parametrize("place", EXCEPTIONS)
def test_an_exception_is_needed(place):
    assert list(tables((ROOT / place).read_text()))


@pytest.mark.parametrize("code", [
    "KINDS = {nn.ReLU: 0.0, nn.ReLU6: 6.0}",
    "NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)",
    "def is_cat(node): return node.target in (torch.cat, torch.concat)",
    "def is_norm(layer): return isinstance(layer, nn.LayerNorm | nn.GroupNorm)",
    "def is_norm(layer): return isinstance(layer, nn.LayerNorm) or isinstance(layer, nn.GroupNorm)",
    """
    def kind(node):
        if node.target is F.layer_norm:
            return 1
        elif node.target is F.group_norm:
            return 2
    """,
    "SUMS = [*(operator.add, operator.sub)]",
])  # fmt: skip
def test_a_table_is_found(code):
    assert list(tables(textwrap.dedent(code)))


@pytest.mark.parametrize("code", [
    "make = [nn.Linear(3, 4), nn.ReLU()]",
    "kinds = (torch.Tensor, nn.Module)",
    "formats = {4: torch.channels_last, 5: torch.channels_last_3d}",
    "precise = (torch.float32, torch.float64)",
])  # fmt: skip
def test_other_collections_are_none(code):
    assert not list(tables(code))


def test_rules_say_what_they_know_in_the_documented_words():
    reached = [
        f"{path.name}:{node.lineno}"
        for path in sorted((ROOT / "rules").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("op._", "op.run", "op.claimed", "op.key"))
    ]
    assert reached == []


def test_axes_do_not_import_rules():
    for path in (ROOT / "axes").glob("*.py"):
        assert "surgery.rules" not in path.read_text(), path


KNOWN_OTHERWISE = {
    *("normalized_shape", "running_mean", "running_var", "training", "momentum"),  # the mask, the batch itself
    *("cudnn_enable", "cudnn_enabled", "other"),  # a kernel's choice; two tensors are no reduction
}


def test_what_leaves_channels_out_takes_all_settings():
    """A setting that is bound by the rule's names and handed on by those of ``over`` would get lost without a word."""
    assert rule_table.ruled_functions()
    rules = {id(rule): rule for ruled in (rule_table._FUNCTIONS, rule_table._MODULES) for rule in ruled.values()}
    over = [rule for rule in rules.values() if rule.over is not None]
    assert len(over) >= 10
    for rule in over:
        named = list(inspect.signature(rule.relate).parameters.values())[2:]
        taken = inspect.signature(rule.over).parameters
        settings = {p.name for p in named if p.kind is not p.VAR_KEYWORD} - KNOWN_OTHERWISE
        assert settings == set(list(taken)[2:]), rule.over
        assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in taken.values()), rule.over
