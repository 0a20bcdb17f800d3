"""What `trace` gives: modules that hold graphs, and how they came about.

A traced module is an `fx.GraphModule` that keeps the model's parameter names, module tree and mode flags, and that is
faithful in both modes: reading ``self.training`` becomes part of the graph, and a module whose Python *branches* on
its own flag gets one graph per mode (`TracedModule.train_graph`), over the same submodules. Where only parts of a model
can be traced, the model stays the module that it is, with traced modules in it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import UsageError
from surgery.graph.generated import copy_with_code, generated_code

_INFO, _NOTES = "surgery", "_surgery"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[float, ...] | None = None
    """Its entries, row-major, where the way through the model's Python may depend on them and they are few."""


@dataclass(frozen=True)
class KeptChannels:
    """What edits made of an axis of an output since `trace`."""

    output: str
    """Its name (`surgery.axes.network_outputs.output_name`)."""
    axis: int
    size: int
    """The length of the axis when it was traced."""
    positions: tuple[int, ...]
    """For each position now, the one that it was then."""
    modes: tuple[bool, ...]
    """For which modes (``training``) that is so."""


@dataclass(frozen=True)
class TraceInfo:
    """What is remembered of how a module was traced, and of what was done to it since."""

    source: str | None
    args: tuple[Any, ...]
    """Positional inputs, with a `TensorSpec` for each tensor."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Any, ...] = ()
    """The edits made since `trace`, in order (instances of `surgery.Step`)."""
    untraced: str = ""
    """Why the model could not be traced whole; empty where it was."""
    modes: tuple[bool, ...] = (False,)
    """Where it was not: for which modes (``training``) it runs on the inputs."""
    batched: bool = False
    """Whether it was compared with the model at a second batch size."""
    kept: tuple[KeptChannels, ...] = ()
    """The axes of outputs that edits changed."""
    seal: Mapping[tuple[str, str], str] | None = None
    """The structure of the module after the last step (`surgery.graph.structure`)."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TraceInfo:
        return self


class TracedModule(fx.GraphModule):
    """A graph over a module tree of its own; two graphs where the model branches on ``self.training``.

    ``graph`` runs in ``eval()``, and in ``train()`` too unless there is a ``train_graph``. Both see the same
    submodules, parameters and buffers, also those that neither uses.
    """

    train_graph: fx.Graph | None
    shell: type[nn.Module] | None = None
    """The class of which it is an instance too (`give_class`)."""

    def __init__(self, root: nn.Module, graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        self.__dict__.update(train_graph=None, _incomplete=True)
        super().__init__(root, graph, class_name="TracedModule")
        # GraphModule copies only what the graph names; the tree is kept whole, so that unused parameters, buffers'
        # persistence and the containers' mode flags survive.
        for part in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[part] = root.__dict__[part]
        self.training = root.training
        self.__dict__["train_graph"] = train_graph
        del self.__dict__["_incomplete"]
        self.recompile()

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """The graph, or the evaluation graph and the training graph."""
        return (self.graph,) if self.train_graph is None else (self.graph, self.train_graph)

    def recompile(self) -> Any:
        """Regenerate the Python code from the graphs. Call it after changing one."""
        if "_incomplete" in self.__dict__:  # `fx.GraphModule.__init__` calls it before there is all it needs
            return None
        with generated_code(self._graph):
            code = super().recompile()
        train_graph = self.__dict__.get("train_graph")
        if train_graph is not None:
            cls = type(self)
            eval_forward = cls.forward
            with generated_code(train_graph):
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
        train_graph = None if self.train_graph is None else copy_with_code(self.train_graph, memo)
        result = _make_traced(self.shell, root, copy_with_code(self.graph, memo), train_graph)
        memo[id(self)] = result
        result.meta = dict(self.meta)
        result.__dict__.update(copy.deepcopy(self._attributes(), memo))
        copy_hooks(self, result)
        return result

    def __reduce__(self) -> Any:
        tree = nn.Module()
        tree.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k.startswith("_") and k in nn.Module().__dict__}
        )
        tree.training = self.training
        graphs = copy.deepcopy((self.graph, self.train_graph))  # without a way back to this module
        return _unpickle, (self.shell, tree, *graphs, dict(self.meta), self._attributes())

    def __prepare_scriptable__(self) -> nn.Module:
        """For `torch.jit.script`, which cannot compile this class: the graph of the current mode alone."""
        graph = self.graph if self.train_graph is None or not self.training else self.train_graph
        for node in graph.nodes:
            if getattr(node.target, "__module__", "").startswith("surgery."):
                raise UsageError(
                    f"torch.jit.script cannot compile {node.name}, a part of the model's Python: "
                    "use torch.jit.trace or torch.export"
                )
        return fx.GraphModule(self, copy.deepcopy(graph))

    def _attributes(self) -> dict[str, Any]:
        """What is kept of the plain attributes of the module that was traced."""
        names = self.__dict__.get("_attribute_names", ())
        return {name: self.__dict__[name] for name in ("_attribute_names", *names) if name in self.__dict__}


