"""Runs the op rules over a traced module and collects what they say.

The graph is interpreted on meta tensors, so that shapes are known and nothing is computed, and beside each tensor its
`Field`s are carried along. A rule ties channel ids together, freezes them, or marks the role of a parameter's axis;
this module only keeps the books. `surgery.graph.dims` turns them into dimension groups.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError, UsageError
from surgery.graph.grids import Grid
from surgery.graph.labels import Field, Fields, Ids, Labelled, Pairing, mutable
from surgery.graph.ops import Norm, Op, has_module_rule, rule_for, unknown
from surgery.graph.rewrites import Site
from surgery.graph.traced import TracedModule
from surgery.graph.twins import Twins

ParamKey = tuple[str, int]
NodeKey = tuple[str, str]
"""Scope (path of the traced module and which of its graphs) and node name."""


@dataclass
class ParamAxis:
    """An axis of a parameter or buffer: its positions' ids and what the ops that use it do with it."""

    name: str
    axis: int
    ids: Ids
    roles: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Called:
    """A call of a layer by Python that is not traced."""

    path: str
    node: fx.Node
    """Stands for the call, in no graph that is run."""
    rewrite: Callable[[Site], None]
    args: tuple[Any, ...]
    out: Any


@dataclass
class Books:
    """Everything the rules said."""

    count: int = 0
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    frozen: list[tuple[Ids, str]] = field(default_factory=list)
    mixed: list[tuple[Ids, str]] = field(default_factory=list)
    """Axes that a normalisation computes statistics over: copies must come in equal numbers."""
    norms: list[Norm] = field(default_factory=list)
    """The normalisations that `mixed` tells of."""
    single: list[tuple[Ids, str]] = field(default_factory=list)
    """Axes that are contracted with one another: copies would count twice."""
    sums: list[tuple[NodeKey, Ids]] = field(default_factory=list)
    """Where that is."""
    contracted: list[Ids] = field(default_factory=list)
    """Axes that two activations are contracted over: they are read, though no layer contracts over them."""
    grids: list[Grid] = field(default_factory=list)
    """Axes that factor one, of which only one may change (`surgery.graph.grids`)."""
    cuts: list[Ids] = field(default_factory=list)
    """Parts of axes that an op takes out."""
    rows: list[tuple[Ids, Ids, Ids, str]] = field(default_factory=list)
    """Rows that must stay rows: the last of each, the first of the one behind it, and its own first."""
    values: set[ParamKey] = field(default_factory=set)
    """Parameter axes that are used other than in a role."""
    axes: dict[ParamKey, ParamAxis] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    """Names of the tensors that are no parameters."""
    edges: list[tuple[Any, Any, str]] = field(default_factory=list)
    nodes: dict[NodeKey, Any] = field(default_factory=dict)
    """For each node its output, with a `Labelled` for each tensor."""
    graphs: dict[str, tuple[str, fx.Graph]] = field(default_factory=dict)
    """For each scope the path of its module and the graph."""
    calls: list[Called] = field(default_factory=list)
    """Layers that Python outside the graphs calls, as far as their attributes follow an edit."""


