"""Average expansion: widening a stream that LayerNorm normalises over, by any number of channels.

LEMON (Wang et al., ICLR 2024, section 4) fills what is left over after equal copies with the mean of all channels. If
``D`` channels become ``f * D`` copies and ``r`` means, the mean stays what it was and the variance shrinks by
``eta**2 = f * D / (f * D + r)``. With ``eps`` times ``eta**2`` and the weight times ``eta`` a LayerNorm gives the old
values at the copies and its bias, set to 0, at the means. Layers that read a mean have weight 0 for it.

This holds where everything that is written into the stream is linear in its channels, and alike for each of them: an
output row of a layer that is the mean of the others then writes the mean. `normalised_streams` follows the graph to see
whether it is so. A mean is rounded to the dtype of the weights: the function is kept to 1e-10 in float64, and of a
float32 model to the precision of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.axes.labels import Ids
from surgery.axes.ledger import Norm, labelled_leaves
from surgery.edit.sites import called_layer, in_copy
from surgery.edit.step import MEAN
from surgery.errors import EditError
from surgery.graph.rule_table import Rule, rule_for
from surgery.graph.traced import TracedModule


def normalised_streams(module: nn.Module, analysis: Analysis, group: DimensionGroup) -> list[Norm]:
    """Find the LayerNorms over ``group``, and check that an average expansion keeps each of them exact.

    Raises:
        EditError: it would not; says which op stands in the way.
    """
    whole = np.arange(group.start, group.start + group.units)
    for member in group.members:
        if member.role != "consumer" and not np.array_equal(
            np.sort(analysis.axis_units[member.name, member.axis]), whole
        ):
            raise EditError(f"{member} does not hold each channel of the stream once")
    walk = _Walk(module, analysis, group)
    paths = {path for path, _ in analysis.graphs.values()}
    for scope, (path, _) in analysis.graphs.items():
        if not any(path != other and f"{path}.".startswith(f"{other}." if other else "") for other in paths):
            walk.graph(scope, [])
    norms = [n for n in analysis.norms if walk.holds(n.ids)]
    if len(norms) < sum(walk.covers(units) for units, _ in analysis.mixed):
        raise EditError("something other than a LayerNorm mixes its channels")
    for norm in norms:
        if norm.key not in walk.norms:
            raise EditError(f"{norm.path or norm.key[1]} does not normalise over the whole stream as it was written")
    return norms


def _is_rounded(rule: Rule, node: fx.Node, value: Any) -> bool:
    """Whether the op gives whole numbers: a division that rounds, a cast."""
    if rule.arguments(node).get("rounding_mode") is not None:
        return True
    return any(not leaf.value.is_floating_point() for leaf in labelled_leaves(value))


class _Walk:
    """Which values hold the mean of all channels where an average expansion puts one."""

    def __init__(self, module: nn.Module, analysis: Analysis, group: DimensionGroup) -> None:
        self.module, self.analysis, self.group = module, analysis, group
        self.norms: set[tuple[str, str]] = set()
        self.linear: dict[tuple[str, str], bool] = {}

    def holds(self, ids: Any) -> bool:
        return self.covers(self.analysis.unit_of[ids])

    def covers(self, units: Ids) -> bool:
        return bool(((units >= self.group.start) & (units < self.group.start + self.group.units)).any())

    def carries(self, value: Any) -> bool:
        return any(self.holds(f.ids) for leaf in labelled_leaves(value) for f in leaf.fields)

    def graph(self, scope: str, given: Sequence[bool]) -> bool:
        """Walk one graph, whose positional inputs are linear as ``given``; whether its output is."""
        path, graph = self.analysis.graphs[scope]
        owner = self.module.get_submodule(path)
        assert isinstance(owner, TracedModule)
        inputs = iter(given)
        for node in graph.nodes:
            if node.op == "output":
                return all(self.linear.get((scope, n.name), True) for n in node.all_input_nodes)
            linear = next(inputs, False) if node.op == "placeholder" else None
            if not self.carries(self.analysis.values.get((scope, node.name))):
                continue
            if linear is None:
                leaf = called_layer(owner, node)
                linear = self.is_linear(path, scope, node, leaf)
            self.linear[scope, node.name] = linear and self.linear.get((scope, node.name), True)
        return False

    def is_linear(self, path: str, scope: str, node: fx.Node, leaf: nn.Module | None) -> bool:
        """Whether the node's value holds the mean of its channels wherever a mean is put, given means to read."""
        if node.op == "get_attr":
            return True
        if isinstance(leaf, TracedModule):
            states = [not isinstance(a, fx.Node) or self.linear.get((scope, a.name), True) for a in node.args]
            inside = f"{path}.{node.target}".lstrip(".")
            scopes = [s for s, (within, _) in self.analysis.graphs.items() if within == inside]
            results = [self.graph(s, states) for s in scopes]
            return all(results)
        read = [n for n in node.all_input_nodes if self.carries(self.analysis.values[scope, n.name])]
        kept = all(self.linear.get((scope, n.name), False) for n in read)
        rule = rule_for(node, leaf)
        if _is_rounded(rule, node, self.analysis.values[scope, node.name]):
            return False
        if rule.kind == "layer norm":
            first, weight = node.all_input_nodes[0], rule.arguments(node).get("weight") if leaf is None else leaf.weight
            if self.linear.get((scope, first.name), False) and self.spans(scope, node) and weight is not None:
                self.norms.add((scope, node.name))
            return False
        if rule.linear == "writes":
            roles = self.roles(path, node)
            return "per-channel" not in roles and ("producer" in roles or kept)
        if rule.linear in ("product", "quotient"):
            return kept and node.args[0] in read and sum(argument in read for argument in node.args) == 1
        return kept and (rule.linear in ("sum", "first") or rule.movement)

    def roles(self, path: str, node: fx.Node) -> set[str]:
        """What a node's parameters do with the group, but for contracting over it."""
        if node.op == "call_module":
            prefix = f"{path}.{node.target}.".lstrip(".")
            names = {name for name, _ in self.analysis.axis_units if name.startswith(prefix)}
        else:
            names = {f"{path}.{n.target}".lstrip(".") for n in node.all_input_nodes if n.op == "get_attr"}
        return {
            role
            for (name, axis), units in self.analysis.axis_units.items()
            if name in names and self.covers(units)
            for role in self.analysis.roles[name, axis] - {"consumer"}
        }

    def spans(self, scope: str, node: fx.Node) -> bool:
        """Whether the node normalises over one axis, which holds every unit of the group once."""
        norms = [n for n in self.analysis.norms if n.key == (scope, node.name)]
        wanted = np.arange(self.group.start, self.group.start + self.group.units)
        if any(len(norm.shape) > 1 for norm in norms):
            return False  # over positions too
        return len(norms) == 1 and np.array_equal(np.sort(self.analysis.unit_of[norms[0].ids].ravel()), wanted)


