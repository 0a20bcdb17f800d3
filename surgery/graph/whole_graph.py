"""From a module whose Python can be followed to a traced module."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from surgery.errors import TraceError, UsageError
from surgery.graph.arguments import Arguments, bound_arguments
from surgery.graph.containers import HOOKS, turn_into_container
from surgery.graph.finite import is_finding
from surgery.graph.gradients import symbolic_gradients, unmark_plain
from surgery.graph.guards import Values
from surgery.graph.hooks import Owner, own_hooks, owner_of
from surgery.graph.relaxed import relax_guards
from surgery.graph.symbolic import (
    Places,
    find_ruled_functions,
    symbolic_conversions,
    symbolic_factories,
    symbolic_functions,
    symbolic_modes,
)
from surgery.graph.traced import TracedModule, give_class
from surgery.graph.tracer import ModeBranchError, Tracer

_VIEWS_OF_DICTS = ("items", "keys", "values")


class Surroundings(NamedTuple):
    """What is known of a model before it is traced."""

    functions: Places
    """Where Python functions that have a rule are known by name."""
    owner: Owner


def find_surroundings(root: nn.Module) -> Surroundings:
    """See `Surroundings`."""
    return Surroundings(find_ruled_functions(root), owner_of(root))


def trace_whole(
    root: nn.Module,
    given: Arguments,
    *,
    inside: bool = False,
    around: Surroundings | None = None,
    other: Arguments | None = None,
) -> TracedModule:
    """Trace ``root``, a private copy whose tensors and leaves become the result's own.

    Args:
        given: example arguments; of tensors only shapes and dtypes matter.
        inside: Python that is not traced calls ``root`` and may call its methods and parts too, so they stay.
        around: `find_surroundings` of ``root`` or of what it is a part of.
        other: arguments at another batch size, which guards should not refuse for nothing (`relax_guards`).
    """
    around = find_surroundings(root) if around is None else around
    _refuse_taken_names(root)
    modal: set[str] = set()  # submodules that branch on their own flag: traced on their own, called as leaves
    while True:
        try:
            tracer, graph = _trace_mode(root, given, modal, around, training=False)
            train_graph = _train_graph(root, given, modal, around) if tracer.branched else None
            break
        except ModeBranchError as found:
            modal |= _alike(root, found.path)
    if other is not None:
        for training, g in enumerate((graph, train_graph)):
            if g is not None:
                retrace = partial(_retrace, root, modal, around, bool(training))
                relax_guards(root, g, retrace, other)
    for g in (graph, train_graph):
        _register_plain_tensors(root, g)
    calls = _leaves(root, graph, train_graph)
    parts = {id(part): part for part in map(root.get_submodule, modal)}
    arguments = {id: _arguments(part, calls[id], tracer.values) for id, part in parts.items() if id in calls}
    others: dict[int, Arguments] = {}
    if other is not None:
        with suppress(TraceError, UsageError):
            values = Values(root, other.values)
            others = {id: _arguments(part, calls[id], values) for id, part in parts.items() if id in calls}
    tree = _module_tree(root, "", _Kept(calls, arguments, others, around, inside, {}))
    for g in (graph, train_graph):
        if g is not None:
            g.owning_module = None
    traced = TracedModule(tree, graph, train_graph)
    return give_class(traced, root)


def _alike(root: nn.Module, path: str) -> set[str]:
    """The path of a module that branches on its own flag, and those of the others of its class, which will too."""
    cls = type(root.get_submodule(path))
    return {path, *(name for name, module in root.named_modules() if name and type(module) is cls)}


def _train_graph(root: nn.Module, given: Arguments, modal: set[str], around: Surroundings) -> fx.Graph:
    """The graph of training. A norm over the batch needs two samples, where an example for evaluation has one."""
    try:
        return _trace_mode(root, given, modal, around, training=True)[1]
    except TraceError:
        if given.batch != 1:
            raise
        return _trace_mode(root, given.with_batch(2), modal, around, training=True)[1]


def _retrace(root: nn.Module, modal: set[str], around: Surroundings, training: bool, given: Arguments) -> fx.Graph:
    return _trace_mode(root, given, modal, around, training=training)[1]


def _arguments(module: nn.Module, node: fx.Node, values: Values) -> Arguments:
    """The arguments that a node calls a module with, on the meta device."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.of)
    return bound_arguments(module, args, kwargs)


def _refuse_taken_names(root: nn.Module) -> None:
    """A graph that reads ``self.code`` would get the source of the traced module, and not a buffer of that name."""
    for name in (*root._modules, *root._parameters, *root._buffers):
        if hasattr(TracedModule, name) or name in ("meta", "train_graph"):
            raise TraceError(f"{type(root).__name__} has a part named {name!r}, as a traced module has: rename it")


