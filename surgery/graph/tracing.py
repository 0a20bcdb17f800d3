"""From a model to a traced module.

A traced module is an `fx.GraphModule` that keeps the model's parameter names, module tree and mode flags, and that is
faithful in both modes: reading ``self.training`` becomes part of the graph, and a module whose Python *branches* on
its own flag gets one graph per mode (`TracedModule.train_graph`), over the same submodules.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError, UsageError
from surgery.graph.guards import Values
from surgery.graph.tracer import ModeBranchError, Tracer, symbolic_factories, symbolic_modes

_INFO = "surgery"
_STARS = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
_VIEWS_OF_DICTS = ("items", "keys", "values")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor input."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TraceInfo:
    """What is remembered of how a module was traced, and of what was done to it since."""

    source: str | None
    args: tuple[Any, ...]
    """Positional inputs, with a `TensorSpec` for each tensor."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Any, ...] = ()
    """The edits made since `trace`, in order (`surgery.passes.recipe` gives them their types)."""


def trace(
    model: nn.Module, example_inputs: Any, *, kwargs: dict[str, Any] | None = None, source: str | None = None
) -> TracedModule:
    """Trace ``model`` to a graph that computes the same in ``train()`` and in ``eval()``.

    Args:
        model: any module. It is not modified, and the result shares no storage with it.
        example_inputs: a tensor, or a tuple of the positional inputs. Shapes and dtypes are remembered; nothing is
            computed on the values.
        kwargs: inputs passed by name.
        source: where the architecture comes from (``"torchvision:resnet50"``), so that `surgery.load` can rebuild it.

    Raises:
        TraceError: the model's Python cannot be turned into a graph; the message says where.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(kwargs or {})
    try:
        root = copy.deepcopy(model)
    except RuntimeError as error:
        raise TraceError(f"{type(model).__name__} cannot be copied: {error}") from error
    traced = _trace_copy(root, bound_arguments(model, args, kwargs))
    spec_args, spec_kwargs = pytree.tree_map(_spec, (args, kwargs))
    traced.meta[_INFO] = TraceInfo(source, spec_args, spec_kwargs)
    return traced


class TracedModule(fx.GraphModule):
    """A graph over a module tree of its own; two graphs where the model branches on ``self.training``.

    ``graph`` runs in ``eval()``, and in ``train()`` too unless there is a ``train_graph``. Both see the same
    submodules, parameters and buffers, also those that neither uses.
    """

    train_graph: fx.Graph | None

    def __init__(self, root: nn.Module, graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        self.__dict__["train_graph"] = None
        super().__init__(root, graph, class_name="TracedModule")
        # GraphModule copies only what the graph names; the tree is kept whole, so that unused parameters, buffers'
        # persistence and the containers' mode flags survive.
        for part in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[part] = root.__dict__[part]
        self.training = root.training
        self.__dict__["train_graph"] = train_graph
        self.recompile()

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """The graph, or the evaluation graph and the training graph."""
        return (self.graph,) if self.train_graph is None else (self.graph, self.train_graph)

    def recompile(self) -> Any:
        """Regenerate the Python code from the graphs. Call it after changing one."""
        code = super().recompile()
        train_graph = self.__dict__.get("train_graph")
        if train_graph is not None:
            cls = type(self)
            eval_forward = cls.forward
            train_forward = type(fx.GraphModule(self, train_graph)).forward
            train_graph.owning_module = self

            def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return (train_forward if self.training else eval_forward)(self, *args, **kwargs)

            cls.forward = forward
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        root = nn.Module()
        for part in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            root.__dict__[part] = copy.deepcopy(self.__dict__[part], memo)
        root.training = self.training
        train_graph = None if self.train_graph is None else copy.deepcopy(self.train_graph, memo)
        result = TracedModule(root, copy.deepcopy(self.graph, memo), train_graph)
        memo[id(self)] = result
        result.meta = dict(self.meta)
        _copy_hooks(self, result)
        return result

    def __reduce__(self) -> Any:
        tree = nn.Module()
        tree.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k.startswith("_") and k in nn.Module().__dict__}
        )
        tree.training = self.training
        graphs = copy.deepcopy((self.graph, self.train_graph))  # without a way back to this module
        return _unpickle, (tree, *graphs, dict(self.meta))


def info(module: nn.Module) -> TraceInfo:
    """How ``module`` was traced. Raises `UsageError` for a module that `trace` did not make."""
    found = getattr(module, "meta", {}).get(_INFO)
    if not isinstance(found, TraceInfo):
        raise UsageError(f"{type(module).__name__} is not a traced module: pass it through surgery.trace first")
    return found


def with_info(module: nn.Module, **changes: Any) -> None:
    """Replace fields of a traced module's `TraceInfo`."""
    meta: dict[str, Any] = module.meta  # type: ignore[assignment]
    meta[_INFO] = replace(info(module), **changes)


