"""Places in graphs: where the output of a layer or container is computed, and what computes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from surgery.axes.analysis import Analysis
from surgery.errors import EditError, unknown_name
from surgery.graph.rule_table import UNKNOWN, Rule, rule_for
from surgery.graph.traced import TracedModule, traced_parts


class Site:
    """A value in a graph: the traced module that owns the graph, its path, and the node."""

    def __init__(self, owner: TracedModule, path: str, graph: fx.Graph, node: fx.Node) -> None:
        self.owner, self.path, self.graph, self.node = owner, path, graph, node


def output_sites(module: nn.Module, name: str) -> Iterator[Site]:
    """Where the output of a layer or container is computed: once in each graph that runs it.

    The output of a layer is taken behind the normalisation and the activation that follow it alone.

    Raises:
        UsageError: no such layer or container.
        EditError: it runs more than once, or has several outputs.
    """
    found = False
    for path, owner in traced_parts(module):
        if path and not f"{name}.".startswith(f"{path}."):
            continue
        local = local_name(name, path)
        if path and not local and found:
            continue  # a graph around it calls it
        for graph in owner.graphs:
            node = _output_node(owner, graph, local, name)
            if node is not None:
                found = True
                yield Site(owner, path, graph, node)
    if not found:
        names = [n for n, _ in module.named_modules() if n]
        if name in names:
            raise EditError(f"{name!r} is not run by any graph")
        raise unknown_name("layer", name, names)


def called_layer(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    """The layer, or traced module, that a node of ``owner``'s graph calls; None where it calls none."""
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def compute(owner: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What the op that a node calls gives for other arguments."""
    if node.op == "call_module":
        return owner.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def op_of(owner: TracedModule, node: fx.Node) -> Rule:
    """The record of the op that a node calls; `UNKNOWN` where there is none, or the node calls a traced module."""
    leaf = called_layer(owner, node)
    return UNKNOWN if isinstance(leaf, TracedModule) or not node.op.startswith("call_") else rule_for(node, leaf)


def _output_node(owner: TracedModule, graph: fx.Graph, local: str, name: str) -> fx.Node | None:
    if not local:  # all of the graph
        result = graph.output_node().args[0]
        if not isinstance(result, fx.Node):
            raise EditError("it has no single output: name a layer")
        return result
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == local]
    if len(calls) > 1:
        raise EditError(f"{name!r} runs {len(calls)} times: a layer behind it would be shared")
    if calls:
        return _behind(owner, calls[0])
    inside = [n for n in graph.nodes if n.op != "output" and is_inside(n, local)]
    outputs = [n for n in inside if any(not is_inside(user, local) for user in n.users)]
    if len(outputs) > 1:
        raise EditError(f"{name!r} has {len(outputs)} outputs ({', '.join(n.name for n in outputs)}): name a layer")
    return outputs[0] if outputs else None


def is_called(site: Site, name: str) -> bool:
    """Whether the site's graph calls ``name`` as a whole: it is a layer, not a container."""
    local = local_name(name, site.path)
    if isinstance(site.owner.get_submodule(local), TracedModule):
        return False
    return any(n.op == "call_module" and n.target == local for n in site.graph.nodes)


def local_name(name: str, path: str) -> str:
    """A qualified name within the module at ``path``."""
    return name[len(path) + 1 :] if path else name


def is_inside(node: fx.Node, name: str) -> bool:
    """Whether a node is run by the layer or container ``name``."""
    path = str(node.target) if node.op == "call_module" else str(node.meta.get("path", ""))
    return path == name or path.startswith(f"{name}.")


def _behind(owner: TracedModule, node: fx.Node) -> fx.Node:
    for what in ("norm", "activation"):
        if len(node.users) == 1:
            user = next(iter(node.users))
            rule = op_of(owner, user)
            if rule.kind == "batch norm" if what == "norm" else rule.activation:
                node = user
    return node


def in_copy(module: nn.Module, analysis: Analysis, scope: str, name: str) -> tuple[TracedModule, fx.Node]:
    """The node of that name in that scope's graph in ``module``, a copy of what ``analysis`` was made from, and the
    module that owns the graph."""
    if scope not in analysis.graphs:
        raise EditError(f"{name} is called by Python outside the traced parts: channels cannot be left out of it")
    owner = module.get_submodule(analysis.graphs[scope][0])
    assert isinstance(owner, TracedModule)
    graph = owner.graphs[-1] if scope.endswith(":train") else owner.graph
    return owner, next(node for node in graph.nodes if node.name == name)


def place_for(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The container that a new part is registered in, and its name there.

    Raises:
        EditError: there is such a part already.
    """
    parent, _, child = name.rpartition(".")
    container = module.get_submodule(parent)
    if hasattr(container, child):
        raise EditError(f"{name!r} is taken")
    return container, child


def add_constant(owner: TracedModule, graph: fx.Graph, stem: str, value: Tensor) -> fx.Node:
    """A node that reads ``value`` from a new buffer of ``owner`` outside the state dict."""
    name = next(name for k in itertools.count() if not hasattr(owner, name := f"_{stem}_{k}"))
    owner.register_buffer(name, value, persistent=False)
    return graph.get_attr(name)