def propagate(module: TracedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Books:
    """Interpret every graph of ``module`` on inputs of the given specifications (tensors of any device)."""
    books = Books()
    run = Run(module, books)
    inputs = pytree.tree_map(run.placeholder, (args, kwargs))
    for training, graph in enumerate(module.graphs):
        run.graph(module, "", "train" if training else "", graph, inputs[0], inputs[1], top=True)
    return books


class Ledger:
    """Where rules are heard: what they say goes into the books."""

    whole = places = False
    pairing: Pairing | None = None
    """How reshapes label their results: see `surgery.graph.labels.reshaped`."""

    def __init__(self, books: Books) -> None:
        self.books = books

    def tensor(self, value: torch.Tensor | None, dims: Iterable[int] | None = None) -> Labelled | None:
        """A parameter or buffer, with as many of its axes labelled as this ledger knows."""
        return None if value is None else Labelled(value)

    def fresh(self, size: int) -> Ids:
        ids = np.arange(self.books.count, self.books.count + size, dtype=np.int64)
        self.books.count += size
        return ids

    def tie(self, a: Field, b: Field, why: str) -> None:
        self.tie_ids(a.ids, b.ids)
        self.edge(a.key, b.key, why)

    def tie_ids(self, a: Ids, b: Ids) -> None:
        x, y = np.broadcast_arrays(a, b)
        self.books.ties.append((x.ravel(), y.ravel()))

    def freeze(self, ids: Ids, reason: str) -> None:
        self.books.frozen.append((ids.ravel(), reason))

    def edge(self, a: Any, b: Any, why: str) -> None:
        if a is not None and b is not None and a != b:
            self.books.edges.append((a, b, why))


class Run(Ledger):
    """One interpretation: meta twins of the module's tensors and leaves, and the books."""

    def __init__(self, root: nn.Module, books: Books) -> None:
        super().__init__(books)
        self.names: dict[int, str] = {}
        books.buffers = frozenset(name for name, _ in root.named_buffers(remove_duplicate=False))
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self.names.setdefault(id(tensor), name)
        self.twins = Twins()
        self.views: dict[int, list[tuple[fx.Node, Labelled]]] = {}
        """Values by the storage that they share."""

    # ---- interpretation

    def graph(
        self,
        module: nn.Module,
        path: str,
        variant: str,
        graph: fx.Graph,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        top: bool = False,
    ) -> Any:
        """Run one graph; the result is its output with `Labelled` leaves."""
        scope = f"{path}:{variant}"
        self.books.graphs[scope] = (path, graph)
        env: dict[fx.Node, Any] = {}
        inputs = iter(args)
        output: Any = None
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = self._bind(node, inputs, kwargs)
                kwargs = {k: v for k, v in kwargs.items() if k != node.target}
            elif node.op == "output":
                output = fx.map_arg(node.args[0], env.__getitem__)
                if top:
                    for leaf in labelled_leaves(output):
                        for f in leaf.fields:
                            self.freeze(f.ids, "network output")
                continue
            else:
                env[node] = self._step(module, path, scope, node, env)
            for value in labelled_leaves(env[node]):
                self.views.setdefault(_storage(value), []).append((node, value))
            key = (scope, node.name)
            if key in self.books.nodes:  # a traced submodule that is called twice
                self._called_again(module, scope, node, self.books.nodes[key], env)
            else:
                self.books.nodes[key] = env[node]
        return output

    def _bind(self, node: fx.Node, inputs: Any, kwargs: dict[str, Any]) -> Any:
        missing = object()
        name = str(node.target)
        if name.startswith("*"):
            return kwargs if name.startswith("**") else tuple(inputs)
        value = next(inputs, missing)
        if value is missing:
            value = kwargs.get(name, node.args[0] if node.args else missing)
        if value is missing:
            raise TraceError(f"no example input for {name!r}")
        return value

    def _step(self, module: nn.Module, path: str, scope: str, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args, kwargs = mutable(fx.map_arg((node.args, node.kwargs), env.__getitem__))
        if node.op == "get_attr":
            return self._attribute(module, path, str(node.target))
        leaf: nn.Module | None = None
        target: Any = node.target
        if node.op == "call_module":
            leaf = module.get_submodule(target)
            target = f"{path}.{target}" if path else target
            if isinstance(leaf, TracedModule):
                return self.part(leaf, target, node.name, args, kwargs)
        elif target is operator.getitem and not isinstance(args[0], Labelled):
            return args[0][args[1]]
        elif isinstance(target, type) and issubclass(target, (tuple, list, dict)):
            return target(*args, **kwargs)
        raw_args, raw_kwargs = pytree.tree_map(_value, (args, kwargs))
        tensors = list(labelled_leaves((args, kwargs)))
        versions = [a.value._version for a in tensors]
        try:
            raw = self.twins.run(node, leaf, raw_args, raw_kwargs)
        except NotImplementedError as error:
            raise TraceError(f"{node.name}: the shape of its result depends on the data ({target})") from error
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            given = " and ".join(str(t.shape) for t in tensors)
            what = str(error).strip().partition("\n")[0]
            raise UsageError(f"the example inputs do not fit: {node.name} cannot take {given} ({what})") from error
        out = pytree.tree_map(lambda v: Labelled(v) if isinstance(v, torch.Tensor) else v, raw)
        if not any(True for _ in labelled_leaves(out)):
            return out
        op = Op(self, node, leaf, target if leaf is not None else "", (scope, node.name), out)
        result = self.related(op, rule_for(node, leaf).relate, args, kwargs, out)
        for a, version in zip(tensors, versions, strict=True):
            if a.value._version != version:
                self._changed_in_place(node, a)
        return result

    def part(self, part: TracedModule, path: str, name: str, args: Any, kwargs: Any) -> Any:
        """Run a traced module that something else calls; what its graphs give is tied."""
        results = [
            self.graph(part, path, "train" if training else "", graph, args, kwargs)
            for training, graph in enumerate(part.graphs)
        ]
        for other in results[1:]:
            self._tie_calls(results[0], other, name)
        if part._forward_hooks or part._forward_pre_hooks:
            for value in labelled_leaves((args, kwargs, results[0])):
                for f in value.fields:
                    self.freeze(f.ids, f"{path} has hooks")
        return results[0]

    def related(self, op: Op, relate: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """``out`` with the fields that a rule gives it."""
        fields = self._relate(op, relate, args, kwargs)
        moves = isinstance(out, Labelled) and rule_for(op.node, op.module).movement
        turned = self._whole_axes(fields) if moves else ()
        for a in labelled_leaves((args, kwargs)):
            for f in a.fields:
                kept = f.key is None or any(g.key == f.key for g in turned)
                if not kept and f.key[0] == "param" and (f.key[1], f.key[2]) not in op.claimed:
                    self.books.values.add((f.key[1], f.key[2]))
        return self.with_fields(op, out, fields, turned)

    def _whole_axes(self, fields: Fields) -> Fields:
        """Fields that are an axis of a parameter as it is: a weight that was transposed is a weight still."""
        known = self.books.axes
        own = (f for f in fields if len(f.dims) == 1 and f.key is not None and f.key[0] == "param")
        return tuple(f for f in own if np.array_equal(f.ids, known[f.key[1], f.key[2]].ids))

    def _relate(self, op: Op, relate: Any, args: Any, kwargs: Any) -> Any:
        if op.module is not None and (op.module._forward_hooks or op.module._forward_pre_hooks):
            return unknown(op, *args, why="has hooks", **kwargs)
        try:
            return relate(op, *args, **kwargs)
        except TypeError:
            try:
                inspect.signature(relate).bind(op, *args, **kwargs)
            except TypeError:
                return unknown(op, *args, why="has no rule for these arguments", **kwargs)
            raise

    def _changed_in_place(self, node: fx.Node, value: Labelled) -> None:
        """Freeze what is changed through a view and read elsewhere: an edit may turn the view into a copy."""
        for other, seen in self.views[_storage(value)]:
            if not _same_fields(seen, value) and any(user > node for user in other.users):
                for f in (*value.fields, *seen.fields):
                    self.freeze(f.ids, f"{node.name} changes it in place through a view")

    def with_fields(self, op: Op, out: Any, fields: Any, turned: Fields = ()) -> Any:
        if not isinstance(out, (Labelled, dict, list, tuple)):
            return out
        if isinstance(out, Labelled):
            own = tuple(f if f in turned else Field(f.dims, f.ids, op.key) for f in fields)
            for f in fields:
                self.edge(f.key, op.key, op.name)
            for f in own:
                expected = tuple(out.shape[d] for d in f.dims)
                if f.ids.shape != expected:
                    raise AssertionError(f"rule for {op.name} labels {expected} positions with {f.ids.shape} ids")
            return Labelled(out.value, own)
        if isinstance(out, dict):
            return {k: self.with_fields(op, v, fields[k]) for k, v in out.items()}
        parts = [self.with_fields(op, o, f) for o, f in zip(out, fields, strict=True)]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)

    def _called_again(self, module: nn.Module, scope: str, node: fx.Node, first: Any, env: dict[fx.Node, Any]) -> None:
        """What has to follow an edit can do so in one way only, for all calls."""
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not any(True for _ in labelled_leaves(first)):
            if first != env[node]:
                for n in node.all_input_nodes:
                    for a, b in zip(
                        labelled_leaves(self.books.nodes[scope, n.name]), labelled_leaves(env[n]), strict=False
                    ):
                        for f in b.fields:
                            if len(a.shape) != len(b.shape) or any(a.shape[d] != b.shape[d] for d in f.dims):
                                self.freeze(f.ids, f"{node.name} is called with different shapes")
            return
        rule = rule_for(node, leaf)
        if rule.rewrite is not None or rule.movement or isinstance(leaf, TracedModule):
            self._tie_calls(first, env[node], node.name)

    def _tie_calls(self, first: Any, second: Any, why: str) -> None:
        for a, b in zip(labelled_leaves(first), labelled_leaves(second), strict=False):
            for f in a.fields:
                other = next((g for g in b.fields if g.dims == f.dims and g.ids.shape == f.ids.shape), None)
                if other is None:
                    self.freeze(f.ids, f"{why} is called with different shapes")
                else:
                    self.tie(f, other, why)
            for g in b.fields:
                if not any(g.dims == f.dims and g.ids.shape == f.ids.shape for f in a.fields):
                    self.freeze(g.ids, f"{why} is called with different shapes")

    # ---- tensors of the module

    def placeholder(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        fields = []
        for dim in range(1, value.ndim):
            ids = self.fresh(value.shape[dim])
            self.freeze(ids, "network input")
            fields.append(Field((dim,), ids, ("input", "", dim)))
        return Labelled(value.to("meta"), tuple(fields))

    def _attribute(self, module: nn.Module, path: str, target: str) -> Any:
        value = operator.attrgetter(target)(module)
        if not isinstance(value, torch.Tensor):
            return value
        owner = module.get_submodule(target.rpartition(".")[0])
        whole = has_module_rule(owner)  # the layer may be called too, and its axes of size 1 are channels
        return self.tensor(value, [d for d, size in enumerate(value.shape) if size > 1 or whole])

    def tensor(self, value: torch.Tensor | None, dims: Iterable[int] | None = None) -> Labelled | None:
        """A parameter or buffer with its axes (all, or ``dims``) labelled; the same ids wherever it is used."""
        if value is None:
            return None
        name = self.names.get(id(value))
        if name is None:
            return Labelled(self.twins.tensor(value), (), value)
        fields = []
        for dim in range(value.ndim) if dims is None else dims:
            axis = self.books.axes.get((name, dim))
            if axis is None:
                axis = self.books.axes[name, dim] = ParamAxis(name, dim, self.fresh(value.shape[dim]))
            fields.append(Field((dim,), axis.ids, ("param", name, dim)))
        return Labelled(self.twins.tensor(value), tuple(fields), value)


def _storage(value: Labelled) -> int:
    return int(value.value.untyped_storage()._cdata)


def _same_fields(a: Labelled, b: Labelled) -> bool:
    return a.shape == b.shape and all(
        f.dims == g.dims and np.array_equal(f.ids, g.ids) for f, g in zip(a.fields, b.fields, strict=False)
    )


def _value(v: Any) -> Any:
    return v.value if isinstance(v, Labelled) else v


def labelled_leaves(tree: Any) -> Iterable[Labelled]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Labelled))


class Silent(Ledger):
    """Stands in for a run where only a rule's output is wanted: what the rule says besides is not heard."""

    whole = True

    def __init__(self, pairing: Pairing, *, places: bool = False) -> None:
        super().__init__(Books())
        self.pairing, self.places = pairing, places

    def fresh(self, size: int) -> Ids:
        return np.full(size, -1, dtype=np.int64)

    def tie_ids(self, a: Ids, b: Ids) -> None: ...
