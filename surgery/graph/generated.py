"""The Python code of graphs, generated once for each state that a graph is in.

Every edit copies a module, and every comparison does. Most of the time would go into generating the code of the copied
graph, which is the code of the original.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx

from surgery.graph.gradients import generating_modes, mode_mark

_CODE = "_surgery_code"


@dataclass(frozen=True)
class _Generated:
    """Generated code, and all that it was generated from."""

    code: Any
    options: dict[str, Any]
    state: list[Any]


@contextmanager
def generated_code(graph: fx.Graph) -> Iterator[None]:
    """While this is entered, code generated from ``graph`` sets the modes of its nodes, and the code of a graph that is
    as it was the last time is that of the last time."""

    def python_code(root_module: str, **options: Any) -> Any:
        options["root_module"] = root_module
        state = _state(graph)
        known = graph.__dict__.get(_CODE)
        if known is None or known.options != options or not _is_same(known.state, state):
            with generating_modes(graph):
                known = _Generated(fx.Graph.python_code(graph, **options), options, state)
            graph.__dict__[_CODE] = known
        return known.code

    graph.__dict__["python_code"] = python_code
    try:
        yield
    finally:
        del graph.__dict__["python_code"]


def copy_with_code(graph: fx.Graph, memo: dict[int, Any]) -> fx.Graph:
    """A deep copy of ``graph``, for which no code is generated where ``graph`` has its own."""
    result = copy.deepcopy(graph, memo)
    known = graph.__dict__.get(_CODE)
    if known is not None and _is_same(known.state, _state(graph)):
        names = [[node.name for node in g.nodes] for g in (graph, result)]
        if names[0] == names[1]:
            result.__dict__[_CODE] = _Generated(known.code, known.options, _state(result))
    return result


def _state(graph: fx.Graph) -> list[Any]:
    """All that code is generated from. Of a node, fx replaces arguments, and changes none in place."""
    state: list[Any] = [graph._codegen, *vars(graph._codegen).values()]
    for n in graph.nodes:
        state += (n, n.op, n.target, n.args, n.kwargs, n.name, n.type, mode_mark(n))
    return state


def _is_same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))