def give_class(traced: TracedModule, module: nn.Module) -> TracedModule:
    """``traced``, as an instance of the class of ``module`` too, with its methods and attributes.

    Callers may use more of a model than its ``forward`` (``model.predict``, ``model.names``). Where its class cannot be
    inherited from like that, ``traced`` stays as it is.
    """
    cls = module.shell if isinstance(module, TracedModule) else type(module)
    try:
        result = _make_traced(cls, traced, traced.graph, traced.train_graph)
    except Exception:  # a metaclass, ``__init_subclass__`` or ``__setattr__`` of the model's
        copy_hooks(module, traced)
        return traced
    names = tuple(n for n in module.__dict__ if n not in traced.__dict__ and not hasattr(TracedModule, n))
    result.__dict__.update({name: module.__dict__[name] for name in names}, _attribute_names=names)
    copy_hooks(module, result)
    return result


class _NoInit(nn.Module):
    """Keeps `fx.GraphModule` from calling the ``__init__`` of the class behind it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def _make_traced(
    shell: type[nn.Module] | None, root: nn.Module, graph: fx.Graph, train_graph: fx.Graph | None
) -> TracedModule:
    if shell is None:
        return TracedModule(root, graph, train_graph)
    namespace = {"shell": shell, "__module__": shell.__module__}
    cls: type[TracedModule] = type(shell.__name__, (TracedModule, _NoInit, shell), namespace)
    return cls(root, graph, train_graph)


def _unpickle(
    shell: type[nn.Module] | None,
    tree: nn.Module,
    graph: fx.Graph,
    train_graph: fx.Graph | None,
    meta: dict[str, Any],
    attributes: dict[str, Any],
) -> TracedModule:
    module = _make_traced(shell, tree, graph, train_graph)
    module.meta = meta
    module.__dict__.update(attributes)
    return module


def traced_parts(module: nn.Module) -> Iterator[tuple[str, TracedModule]]:
    """The traced modules in ``module``, itself among them, with their paths."""
    return ((path, part) for path, part in module.named_modules() if isinstance(part, TracedModule))


def named_tensors(module: nn.Module, *, once: bool = False) -> dict[str, torch.Tensor]:
    """Parameters and buffers by qualified name, tied ones under each of theirs; with ``once``, under the first."""
    return {
        **dict(module.named_parameters(remove_duplicate=once)),
        **dict(module.named_buffers(remove_duplicate=once)),
    }


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    for name, value in source.__dict__.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_full_backward_hook")):
            target.__dict__[name] = copy.copy(value)


def info(module: nn.Module) -> TraceInfo:
    """How ``module`` was traced. Raises `UsageError` for a module that `trace` did not make."""
    found = _found(module)
    if found is None:
        raise UsageError(f"{type(module).__name__} is not a traced module: pass it through surgery.trace first")
    return found


def is_traced(module: nn.Module) -> bool:
    """Whether `trace` or a pass made ``module``, whole or with Python around the traced parts."""
    return _found(module) is not None


def with_info(module: nn.Module, **changes: Any) -> None:
    """Replace fields of a traced module's `TraceInfo`."""
    set_info(module, replace(info(module), **changes))


def set_info(module: nn.Module, known: TraceInfo) -> None:
    """Remember how ``module`` was traced."""
    notes: dict[str, Any] = module.meta if isinstance(module, TracedModule) else module.__dict__.setdefault(_NOTES, {})
    notes[_INFO] = known


def _found(module: nn.Module) -> TraceInfo | None:
    notes = module.meta if isinstance(module, TracedModule) else module.__dict__.get(_NOTES, {})
    found = notes.get(_INFO)
    return found if isinstance(found, TraceInfo) else None


def example_inputs(
    module: nn.Module, batch_size: int | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs of the shapes and dtypes that ``module`` was traced with, on its device.

    Args:
        batch_size: replaces the first dimension of every tensor that has the traced batch size there, save for those
            whose values were remembered.
        seed: of a generator of its own; the global RNG is not touched. Floating tensors are standard normal and, unless
            they stand in a dict, take the dtype of the module's parameters; integer tensors are 0 or 1. Remembered
            values are as they were.

    Returns:
        positional inputs and named inputs, as in ``module(*args, **kwargs)``.

    Example:
        >>> args, kwargs = surgery.example_inputs(traced, batch_size=8)
        >>> outputs = traced(*args, **kwargs)
    """
    known = info(module)
    return inputs_like((known.args, known.kwargs), module, batch_size, seed)


def inputs_like(
    specs: tuple[tuple[Any, ...], dict[str, Any]], module: nn.Module, batch_size: int | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs for ``module`` as ``specs`` has them: see `example_inputs`."""
    tensors = [s for s in pytree.tree_leaves(specs) if isinstance(s, TensorSpec) and s.shape]
    traced_batch = tensors[0].shape[0] if tensors else None
    generator = torch.Generator().manual_seed(seed)
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.empty(0))

    def make(path: Any, spec: Any) -> Any:
        if not isinstance(spec, TensorSpec):
            return spec
        dtype = spec.dtype
        if dtype.is_floating_point and not any(isinstance(key, pytree.MappingKey) for key in path[2:]):
            dtype = like.dtype  # what stands in a dict, as targets do, is data
        if spec.values is not None:
            return torch.tensor(spec.values, dtype=dtype, device=like.device).reshape(spec.shape)
        shape = spec.shape
        if batch_size is not None and shape and shape[0] == traced_batch:
            shape = (batch_size, *shape[1:])
        if not dtype.is_floating_point:
            return torch.randint(0, 2, shape, generator=generator).to(like.device, dtype)
        return torch.randn(shape, generator=generator).to(like.device, dtype)

    args, kwargs = pytree.tree_map_with_path(make, specs, is_leaf=lambda s: isinstance(s, TensorSpec))
    return args, kwargs
