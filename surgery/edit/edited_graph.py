"""One graph of an edited module: the old graph that was analysed, and the copy that is being changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from surgery.axes.analysis import Analysis
from surgery.edit.layout import Layouts
from surgery.edit.sites import called_layer
from surgery.graph.rule_table import Rule, rule_for
from surgery.graph.traced import TracedModule


@dataclass
class EditedGraph:
    """A graph before an edit, and its copy.

    Attributes:
        source: the module that owns the old graph.
        target: its copy, whose tensors have been gathered already.
        graph: the old graph.
        copy: the graph of ``target`` that follows it.
        scope: the key of the old graph in `Analysis.graphs`.
        path: qualified name of ``source``.
        analysis: of the old module.
        layouts: what the edit makes of each axis.
    """

    source: TracedModule
    target: TracedModule
    graph: fx.Graph
    copy: fx.Graph
    scope: str
    path: str
    analysis: Analysis
    layouts: Layouts

    def __post_init__(self) -> None:
        self.new = {node.name: node for node in self.copy.nodes}
        """By the name of an old node, the node of the copy that has its value."""
        self.old_of = dict(zip(self.copy.nodes, self.graph.nodes, strict=True))

    def record(self, node: fx.Node) -> Any:
        """The value of an old node as the analysis has it."""
        return self.analysis.values[self.scope, node.name]

    def leaf(self, node: fx.Node) -> nn.Module | None:
        """The layer that an old node calls."""
        return called_layer(self.source, node)

    def rule(self, node: fx.Node) -> Rule:
        """The rule of an old node's op."""
        return rule_for(node, self.leaf(node))