def _register_plain_tensors(root: nn.Module, graph: fx.Graph | None) -> None:
    """Tensors that are mere attributes become buffers outside the state dict: they move and change with the rest."""
    for node in graph.nodes if graph is not None else ():
        if node.op != "get_attr":
            continue
        path, _, name = str(node.target).rpartition(".")
        owner = root.get_submodule(path)
        value = owner.__dict__.get(name)
        if isinstance(value, torch.Tensor):
            del owner.__dict__[name]
            owner.register_buffer(name, value, persistent=False)


def _trace_mode(
    root: nn.Module, given: Arguments, modal: set[str], around: Surroundings, *, training: bool
) -> tuple[Tracer, fx.Graph]:
    traced = _trace_once(root, given, modal, around, training=training)
    converting = traced[0].converting.values()
    if converting:  # the graph holds numbers that Python made of sizes by ``int``: once more, with nodes for them
        with suppress(TraceError):
            return _trace_once(root, given, modal, around, training=training, converting=converting)
    return traced


def _trace_once(
    root: nn.Module,
    given: Arguments,
    modal: set[str],
    around: Surroundings,
    *,
    training: bool,
    converting: Collection[dict[str, Any]] = (),
) -> tuple[Tracer, fx.Graph]:
    tracer = Tracer(modal, training, root, given, around.owner)
    try:
        with (
            _state_kept(root),
            symbolic_modes(root, tracer),
            symbolic_factories(tracer),
            symbolic_conversions(converting, tracer),
            symbolic_functions(around.functions, tracer),
            symbolic_gradients(tracer),
        ):
            graph = tracer.trace(root)
    except ModeBranchError:
        raise
    except Exception as error:  # fx runs the model's own Python, which may raise anything
        raise TraceError(f"{type(root).__name__} cannot be traced: {error}{tracer.where()}") from error
    for node in reversed(graph.nodes):
        stack = node.meta.pop("nn_module_stack", None) or {"": None}
        node.meta["path"] = next(reversed(stack))  # the module whose forward made the node
        idle = "training_flag_of" in node.meta or node.target in _VIEWS_OF_DICTS or is_finding(node)
        if idle and not node.users:
            graph.erase_node(node)
    unmark_plain(graph)
    return tracer, graph


@contextmanager
def _state_kept(root: nn.Module) -> Iterator[None]:
    """What the model's Python stores in its modules while it is traced is forgotten.

    Raises:
        TraceError: it stores a result in a buffer, which the graph would not do.
    """
    before = {m: state_of(m) for m in root.modules()}
    try:
        yield
        for path, m in root.named_modules():
            for name, value in m._buffers.items():
                if isinstance(value, fx.Proxy):
                    raise TraceError(f"it assigns {f'{path}.{name}' if path else name!r}, a buffer")
    finally:
        for m, state in before.items():
            constants = {k: v for k, v in m.__dict__.items() if k not in state and isinstance(v, torch.Tensor)}  # fx's
            m.__dict__.clear()
            m.__dict__.update(state, **constants)


def state_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, to set them again: containers among them are copied."""
    return {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in module.__dict__.items()}


@dataclass(frozen=True)
class _Kept:
    """What to keep of a traced model's module tree."""

    leaves: dict[int, fx.Node]
    """Ids of the modules that the graphs call, with a node that does."""
    modal: dict[int, Arguments]
    """What those that are traced on their own are called with."""
    others: dict[int, Arguments]
    """The same at another batch size."""
    """Where the model's code is."""
    around: Surroundings
    inside: bool
    """Whether containers can still be called."""
    done: dict[int, nn.Module]
    """Results by the id of the original: what is shared stays shared."""


def _leaves(root: nn.Module, *graphs: fx.Graph | None) -> dict[int, fx.Node]:
    nodes = (n for graph in reversed(graphs) if graph is not None for n in graph.nodes if n.op == "call_module")
    return {id(root.get_submodule(str(n.target))): n for n in nodes}


def _module_tree(module: nn.Module, path: str, kept: _Kept) -> nn.Module:
    """The private copy as containers and leaves."""
    if id(module) in kept.done:
        return kept.done[id(module)]
    if id(module) in kept.leaves:
        for key, _ in own_hooks(module, kept.around.owner):  # which are in the graph
            del module._forward_hooks[key]
        tree = module
        if id(module) in kept.modal:
            given, other = kept.modal[id(module)], kept.others.get(id(module))
            tree = trace_whole(module, given, inside=kept.inside, around=kept.around, other=other)
    elif path:
        tree = module
        own = type(module).forward.__module__.startswith("torch.nn.")
        turn_into_container(tree, keep_forward=kept.inside or own)
        for name in () if kept.inside else HOOKS:  # which are in the graph
            tree.__dict__[name] = type(tree.__dict__[name])()
    else:
        tree = nn.Module()
        for part in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            tree.__dict__[part] = module.__dict__[part]
        tree.training = module.training
    kept.done[id(module)] = tree
    if id(module) not in kept.leaves:
        tree.__dict__["_modules"] = {
            name: None if child is None else _module_tree(child, f"{path}.{name}" if path else name, kept)
            for name, child in module.__dict__["_modules"].items()
        }
    return tree
