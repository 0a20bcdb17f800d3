"""Single-point mutants of Python source: a function with one thing changed in its body."""

from __future__ import annotations

import ast
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}

Change = tuple[str, Callable[[], ast.AST | None]]
"""What is changed, and a function that makes the node to put in place; None drops a statement."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file. ``site`` and ``change`` number it among those of the file."""

    file: str
    function: str
    line: int
    column: int
    site: int
    change: int
    what: str
    source: str

    @property
    def key(self) -> str:
        """What names the mutant as long as its line stays what it is, wherever it moves to."""
        return f"{self.file} | {self.function} | {self.source} | {self.column} | {self.what}"


def list_mutants(file: str) -> list[Mutant]:
    """All mutants of the bodies of functions in a file, by its path from the root of the repository."""
    text = (ROOT / file).read_text()
    lines, found = text.splitlines(), []
    for site, (function, node) in enumerate(_sites(ast.parse(text))):
        for number, (what, _) in enumerate(_changes(node)):
            line = lines[node.lineno - 1].strip()
            found.append(Mutant(file, function, node.lineno, node.col_offset, site, number, what, line))
    return found


def apply_mutant(mutant: Mutant) -> None:
    """Change the function in this process.

    Raises:
        ValueError: it cannot be changed in place.
    """
    tree = ast.parse((ROOT / mutant.file).read_text())
    _, node = list(_sites(tree))[mutant.site]
    _, make = _changes(node)[mutant.change]
    tree = ast.fix_missing_locations(_Replace(node, make()).visit(tree))
    code = compile(tree, str(ROOT / mutant.file), "exec", dont_inherit=True)
    module = importlib.import_module(mutant.file.removesuffix(".py").replace("/", "."))
    owner: Any = module
    for name in mutant.function.split("."):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
        owner = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
    _function(owner).__code__ = code


def _function(found: Any) -> types.FunctionType:
    """The Python function inside what a class or module holds."""
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, functools.cached_property):
        found = found.func
    elif isinstance(found, (staticmethod, classmethod)):
        found = found.__func__
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    if not isinstance(found, types.FunctionType):
        raise ValueError(f"{found} is no function")
    return found


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST | None) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        if node is not self.old:
            return self.generic_visit(node)
        return ast.copy_location(ast.Pass() if self.new is None else self.new, node)


def _sites(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Nodes that can be changed, each with the function of the module or class that it is in."""
    for item in tree.body:
        inner = item.body if isinstance(item, ast.ClassDef) else [item]
        for function in inner:
            if isinstance(function, ast.FunctionDef):
                name = f"{item.name}.{function.name}" if isinstance(item, ast.ClassDef) else function.name
                for statement in function.body:
                    yield from ((name, node) for node in _nodes(statement) if _changes(node))


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below it, but for texts of errors, assertions, and types."""
    if isinstance(node, ast.Assert) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return
    yield node
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _nodes(child)


def _changes(node: Any) -> list[Change]:
    """The ways to change one node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = _COMPARISONS[type(node.ops[0])]
        return [
            (f"{_name(node.ops[0])} to {_name(other())}", lambda: ast.Compare(node.left, [other()], node.comparators))
        ]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        swapped = _OPERATORS[type(node.op)]
        return [(f"{_name(node.op)} to {_name(swapped())}", lambda: ast.BinOp(node.left, swapped(), node.right))]
    if isinstance(node, ast.BoolOp):
        joined = ast.And if isinstance(node.op, ast.Or) else ast.Or
        return [(f"{_name(node.op)} to {_name(joined())}", lambda: ast.BoolOp(joined(), node.values))]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return [(f"{_name(node.op)} removed", lambda: node.operand)]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [(f"{node.value} to {not node.value}", lambda: ast.Constant(not node.value))]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return [(f"{node.value} to {n}", lambda n=n: ast.Constant(n)) for n in (node.value + 1, node.value - 1)]
    if isinstance(node, ast.Name) and node.id in _NAMES and isinstance(node.ctx, ast.Load):
        return [(f"{node.id} to {_NAMES[node.id]}", lambda: ast.Name(_NAMES[node.id], ast.Load()))]
    if isinstance(node, (ast.If, ast.While)):
        parts = type(node)
        return [("condition negated", lambda: parts(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))]
    if isinstance(node, ast.IfExp):
        return [("condition negated", lambda: ast.IfExp(node.test, node.orelse, node.body))]
    if isinstance(node, ast.comprehension) and node.ifs:
        return []  # its condition is a comparison or the like, mostly
    dropped = isinstance(node, (ast.AugAssign, ast.Continue, ast.Break, ast.Raise)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )
    stored = isinstance(node, ast.Assign) and not isinstance(node.targets[0], (ast.Name, ast.Tuple))
    changes: list[Change] = [("statement dropped", lambda: None)] if dropped or stored else []
    if isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        turned = _OPERATORS[type(node.op)]
        what = f"{_name(node.op)}= to {_name(turned())}="
        changes.append((what, lambda: ast.AugAssign(node.target, turned(), node.value)))
    return changes


def _name(operator: ast.AST) -> str:
    return type(operator).__name__.lower()
