"""From a model to a traced module. The only file that knows fx's tracer.

A traced module is an `fx.GraphModule` that keeps the model's parameter names, module tree and mode flags, and that is
faithful in both modes: reading ``self.training`` becomes part of the graph, and a module whose Python *branches* on
its own flag gets one graph per mode (`TracedModule.train_graph`), over the same submodules.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError, UsageError
from surgery.graph.ops import has_module_rule

_INFO = "surgery"


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
    traced = _trace_copy(root, _concrete_arguments(model, args, kwargs))
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


def _concrete_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The parameters of ``forward`` that are not tensors in this call: constants of the graph, guarded by fx."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    given = dict(bound.arguments)
    bound.apply_defaults()
    variadic = {p.name for p in bound.signature.parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return {
        name: value
        for name, value in bound.arguments.items()
        if name not in variadic
        and (name not in given or not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value)))
    }


def _trace_copy(root: nn.Module, concrete: dict[str, Any]) -> TracedModule:
    """Trace ``root``, a private copy whose tensors and leaves become the result's own."""
    modal: set[str] = set()  # submodules that branch on their own flag: traced on their own, called as leaves
    while True:
        try:
            graph, branches = _trace_mode(root, concrete, modal, training=False)
            train_graph = _trace_mode(root, concrete, modal, training=True)[0] if branches else None
            break
        except _ModeBranchError as found:
            modal.add(found.path)
    for g in (graph, train_graph):
        _register_plain_tensors(root, g)
    tree = _module_tree(root, "", _Kept(_leaves(root, graph, train_graph), modal, {}))
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


def _trace_mode(root: nn.Module, concrete: dict[str, Any], modal: set[str], *, training: bool) -> tuple[fx.Graph, bool]:
    tracer = _Tracer(modal, training)
    try:
        with _symbolic_modes(root, tracer), _symbolic_factories(tracer):
            graph = tracer.trace(root, concrete)
    except _ModeBranchError:
        raise
    except Exception as error:  # fx runs the model's own Python, which may raise anything
        raise TraceError(f"{type(root).__name__} cannot be traced: {error}{tracer.where()}") from error
    for node in reversed(graph.nodes):
        stack = node.meta.pop("nn_module_stack", None) or {"": None}
        node.meta["path"] = next(reversed(stack))  # the module whose forward made the node
        if "training_flag_of" in node.meta and not node.users:
            graph.erase_node(node)
    return graph, tracer.branched


class _ModeBranchError(Exception):
    """Python control flow read the training flag of the submodule at ``path``."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


_FACTORIES = ("zeros", "ones", "full", "empty", "rand", "randn", "arange", "linspace")
"""Functions of torch that take sizes rather than tensors: fx does not see them by itself."""


class _Tracer(fx.Tracer):
    """Leaves are layers that have a rule and modules of torch.nn; buffers and mode flags are read in the graph."""

    def __init__(self, modal: set[str], training: bool) -> None:
        super().__init__(param_shapes_constant=True)
        self.modal = modal
        self.mode = training
        self.branched = False
        self.stack: list[str] = []
        self._buffers: dict[int, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.modal or has_module_rule(m):
            return True
        return type(m).forward.__module__.startswith("torch.nn.") and super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Buffers become nodes, as parameters do: what is computed from them follows when they change."""
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            name = self.buffers().get(id(attr_val))
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def buffers(self) -> dict[int, str]:
        if not self._buffers:
            self._buffers = {id(b): n for n, b in reversed(list(self.root.named_buffers()))}
        return self._buffers

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.stack.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        return result

    def training_flag(self, module: nn.Module) -> Any:
        path = "" if module is self.root else self.path_of_module(module)
        name = f"{path}.training" if path else "training"
        proxy = self.create_proxy("get_attr", name, (), {})
        proxy.node.meta["training_flag_of"] = path
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        path = obj.node.meta.get("training_flag_of")
        if path is None:
            return super().to_bool(obj)
        if path:
            raise _ModeBranchError(path)
        self.branched = True
        return self.mode

    def where(self) -> str:
        return f" (in {self.stack[-1]!r})" if self.stack else ""


@contextmanager
def _symbolic_factories(tracer: _Tracer) -> Iterator[None]:
    """While tracing, making a tensor of a size that the graph computes is a node of the graph."""

    def symbolic(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    original = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in original.items():
            setattr(torch, name, symbolic(function))
        yield
    finally:
        for name, function in original.items():
            setattr(torch, name, function)


@contextmanager
def _symbolic_modes(root: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """While tracing, reading ``training`` of a module that is traced through gives a node of the graph."""
    original: dict[nn.Module, type[nn.Module]] = {}
    flag = property(lambda module: tracer.training_flag(module))
    for name, module in root.named_modules():
        if not name or not tracer.is_leaf_module(module, name):
            original[module] = type(module)
    flags = {module: module.__dict__.pop("training") for module in original}
    patched: dict[type, type] = {}
    try:
        for module, cls in original.items():
            if cls not in patched:
                patched[cls] = type(cls.__name__, (cls,), {"training": flag, "__module__": cls.__module__})
            module.__class__ = patched[cls]
        yield
    finally:
        for module, cls in original.items():
            module.__class__ = cls
            module.__dict__["training"] = flags[module]


@dataclass(frozen=True)
class _Kept:
    """What to keep of a traced model's module tree."""

    leaves: set[int]
    """Ids of the modules that the graphs call."""
    modal: set[str]
    """Paths of the leaves that are traced on their own."""
    done: dict[int, nn.Module]
    """Results by the id of the original: what is shared stays shared."""


def _leaves(root: nn.Module, *graphs: fx.Graph | None) -> set[int]:
    nodes = (n for graph in graphs if graph is not None for n in graph.nodes if n.op == "call_module")
    return {id(root.get_submodule(str(n.target))) for n in nodes}


def _module_tree(module: nn.Module, path: str, kept: _Kept) -> nn.Module:
    """The private copy as containers and leaves.

    A container of the model's own class would carry a ``forward`` that the graph has replaced, so it becomes a plain
    `nn.Module`; those of `torch.nn` stay, for they can be indexed.
    """
    if id(module) in kept.done:
        return kept.done[id(module)]
    if id(module) in kept.leaves:
        tree = _trace_copy(module, {}) if path in kept.modal else module
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
