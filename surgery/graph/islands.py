"""Models whose Python decides by what tensors hold: the parts that can be traced, in a parent that stays Python.

The parent keeps its class and its ``forward``. One real run in each mode says which parts Python calls and with what;
each of them that can be traced becomes a `TracedModule` under its old name, and those that cannot are looked into.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError, UsageError
from surgery.graph.arguments import Arguments, bound_arguments
from surgery.graph.guards import Values
from surgery.graph.rule_table import has_module_rule
from surgery.graph.traced import TracedModule
from surgery.graph.whole_graph import state_of, trace_whole


def trace_islands(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole: TraceError
) -> tuple[nn.Module, tuple[bool, ...]]:
    """Trace the largest parts of ``root``, a private copy, that can be traced.

    Args:
        args, kwargs: real inputs: the way through the Python between the parts depends on them.
        whole: why ``root`` cannot be traced as it is; raised where there is nothing to trace in it.

    Returns:
        ``root`` with traced modules in it, and the modes (``training``) in which it runs on these inputs.
    """
    calls, modes = _calls(root, args, kwargs, whole)
    _replace(root, "", calls)
    if not any(isinstance(m, TracedModule) or has_module_rule(m) for m in root.modules()):
        raise whole
    return root, modes


@dataclass
class _Calls:
    """What a module was called with, and which modules its own Python called."""

    arguments: list[Arguments] = field(default_factory=list)
    called: dict[str, None] = field(default_factory=dict)


def _calls(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole: TraceError
) -> tuple[dict[str, _Calls], tuple[bool, ...]]:
    """Run a copy of ``root`` in evaluation and, where the inputs allow it, in training."""
    calls: dict[str, _Calls] = {}
    modes: list[bool] = []
    twin = copy.deepcopy(root)
    for training in (False, True):
        twin.train(training)
        try:
            with _listening(twin, calls), quietly(), torch.random.fork_rng(devices=[]):
                twin(*clone_tensors(args), **clone_tensors(kwargs))
        except Exception as error:  # the model's own Python, which may raise anything
            if not training:
                raise TraceError(f"{whole}; nor does it run on the example inputs: {error}") from error
        else:
            modes.append(training)
    return calls, tuple(modes)


def _alike(a: Arguments, b: Arguments) -> bool:
    """Whether two calls differ in nothing that a graph could see."""
    (ours, this), (theirs, that) = (pytree.tree_flatten(arguments.values) for arguments in (a, b))
    return bool(this == that) and all(
        (x.shape, x.dtype) == (y.shape, y.dtype)
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
        else type(x) is type(y) and isinstance(x, (int, float, str, bool, type(None))) and x == y
        for x, y in zip(ours, theirs, strict=True)
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Run the model's Python as users do, with gradients, but without warning them once more."""
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def clone_tensors(tree: Any) -> Any:
    """The inputs for a run that may change them."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, tree)


@contextmanager
def _listening(root: nn.Module, calls: dict[str, _Calls]) -> Iterator[None]:
    active = [""]
    handles = []

    def enter(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            known = calls.setdefault(path, _Calls())
            meta = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to("meta"), (args, kwargs))
            given = bound_arguments(module, *meta)
            if not any(_alike(given, other) for other in known.arguments):
                known.arguments.append(given)
            calls.setdefault(active[-1], _Calls()).called[path] = None
            active.append(path)

        return hook

    def leave(*_: Any) -> None:
        active.pop()

    for path, module in root.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path, module), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace(root: nn.Module, path: str, calls: dict[str, _Calls]) -> None:
    """Trace what the Python of the module at ``path`` calls."""
    for child in calls.get(path, _Calls()).called:
        module = root.get_submodule(child)
        if isinstance(module, TracedModule) or has_module_rule(module) or not any(True for _ in module.parameters()):
            continue
        traced = _trace_for(module, calls[child].arguments)
        if traced is None:
            _replace(root, child, calls)
            continue
        for parent in list(root.modules()):
            for name, held in parent._modules.items():
                if held is module:
                    parent._modules[name] = traced


def _trace_for(module: nn.Module, calls: list[Arguments]) -> TracedModule | None:
    """The module as a graph that does for every one of the calls; None where there is none."""
    before = {m: (type(m), state_of(m)) for m in module.modules()}
    try:
        traced = trace_whole(module, calls[0], inside=True)
        for graph, given in itertools.product(traced.graphs, calls):
            _follow_shapes(traced, graph, given)
        return traced
    except (TraceError, UsageError):
        pass
    for m, (cls, attributes) in before.items():
        m.__class__ = cls
        m.__dict__.clear()
        m.__dict__.update(attributes)
    return None


def _follow_shapes(traced: TracedModule, graph: fx.Graph, given: Arguments) -> None:
    """Follow the shapes of a call through a graph.

    Raises:
        TraceError: a guard refuses the arguments, or a shape depends on the data.
    """
    values = Values(traced, given.values)
    for node in graph.nodes:
        if node.op != "output":
            values.of(node)


def refuse_shapes_of_data(traced: TracedModule, given: Arguments) -> None:
    """Raise `TraceError` if a shape in a graph depends on the data: the analysis could not follow it."""
    for graph in traced.graphs:
        try:
            _follow_shapes(traced, graph, given)
        except TraceError as error:
            if isinstance(error.__cause__, NotImplementedError):
                raise
