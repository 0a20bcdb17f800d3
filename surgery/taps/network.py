"""A traced module to take values out of: which values there are, and what is known of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.axes.analysis import analyse
from surgery.axes.labels import Labelled
from surgery.edit.flow import Flow
from surgery.edit.sites import Site, output_sites
from surgery.errors import EditError, TraceError, UsageError
from surgery.graph.arguments import bound_arguments
from surgery.graph.guards import Values
from surgery.graph.traced import TracedModule, example_inputs, info
from surgery.selectors import Where, each_selector, select
from surgery.taps.landmarks import classifier, classifier_input, middle, name_of, nonlinearity, stage_ends
from surgery.taps.regressors import ActivationLayout
from surgery.taps.truncate import needed_for

Step = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""A function of a tensor, and its further arguments."""


def names_of(module: nn.Module, where: Where) -> list[str]:
    """The names that selectors mean, for each selector its own: one name may be meant twice."""
    return [name for selector in each_selector(where) for name in select(module, selector)]


@dataclass(frozen=True)
class Tap:
    """A value that is taken out of a network."""

    nodes: tuple[fx.Node, ...]
    """In each graph of the `TappedNetwork`."""
    name: str
    where: str
    """What it is, for errors."""
    view: tuple[Step, ...] = ()
    """What is done to it before it is handed out; nothing in it is trained."""

    def through(self, *steps: Step) -> Tap:
        """The same value with more done to it."""
        return replace(self, view=(*self.view, *steps))

    def without_first(self, tokens: int) -> Tap:
        """The value without its first tokens, such as a class token."""
        return self.through((operator.getitem, ((slice(None), slice(tokens, None)),))) if tokens else self

    def as_pixel(self) -> Tap:
        """A vector (N, C) as a map (N, C, 1, 1)."""
        return self.through((torch.unflatten, (1, (-1, 1, 1))))

    def emit(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """Append to a graph what is done to the value."""
        for function, further in self.view:
            value = graph.call_function(function, (value, *further))
        return value


class TappedNetwork:
    """A traced module to take values out of.

    Args:
        module: traced whole.
        what: what it is called in errors: ``"student"``.
        mode: whether values are those of its ``"evaluation"`` graph, its ``"training"`` graph, or computed in
            ``"training and evaluation"``.
        like: a traced module on whose example inputs the shapes are known; ``module`` itself unless given.

    Raises:
        UsageError: ``module`` is traced in parts.
    """

    def __init__(self, module: nn.Module, what: str, *, mode: str, like: nn.Module | None = None) -> None:
        known = info(module)
        if not isinstance(module, TracedModule):
            raise UsageError(
                f"the {what} is traced in parts, so it cannot be cut off: pass the part that holds the layer"
            )
        self.module, self.what, self.mode = module, what, mode
        self.like = module if like is None else like
        self.analysis = analyse(module)
        wanted = {"evaluation": module.graphs[:1], "training": module.graphs[-1:]}.get(mode, module.graphs)
        self.flows = [self._flow(graph) for graph in wanted]
        other = info(self.like)
        self._is_like = (known.args, known.kwargs) == (other.args, other.kwargs)

    def _flow(self, graph: fx.Graph) -> Flow:
        return Flow(self.analysis, Site(self.module, "", graph, graph.output_node()))

    # ---- values

    def tap(self, name: str) -> Tap:
        """The output of a layer or container.

        Raises:
            UsageError: there is none of this name.
            EditError: it has no one output in each graph.
        """
        where = f"the output of {name!r} in the {self.what}"
        found = {id(site.graph): site.node for site in output_sites(self.module, name) if not site.path}
        if not found:
            raise EditError(
                f"{where} is inside of a part that is traced on its own: name a layer or container around it"
            )
        if any(id(flow.graph) not in found for flow in self.flows):
            raise EditError(f"{where} is not computed in {self.mode}")
        return self._tap([found[id(flow.graph)] for flow in self.flows], name, where)

    def middle(self, *, deeper: bool) -> str:
        """The name of the layer or container in the middle, in evaluation: see `surgery.taps.landmarks`."""
        return middle(self.module, self._flow(self.module.graph), deeper=deeper)

    def logits(self) -> Tap:
        """The network's output, (N, classes); the first of several.

        Raises:
            UsageError: it is something else.
        """
        where = f"the output of the {self.what}"
        ends = [end for flow in self.flows if (end := _first_output(flow)) and isinstance(flow.value(end), Labelled)]
        if len(ends) < len(self.flows):
            raise UsageError(f"{where} is not one tensor of logits (N, classes)")
        logits = self._tap(ends, "logits", where)
        if len(shape := self.shape(logits)) != 2:
            raise UsageError(f"{where} is {shape}: logits are (N, classes)")
        return logits

    def embedding(self) -> Tap:
        """What the classifier reads, (N, D): the last layer with weights on the way to the output, before any dropout.
        Maps and tokens are averaged over their positions.

        Raises:
            UsageError: the output is not logits.
            EditError: no such layer that everything passes through.
        """
        logits = self.logits()
        found = [classifier_input(flow, classifier(flow, n)) for flow, n in zip(self.flows, logits.nodes, strict=True)]
        value = self._tap(found, "embedding", f"the embedding of the {self.what}")
        layout = self.layout(value)
        axes = tuple(range(1, 1 + len(layout.sizes)) if layout.last else range(2, 2 + len(layout.sizes)))
        return value.through((torch.mean, (axes,))) if axes else value

    def stages(self) -> list[Tap]:
        """The ends of the stages, from the input on: see `surgery.taps.landmarks.stage_ends`."""
        flow = self.flows[0]
        end = _first_output(flow) or flow.graph.output_node()

        def sizes(node: fx.Node) -> tuple[int, ...]:
            """None where it is not known which axis alone holds the channels, as within a channel shuffle."""
            return self._layout(node, "").sizes if self._channel_axes(node) else ()

        found = []
        for node in stage_ends(flow, end, sizes):
            name = name_of(self.module, flow, node) or node.name
            found.append(self._tap([node], name, f"the output of {name!r} in the {self.what}"))
        return found

    def _tap(self, nodes: Sequence[fx.Node], name: str, where: str) -> Tap:
        if not isinstance(self.flows[0].value(nodes[0]), Labelled):
            raise EditError(f"{where} is not one tensor")
        return Tap(tuple(nodes), name, where)

    def order(self, value: Tap) -> int:
        """Where the value stands in the graph."""
        return self.flows[0].order[value.nodes[0]]

    # ---- what is known of a value

    def shape(self, value: Tap) -> tuple[int, ...]:
        """On the example inputs, after what is done to it."""
        flow, node = self.flows[0], value.nodes[0]
        if not self._is_like:
            needed = needed_for(flow, [node])
            for before in (n for n in flow.graph.nodes if n in needed):
                self._computed(before)
        result = torch.empty(self._known_shape(node), device="meta")
        for function, further in value.view:
            result = function(result, *further)
        return tuple(result.shape)

    def layout(self, value: Tap) -> ActivationLayout:
        """How the value lies in memory before anything is done to it.

        Raises:
            EditError: it has no channels, or too many axes.
        """
        self.shape(value)
        return self._layout(value.nodes[0], value.where)

    def _layout(self, node: fx.Node, where: str) -> ActivationLayout:
        """The channels are on the axis that the analysis says; of two on the one that can be edited, or is read by a
        layer. Where it knows of none, on axis 1 of maps and the last axis of others."""
        shape = self._known_shape(node)
        if not 2 <= len(shape) <= 5:
            raise EditError(
                f"{where} has the shape {shape}: a regressor needs a batch axis, channels, and up to 3 others"
            )
        axes = self._channel_axes(node)
        axis = min(axes)[2] if axes else 1 if len(shape) > 3 else len(shape) - 1
        last = axis == len(shape) - 1
        return ActivationLayout(shape[axis], tuple(shape[1:-1] if last else shape[2:]), last)

    def _channel_axes(self, node: fx.Node) -> list[tuple[bool, bool, int]]:
        """The axes that hold channels alone: whether each is frozen, whether no layer reads it, and which it is."""
        shape, value = self._known_shape(node), self.flows[0].value(node)
        axes = []
        for axis in sorted({1, len(shape) - 1}) if 2 <= len(shape) <= 5 else ():
            field = value.at(axis)
            if field is not None and field.dims == (axis,):
                units = self.analysis.unit_of[field.ids]
                axes.append((bool(self.analysis.frozen[units].all()), not np.isin(units, self._read).any(), axis))
        return axes

    @cached_property
    def _read(self) -> Any:
        """Units that layers read."""
        read = [u for at, u in self.analysis.axis_units.items() if "consumer" in self.analysis.roles[at]]
        return np.concatenate([*read, np.zeros(0, np.int64)])

    def nonlinearity(self, value: Tap) -> nn.Module | None:
        """The activation that the value is the output of; None where it is linear."""
        return nonlinearity(self.flows[0], value.nodes[0])

    def _known_shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of one tensor; empty for anything else."""
        if not isinstance(value := self.flows[0].value(node), Labelled):
            return ()
        return value.shape if self._is_like else tuple(self._computed(node).shape)

    def _computed(self, node: fx.Node) -> Any:
        """The value on the example inputs of another module."""
        try:
            return self._values.of(node)
        except (TraceError, UsageError) as error:
            raise self._unlike(error) from error

    @cached_property
    def _values(self) -> Values:
        args, kwargs = example_inputs(self.like)
        try:
            return Values(self.module, bound_arguments(self.module, args, kwargs).values)
        except UsageError as error:
            raise self._unlike(error) from error

    def _unlike(self, error: Exception) -> UsageError:
        shapes = [tuple(t.shape) for t in pytree.tree_leaves(example_inputs(self.like)) if isinstance(t, Tensor)]
        return UsageError(
            f"the {self.what} cannot be called on the student's example inputs {shapes}, so there is nothing to "
            f"compare: trace both with the same inputs ({error})"
        )


def output_of(flow: Flow) -> Any:
    """What a graph returns, with nodes in it."""
    output: Any = flow.graph.output_node().args[0]
    codegen = flow.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, fx.graph._PyTreeCodeGen) else None
    return output if spec is None else pytree.tree_unflatten(list(output), spec)


def _first_output(flow: Flow) -> fx.Node | None:
    """The node that a graph returns, or the first of a tuple."""
    output = output_of(flow)
    if isinstance(output, fx.Node) and isinstance(output.target, type) and issubclass(output.target, tuple):
        output = output.args  # a named tuple is made of its fields
    if isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, fx.Node) else None
