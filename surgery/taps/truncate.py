"""Truncation: the part of a traced module that computes some of its values, and nothing else.

On a graph this is dead-code elimination from other outputs: nodes, layers, parameters and buffers that the values do
not need are gone, and the others keep their names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from surgery.axes.ledger import labelled_leaves
from surgery.edit.flow import Flow
from surgery.graph.guards import expect
from surgery.graph.traced import TracedModule, TraceInfo, info, set_info


def truncate(module: TracedModule, cuts: Sequence[tuple[Flow, Sequence[fx.Node]]]) -> TracedModule:
    """A traced module that computes the given nodes of ``module`` and returns a list of them.

    Args:
        cuts: for each graph to keep, the evaluation graph first, the nodes to compute.

    Returns:
        a module that shares no storage with ``module``. Its state dict is a subset, by the same names.
    """
    graphs = [_cut_graph(flow, nodes) for flow, nodes in cuts]
    root = _copy_layers(module, graphs)
    result = TracedModule(root, graphs[0], graphs[1] if len(graphs) > 1 else None)
    known = info(module)
    set_info(result, TraceInfo(None, known.args, known.kwargs))
    return result


def copy_graph(
    flow: Flow, ends: Sequence[fx.Node], kept: set[fx.Node]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """A graph of some nodes, without an output yet; each node's copy; and the value of each of ``ends``, which no later
    op changes: what one of them changes in place is copied before."""
    changed = find_overwritten(flow, ends, kept)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    values: dict[fx.Node, fx.Node] = {}
    for node in flow.graph.nodes:
        if node.op != "output" and (node in kept or node.op == "placeholder"):
            new[node] = graph.node_copy(node, new.__getitem__)
            if node in ends:
                values[node] = graph.call_function(torch.clone, (new[node],)) if node in changed else new[node]
    codegen = copy.deepcopy(flow.graph._codegen)
    if isinstance(codegen, fx.graph._PyTreeCodeGen):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)
    graph.set_codegen(codegen)
    return graph, new, values


def _cut_graph(flow: Flow, ends: Sequence[fx.Node]) -> fx.Graph:
    """The graph that computes ``ends``."""
    graph, _, values = copy_graph(flow, ends, needed_for(flow, ends))
    graph.output([values[end] for end in ends])
    graph.lint()
    return graph


def needed_for(flow: Flow, ends: Iterable[fx.Node]) -> set[fx.Node]:
    """What ``ends`` are computed by: with the ops that change it in place, and the guards on the way to it."""
    needed: set[fx.Node] = set()
    more = list(ends)
    while more:
        for node in more:
            needed |= flow.before(node)
        left = [n for n in flow.graph.nodes if n not in needed]
        more = [n for n in left if _is_guard(flow, n, needed) or _writes(flow, n, needed)]
    return needed


def _is_guard(flow: Flow, node: fx.Node, needed: set[fx.Node]) -> bool:
    """Whether a node refuses inputs by what is computed anyhow, or by sizes of it."""
    own = flow.before(node) - needed - {node} if node.target is expect else set()
    return node.target is expect and not any(n.op != "placeholder" and flow.holds_tensors(n) for n in own)


def _writes(flow: Flow, node: fx.Node, needed: set[fx.Node]) -> bool:
    """Whether a node changes in place what a needed node reads behind it."""
    written = _find_written(flow, node)
    return bool(written) and any(
        written & _storages(flow, read)
        for n in needed
        if flow.order[n] > flow.order[node]
        for read in n.all_input_nodes
    )


def find_overwritten(flow: Flow, values: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those of ``values`` that one of ``nodes`` behind them changes in place."""
    written = [(flow.order[node], memory) for node in nodes if (memory := _find_written(flow, node))]
    return {
        value
        for value in values
        if any(flow.order[value] < order and memory & _storages(flow, value) for order, memory in written)
    }


def _find_written(flow: Flow, node: fx.Node) -> set[int]:
    """The memory that a node changes: that of its output where it is that of its first argument, but for views."""
    first = node.args[0] if node.args else None
    if not node.op.startswith("call_") or not isinstance(first, fx.Node):
        return set()
    return set() if flow.rule(node).movement else _storages(flow, first) & _storages(flow, node)


def _storages(flow: Flow, node: fx.Node) -> set[int]:
    return {label.value.untyped_storage()._cdata for label in labelled_leaves(flow.value(node))}


def _copy_layers(module: nn.Module, graphs: Sequence[fx.Graph]) -> nn.Module:
    """The layers and tensors that the graphs name, in containers of the same names and modes."""
    memo: dict[int, Any] = {}
    root = nn.Module()
    root.training = module.training
    order = {name: k for k, (name, _) in enumerate(module.named_modules(remove_duplicate=False))}
    named = {(str(n.target), n.op) for graph in graphs for n in graph.nodes}
    layers, tensors = ([target for target, op in named if op == wanted] for wanted in ("call_module", "get_attr"))
    for target in sorted(layers, key=order.__getitem__):
        path, _, name = target.rpartition(".")
        holder, source = _container(root, module, path)
        holder.add_module(name, copy.deepcopy(source.get_submodule(name), memo))
    for target in sorted(tensors):
        path, _, name = target.rpartition(".")
        holder, source = _container(root, module, path)
        if not hasattr(holder, name):
            _copy_attribute(source, holder, name, memo)
    return root


def _container(root: nn.Module, module: nn.Module, path: str) -> tuple[nn.Module, nn.Module]:
    """The module at ``path`` in the new tree, made where there is none, and that in the old one."""
    for name in filter(None, path.split(".")):
        module = module.get_submodule(name)
        if name not in root._modules:
            root.add_module(name, nn.Module())
            root.get_submodule(name).training = module.training
        root = root.get_submodule(name)
    return root, module


def _copy_attribute(source: nn.Module, target: nn.Module, name: str, memo: dict[int, Any]) -> None:
    value = copy.deepcopy(getattr(source, name), memo)
    if name in source._buffers:
        target.register_buffer(name, value, persistent=name not in source._non_persistent_buffers_set)
    else:
        setattr(target, name, value)
