"""A graph as values: what each node gives, by which layer and rule, and which nodes depend on which."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from torch import fx, nn

from surgery.axes.analysis import Analysis
from surgery.axes.ledger import labelled_leaves
from surgery.edit.sites import Site, called_layer, is_inside, op_of
from surgery.graph.rule_table import Rule
from surgery.graph.traced import TracedModule


class Flow:
    """A graph, the layers it runs, and what the analysis knows of its values."""

    def __init__(self, analysis: Analysis, site: Site) -> None:
        self.analysis, self.owner, self.path, self.graph = analysis, site.owner, site.path, site.graph
        graphs = analysis.graphs
        self.scope = next(s for s, (path, graph) in graphs.items() if path == site.path and graph is site.graph)
        self.values = analysis.values
        self.order = {node: k for k, node in enumerate(site.graph.nodes)}

    def value(self, node: fx.Node) -> Any:
        """The node's output as the analysis has it, with a `Labelled` for each tensor."""
        return self.values.get((self.scope, node.name))

    def leaf(self, node: fx.Node) -> nn.Module | None:
        """The layer, or traced module, that a node calls."""
        return called_layer(self.owner, node)

    def rule(self, node: fx.Node) -> Rule:
        """The record of the op that a node calls; `UNKNOWN` for a node that is no op, or calls a traced module."""
        return op_of(self.owner, node)

    def holds_tensors(self, node: fx.Node) -> bool:
        return any(True for _ in labelled_leaves(self.value(node)))

    def range(self, node: fx.Node) -> tuple[float, float]:
        """Bounds of the numbers in a value, as far as activations set them and pools and concatenations keep them."""
        return self._ranges(node, {})

    def _ranges(self, node: fx.Node, known: dict[fx.Node, tuple[float, float]]) -> tuple[float, float]:
        if node not in known:
            known[node] = -math.inf, math.inf
            rule = self.rule(node)
            inner = [flow._ranges(end, {}) for flow, _, end in self.called(node)]
            if inner:
                known[node] = min(r[0] for r in inner), max(r[1] for r in inner)
            elif isinstance(rule.within, tuple):
                known[node] = rule.within
            elif rule.movement or rule.within:
                given = [self._ranges(n, known) for n in self.tensors(node)]
                known[node] = min(0.0, *(g[0] for g in given)), max(0.0, *(g[1] for g in given))
        return known[node]

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that an op reads first: its first argument, or those in it."""
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        given = first if isinstance(first, (list, tuple)) else [first]
        return [n for n in given if isinstance(n, fx.Node) and self.holds_tensors(n)]

    def inside(self, name: str) -> set[fx.Node]:
        """The ops on tensors that a container (all of the graph for ``""``) runs."""
        return {n for n in self.operations if not name or is_inside(n, name)}

    @cached_property
    def operations(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op.startswith("call_") and self.holds_tensors(n)]

    def called(self, node: fx.Node) -> list[tuple[Flow, fx.Node, fx.Node]]:
        """The graphs of a traced module that a node calls on one tensor, with their first input and their output."""
        leaf = self.leaf(node)
        read = [n for n in node.all_input_nodes if self.holds_tensors(n)]
        if (
            not isinstance(leaf, TracedModule)
            or node.args[:1] != tuple(read)
            or leaf._forward_hooks
            or leaf._forward_pre_hooks
        ):
            return []
        result = []
        for graph in leaf.graphs:
            entry, end = next(iter(graph.nodes)), graph.output_node().args[0]
            if entry.op == "placeholder" and isinstance(end, fx.Node):
                path = f"{self.path}.{node.target}".lstrip(".")
                result.append((Flow(self.analysis, Site(leaf, path, graph, end)), entry, end))
        return result if len(result) == len(leaf.graphs) else []

    def region(self, entry: fx.Node, end: fx.Node) -> tuple[fx.Node, ...] | None:
        """The nodes that ``end`` is computed by from ``entry``, in order; None where they read other activations, or
        others read theirs."""
        back = self.before(end, entry)
        depends: dict[fx.Node, bool | None] = {entry: True}
        """On the entry; None: on other inputs of the graph alone."""
        for node in sorted(back, key=self.order.__getitem__):
            given = [depends[n] for n in node.all_input_nodes]
            depends[node] = True if True in given else None if node.op == "placeholder" or None in given else False
        inside = {node for node in back if depends[node]}
        needed = set(inside)
        for node in sorted(back, key=self.order.__getitem__, reverse=True):
            if node in needed:
                for n in node.all_input_nodes:
                    if n in back and depends[n] is not None:
                        needed.add(n)
                    elif depends[n] is None and self.holds_tensors(n):
                        return None
        for node in inside - {end}:
            if any(n not in inside and (n.op == "output" or (n.users and self.holds_tensors(n))) for n in node.users):
                return None
        return tuple(sorted(needed, key=self.order.__getitem__)) if end in inside else None

    def before(self, end: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
        """``end`` and all that it is computed from, as far as ``stop``."""
        found, left = {end}, [end]
        while left:
            for node in left.pop().all_input_nodes:
                if node is not stop and node not in found:
                    found.add(node)
                    left.append(node)
        return found