class Expansion:
    """What an average expansion does to the LayerNorms over the groups whose index has means."""

    def __init__(self, module: nn.Module, analysis: Analysis, streams: Mapping[DimensionGroup, Sequence[int]]) -> None:
        self.analysis = analysis
        self.norms: dict[Any, tuple[Norm, float]] = {}
        """The norms and their ``eta``: a layer once, however often it is called."""
        self.weights: dict[str, float] = {}
        self.biases: set[str] = set()
        for group, index in streams.items():
            eta = (sum(unit != MEAN for unit in index) / len(index)) ** 0.5
            for norm in normalised_streams(module, analysis, group):
                self.norms[norm.path or norm.key] = norm, eta
                weight, bias = self._affine(norm)
                self.weights[weight] = eta
                self.biases.add(bias)

    def _affine(self, norm: Norm) -> tuple[str, str]:
        """Names of the norm's parameters."""
        if norm.path:
            return f"{norm.path}.weight", f"{norm.path}.bias"
        path, graph = self.analysis.graphs[norm.key[0]]
        node = next(n for n in graph.nodes if n.name == norm.key[1])
        given = rule_for(node, None).arguments(node)
        weight, bias = (
            f"{path}.{n.target}".lstrip(".") if isinstance(n, fx.Node) else ""
            for n in map(given.get, ("weight", "bias"))
        )
        return weight, bias

    def fill(
        self, name: str, before: torch.Tensor, result: torch.Tensor, axis: int, means: torch.Tensor
    ) -> torch.Tensor:
        """Put what belongs there at the positions ``means`` of ``result``, the parameter ``name`` gathered along
        ``axis``; ``before`` is what it was gathered from."""
        if name in self.weights:
            return (result * self.weights[name]).index_fill(axis, means, 1.0)
        if name in self.biases:
            return result.index_fill(axis, means, 0.0)
        mean = before.mean(axis, keepdim=True)
        return result.index_copy(axis, means, mean.expand([len(means) if a == axis else -1 for a in range(mean.ndim)]))

    def adjust(self, module: nn.Module) -> None:
        """Scale ``eps`` of the norms in the edited module."""
        for norm, eta in self.norms.values():
            if norm.path:
                layer: Any = module.get_submodule(norm.path)
                layer.eps *= eta * eta
                continue
            owner, node = in_copy(module, self.analysis, *norm.key)
            given = rule_for(node, None).arguments(node)
            given["eps"] = eta * eta * given.get("eps", 1e-5)
            node.args, node.kwargs = (given.pop("input"),), given
            owner.recompile()