def example_inputs(
    module: nn.Module, batch_size: int | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs of the shapes and dtypes that ``module`` was traced with, on its device.

    Args:
        batch_size: replaces the first dimension of every tensor that has the traced batch size there.
        seed: of a generator of its own; the global RNG is not touched. Floating tensors are standard normal and take
            the dtype of the module's parameters, integer tensors are 0 or 1.

    Returns:
        positional inputs and named inputs, as in ``module(*args, **kwargs)``.
    """
    known = info(module)
    specs = [s for s in pytree.tree_leaves((known.args, known.kwargs)) if isinstance(s, TensorSpec) and s.shape]
    traced_batch = specs[0].shape[0] if specs else None
    generator = torch.Generator().manual_seed(seed)
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.empty(0))

    def make(spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        shape = spec.shape
        if batch_size is not None and shape and shape[0] == traced_batch:
            shape = (batch_size, *shape[1:])
        if not spec.dtype.is_floating_point:
            return torch.randint(0, 2, shape, generator=generator).to(like.device, spec.dtype)
        return torch.randn(shape, generator=generator).to(like.device, like.dtype)

    args, kwargs = pytree.tree_map(make, (known.args, known.kwargs), is_leaf=lambda s: isinstance(s, TensorSpec))
    return args, kwargs


def _spec(value: Any) -> Any:
    return TensorSpec(tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value


def _unpickle(tree: nn.Module, graph: fx.Graph, train_graph: fx.Graph | None, meta: dict[str, Any]) -> TracedModule:
    module = TracedModule(tree, graph, train_graph)
    module.meta = meta
    return module


@dataclass(frozen=True)
class Arguments:
    """The parameters of a ``forward`` in one call, by name; ``*args`` and ``**kwargs`` with their stars."""

    values: dict[str, Any]
    constants: dict[str, Any]
    """Those that hold no tensor: constants of the graph, guarded by fx."""


def bound_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The call ``model(*args, **kwargs)`` by the names of the parameters."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    given = dict(bound.arguments)
    bound.apply_defaults()
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    stars = {
        p.name: next((s for k, s in kinds.items() if k is p.kind), "") for p in bound.signature.parameters.values()
    }
    constants = {
        name: value
        for name, value in bound.arguments.items()
        if not stars[name]
        and (name not in given or not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value)))
    }
    return Arguments({stars[name] + name: value for name, value in bound.arguments.items()}, constants)


def _trace_copy(root: nn.Module, given: Arguments) -> TracedModule:
    """Trace ``root``, a private copy whose tensors and leaves become the result's own."""
    modal: set[str] = set()  # submodules that branch on their own flag: traced on their own, called as leaves
    while True:
        try:
            tracer, graph = _trace_mode(root, given, modal, training=False)
            train_graph = _trace_mode(root, given, modal, training=True)[1] if tracer.branched else None
            break
        except ModeBranchError as found:
            modal.add(found.path)
    for g in (graph, train_graph):
        _register_plain_tensors(root, g)
    calls = _leaves(root, graph, train_graph)
    tree = _module_tree(root, "", _Kept(calls, {id(root.get_submodule(p)): p for p in modal}, tracer.values, {}))
    for g in (graph, train_graph):
        if g is not None:
            g.owning_module = None
    traced = TracedModule(tree, graph, train_graph)
    _copy_hooks(root, traced)
    return traced


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


def _copy_hooks(source: nn.Module, target: nn.Module) -> None:
    for name, value in source.__dict__.items():
        if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs"):
            target.__dict__[name] = copy.copy(value)


def _trace_mode(root: nn.Module, given: Arguments, modal: set[str], *, training: bool) -> tuple[Tracer, fx.Graph]:
    tracer = Tracer(modal, training, Values(root, given.values))
    try:
        with symbolic_modes(root, tracer), symbolic_factories(tracer):
            graph = tracer.trace(root, given.constants)
    except ModeBranchError:
        raise
    except Exception as error:  # fx runs the model's own Python, which may raise anything
        raise TraceError(f"{type(root).__name__} cannot be traced: {error}{tracer.where()}") from error
    for node in reversed(graph.nodes):
        stack = node.meta.pop("nn_module_stack", None) or {"": None}
        node.meta["path"] = next(reversed(stack))  # the module whose forward made the node
        if not node.users and ("training_flag_of" in node.meta or node.target in _VIEWS_OF_DICTS):
            graph.erase_node(node)
    return tracer, graph


@dataclass(frozen=True)
class _Kept:
    """What to keep of a traced model's module tree."""

    leaves: dict[int, fx.Node]
    """Ids of the modules that the graphs call, with a node that does."""
    modal: dict[int, str]
    """Paths of the leaves that are traced on their own."""
    values: Values
    """What is known of the graph's values."""
    done: dict[int, nn.Module]
    """Results by the id of the original: what is shared stays shared."""

    def arguments(self, module: nn.Module) -> Arguments:
        """The arguments that a graph calls a leaf with, on the meta device."""
        node = self.leaves[id(module)]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.of)
        return bound_arguments(module, args, kwargs)


def _leaves(root: nn.Module, *graphs: fx.Graph | None) -> dict[int, fx.Node]:
    nodes = (n for graph in reversed(graphs) if graph is not None for n in graph.nodes if n.op == "call_module")
    return {id(root.get_submodule(str(n.target))): n for n in nodes}


def _module_tree(module: nn.Module, path: str, kept: _Kept) -> nn.Module:
    """The private copy as containers and leaves.

    A container of the model's own class would carry a ``forward`` that the graph has replaced, so it becomes a plain
    `nn.Module`; those of `torch.nn` stay, for they can be indexed.
    """
    if id(module) in kept.done:
        return kept.done[id(module)]
    if id(module) in kept.leaves:
        tree = _trace_copy(module, kept.arguments(module)) if id(module) in kept.modal else module
    else:
        own = type(module).__module__.startswith("torch.nn.")
        tree = module if own else nn.Module()
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
