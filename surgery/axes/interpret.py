"""Run the op rules over a traced module and collect what they say.

The graph runs on meta tensors, so shapes are known and nothing is computed. Each tensor carries its `Field`s. A rule
ties channel ids together, freezes them, or marks the role of a parameter's axis. This module only keeps these findings;
`surgery.axes.analysis` makes units and dimension groups of them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.axes.labels import Field, Fields, Labelled
from surgery.axes.ledger import Findings, Ledger, ParamAxis, Uses, labelled_leaves
from surgery.axes.network_outputs import NetworkOutput, output_name
from surgery.axes.ops import Op
from surgery.errors import TraceError, UsageError
from surgery.graph.meta import Twins, storage_of
from surgery.graph.outputs import Rebuild, leaves_in
from surgery.graph.rule_table import Rule, has_module_rule, rule_for, unknown
from surgery.graph.traced import TracedModule


def propagate(module: TracedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Findings:
    """Interpret every graph of ``module`` on inputs of the given specifications (tensors of any device)."""
    findings = Findings()
    run = Interpreter(module, findings)
    inputs = pytree.tree_map(run.placeholder, (args, kwargs))
    for training, graph in enumerate(module.graphs):
        modes = (bool(training),) if len(module.graphs) > 1 else (False, True)
        output = run.graph(module, "", "train" if training else "", graph, inputs[0], inputs[1])
        for path, leaf in leaves_in(output, Labelled):
            findings.outputs.append(NetworkOutput(output_name(path), leaf, modes))
    return findings


class Interpreter(Ledger):
    """One interpretation: meta twins of the module's tensors and leaves, and the findings."""

    def __init__(self, root: nn.Module, findings: Findings) -> None:
        super().__init__(findings)
        self.names: dict[int, str] = {}
        findings.buffers = frozenset(name for name, _ in root.named_buffers(remove_duplicate=False))
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self.names.setdefault(id(tensor), name)
        self.twins = Twins(root)
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
    ) -> Any:
        """Interpret one graph; the result is its output with `Labelled` leaves."""
        scope = f"{path}:{variant}"
        self.findings.graphs[scope] = (path, graph)
        env: dict[fx.Node, Any] = {}
        inputs = iter(args)
        output: Any = None
        for node in graph.nodes:
            callee = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            rule = rule_for(node, callee)
            if node.op == "placeholder":
                env[node] = self._bind(node, inputs, kwargs)
                kwargs = {k: v for k, v in kwargs.items() if k != node.target}
            elif node.op == "output":
                output = fx.map_arg(node.args[0], env.__getitem__)
                continue
            elif node.op == "get_attr":
                env[node] = self._attribute(module, path, node)
            else:
                place = f"{path}.{node.target}".lstrip(".") if callee is not None else ""
                given = _mutable(fx.map_arg((node.args, node.kwargs), env.__getitem__))
                if isinstance(callee, TracedModule):
                    env[node] = self.part(callee, place, node.name, *given)
                else:
                    env[node] = self._step(scope, node, callee, place, rule, *given)
            for value in labelled_leaves(env[node]):
                self.views.setdefault(_storage(value), []).append((node, value))
            key = (scope, node.name)
            if key in self.findings.nodes:  # a traced submodule that is called twice
                self._called_again(scope, node, callee, rule, env)
            else:
                self.findings.nodes[key] = env[node]
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

    def _step(
        self, scope: str, node: fx.Node, leaf: nn.Module | None, path: str, rule: Rule, args: Any, kwargs: Any
    ) -> Any:
        """What a node gives that calls a function, a method, or the layer ``leaf`` at ``path``."""
        target: Any = node.target
        self.line = str(node.meta.get("line", ""))
        if target is operator.getitem and not isinstance(args[0], Labelled):
            return args[0][args[1]]
        if target is getattr and not isinstance(args[0], Labelled):
            return getattr(*args)
        if isinstance(target, Rebuild) or (isinstance(target, type) and issubclass(target, (tuple, list, dict))):
            return target(*args, **kwargs)
        raw_args, raw_kwargs = pytree.tree_map(_value, (args, kwargs))
        tensors = list(labelled_leaves((args, kwargs)))
        versions = [a.value._version for a in tensors]
        try:
            raw = self.twins.run(node, leaf, raw_args, raw_kwargs)
        except NotImplementedError as error:
            raise TraceError(f"{node.name}: the shape of its result depends on the data ({path or target})") from error
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            given = " and ".join(str(t.shape) for t in tensors)
            what = str(error).strip().partition("\n")[0]
            raise UsageError(f"the example inputs do not fit: {node.name} cannot take {given} ({what})") from error
        out = pytree.tree_map(lambda v: Labelled(v) if isinstance(v, torch.Tensor) else v, raw)
        if not any(True for _ in labelled_leaves(out)):
            return out
        op = Op(self, node, leaf, path, (scope, node.name), out)
        result = self.related(op, rule, args, kwargs, out)
        for a, version in zip(tensors, versions, strict=True):
            if a.value._version != version:
                self._changed_in_place(node, a)
        return result

    def part(self, part: TracedModule, path: str, name: str, args: Any, kwargs: Any) -> Any:
        """Interpret a traced module that something else calls; what its graphs give is tied."""
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

    def related(self, op: Op, rule: Rule, args: Any, kwargs: Any, out: Any) -> Any:
        """``out`` with the fields that a rule gives it."""
        fields = self._relate(op, rule.relate, args, kwargs)
        turned = self._whole_axes(fields) if rule.movement and isinstance(out, Labelled) else ()
        for a in labelled_leaves((args, kwargs)):
            for f in a.fields:
                kept = f.key is None or any(g.key == f.key for g in turned)
                if not kept and f.key[0] == "param" and (f.key[1], f.key[2]) not in op.claimed:
                    self.findings.values.add((f.key[1], f.key[2]))
        return self.with_fields(op, out, fields, turned)

    def _whole_axes(self, fields: Fields) -> Fields:
        """Fields that are an axis of a parameter as it is: a weight that was transposed is a weight still."""
        known = self.findings.axes
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
            own = tuple(f if f in turned else Field(f.dims, f.ids, op.key, f.repeats) for f in fields)
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

    def _called_again(
        self, scope: str, node: fx.Node, leaf: nn.Module | None, rule: Rule, env: dict[fx.Node, Any]
    ) -> None:
        """What has to follow an edit can do so in one way only, for all calls."""
        first = self.findings.nodes[scope, node.name]
        if not any(True for _ in labelled_leaves(first)):
            if first != env[node]:
                for n in node.all_input_nodes:
                    for a, b in zip(
                        labelled_leaves(self.findings.nodes[scope, n.name]), labelled_leaves(env[n]), strict=False
                    ):
                        for f in b.fields:
                            if len(a.shape) != len(b.shape) or any(a.shape[d] != b.shape[d] for d in f.dims):
                                self.freeze(f.ids, f"{node.name} is called with different shapes")
            return
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
        self.line = ""
        fields = []
        for dim in range(1, value.ndim):
            ids = self.fresh(value.shape[dim])
            self.freeze(ids, "network input")
            fields.append(Field((dim,), ids, ("input", "", dim)))
        return Labelled(value.to("meta"), tuple(fields))

    def _attribute(self, module: nn.Module, path: str, node: fx.Node) -> Any:
        target = str(node.target)
        value = operator.attrgetter(target)(module)
        if not isinstance(value, torch.Tensor):
            return value
        owner = module.get_submodule(target.rpartition(".")[0])
        whole = has_module_rule(owner)  # the layer may be called too, and its axes of size 1 are channels
        if not whole and 1 in value.shape:
            self.findings.ones.setdefault(self.names.get(id(value), ""), Uses()).all += len(node.users)
        return self.tensor(value, [d for d, size in enumerate(value.shape) if size > 1 or whole])

    def parameter(self, given: Labelled, dims: int) -> Labelled:
        uses = self.findings.ones.get(self.names.get(id(given.constant), ""))
        if given.constant is None or uses is None:
            return given
        uses.as_parameter += 1
        known = {d for f in given.fields for d in f.dims}
        value = self.tensor(given.constant, sorted(known | set(range(min(given.ndim, dims)))))
        assert value is not None
        return value

    def tensor(self, value: torch.Tensor | None, dims: Iterable[int] | None = None) -> Labelled | None:
        """A parameter or buffer with its axes (all, or ``dims``) labelled; the same ids wherever it is used."""
        if value is None:
            return None
        name = self.names.get(id(value))
        if name is None:
            return Labelled(self.twins.tensor(value), (), value)
        fields = []
        for dim in range(value.ndim) if dims is None else dims:
            axis = self.findings.axes.get((name, dim))
            if axis is None:
                axis = self.findings.axes[name, dim] = ParamAxis(name, dim, self.fresh(value.shape[dim]))
            fields.append(Field((dim,), axis.ids, ("param", name, dim)))
        return Labelled(self.twins.tensor(value), tuple(fields), value)


def _storage(value: Labelled) -> int:
    return storage_of(value.value)


def _same_fields(a: Labelled, b: Labelled) -> bool:
    return a.shape == b.shape and all(
        f.dims == g.dims and np.array_equal(f.ids, g.ids) for f, g in zip(a.fields, b.fields, strict=False)
    )


def _value(v: Any) -> Any:
    return v.value if isinstance(v, Labelled) else v


def _mutable(tree: Any) -> Any:
    """The tree with lists and dicts of its own, as generated code would pass them: some functions write to them."""
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        parts = [_mutable(part) for part in tree]
        if hasattr(tree, "n_sequence_fields"):  # what torch.max and its kin return
            return type(tree)(parts)
        return parts if isinstance(tree, list) else type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    plain = type(tree) in (dict, fx.immutable_collections.immutable_dict)  # others are objects with attributes
    return {k: _mutable(v) for k, v in tree.items()} if plain else tree
