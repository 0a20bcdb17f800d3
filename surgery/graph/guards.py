"""Python's control flow on sizes: values that follow from shapes alone, and the guards that pin them in a graph.

A graph holds one way through the model's Python. Which way that was is known where it depends on nothing but shapes
and on how inputs are nested; a guard in the graph then refuses inputs that would have gone another way.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError, UsageError
from surgery.graph.meta import Twins


def expect(value: Any, aspect: str, expected: Any, where: str) -> None:
    """A node of the graph: refuse inputs for which the model's Python would have gone another way.

    Args:
        value: what Python looked at.
        aspect: a key of `ASPECTS`: what it looked for.
        expected: what it found while tracing.
        where: the source line.

    Raises:
        UsageError: it would have found something else.
    """
    found = ASPECTS[aspect](value)
    if isinstance(found, torch.Tensor) or found != expected:
        raise UsageError(
            f"{where}: {aspect} is {_brief(found)} here and was {_brief(expected)} when the model was traced, so its "
            "Python would take another way: trace it with inputs like these"
        )


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    plain = value is None or isinstance(value, (bool, int, float, str, tuple, torch.dtype, torch.device))
    return repr(value) if plain else f"a {type(value).__name__}"


ASPECTS: dict[str, Callable[[Any], Any]] = {
    "the condition": bool,
    "the value": lambda value: value,
    "the length": len,
    "the set of keys": tuple,
}
"""What Python's control flow can look for in a value."""

fx.node.has_side_effect(expect)


class Values:
    """Values of a graph's nodes as far as they follow from the shapes of its inputs, each computed when asked for."""

    def __init__(self, root: nn.Module, inputs: dict[str, Any]) -> None:
        """
        Args:
            root: the module that the graph's names refer to.
            inputs: for each placeholder its value, with tensors of any device.
        """
        self.root = root
        self.twins = Twins(root)
        self.inputs = {name: self._meta(value) for name, value in inputs.items()}
        self.busy = False
        """Whether a layer's twin is running."""
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The value of ``node``, with a meta tensor for each tensor.

        Raises:
            TraceError: it depends on the data.
        """
        if node not in self._known:
            self.busy = True
            try:
                for wanted in _ancestors(node, self._known):
                    self._known[wanted] = self._compute(wanted)
            finally:
                self.busy = False
        return self._known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            value = False if "training_flag_of" in node.meta else operator.attrgetter(str(node.target))(self.root)
            return self._meta(value)
        if node.target is getattr and node.args[1] in _OF_GRADIENTS:
            raise TraceError(f"{node.name} depends on whether gradients are recorded")
        args: Any = fx.map_arg(node.args, self._known.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, self._known.__getitem__)
        leaf = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        try:
            return self.twins.run(node, leaf, args, kwargs)
        except NotImplementedError as error:
            raise TraceError(f"{node.name} depends on the data") from error
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
            what = str(error).strip().partition("\n")[0]
            raise TraceError(f"{node.name} does not follow from the shapes of the inputs ({what})") from error

    def _input(self, node: fx.Node) -> Any:
        if node.target in self.inputs:
            return self.inputs[str(node.target)]
        if node.args:
            return node.args[0]
        raise TraceError(f"no example input for {node.target!r}")

    def _meta(self, tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, self.twins.tensor, tree)


_OF_GRADIENTS = ("requires_grad", "is_leaf", "grad_fn", "grad", "retains_grad")
"""Attributes of a tensor that its twin does not have."""


def _ancestors(node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """What has to be computed for ``node``, in order."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [(node, False)]
    while stack:
        current, ready = stack.pop()
        if ready:
            order.append(current)
        elif current not in seen and current not in known:
            seen.add(current)
            stack.append((current, True))
            stack += [(n, False) for n in current.all_input_nodes]
    return order


_NOT_THE_USERS = ("surgery.graph.", "surgery.deploy.", "surgery.axes.", "torch.", "contextlib", "functools")
_CALLERS = {("surgery.graph.whole_graph", "trace_whole"), ("surgery.axes.untraced", "_record")}
"""What calls a model's Python: modules and functions."""


def model_line() -> str:
    """The innermost line of a model's own Python that is traced or run, as ``file.py:12``; empty where it has none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if (module, frame.f_code.co_name) in _CALLERS:
            return ""
        if not module.startswith(_NOT_THE_USERS):
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def user_line() -> str:
    """The innermost line that runs and is neither of this package's nor of torch's tracer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(_NOT_THE_USERS):
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"
