"""Finds blocks in a graph: regions that hand their entry on unchanged once a few of their parameters are 0.

A block is a chain of residual sums: each adds a branch to what came in, and the branch ends in a layer whose
parameters, set to 0, make it add nothing. ResNet's blocks, inverted residuals and the layers of Transformers are such,
whatever their classes are called. A copy of a block with these parameters at 0 can be put behind it (LLaMA-Pro, ACL
2024).
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from surgery.axes.analysis import Analysis
from surgery.axes.labels import Labelled
from surgery.axes.ledger import labelled_leaves
from surgery.edit.sites import Site, is_inside
from surgery.graph.table import Rule, rule_for
from surgery.graph.traced import TracedModule


@dataclass(frozen=True)
class Zero:
    """A tensor to set to 0: that of a layer, or one that the graph reads itself."""

    holder: str
    """Target of a node, within the module that owns the graph."""
    tensor: str = ""
    """Name within that layer; empty where the target is the tensor."""


@dataclass(frozen=True, eq=False)
class Block:
    """Nodes from ``entry``, which is not among them, to ``end``, which is the last of them."""

    entry: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    zeros: frozenset[Zero]
    """What to set to 0 for ``end`` to have the value of ``entry``."""


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
        return self.owner.get_submodule(str(node.target)) if node.op == "call_module" else None

    def rule(self, node: fx.Node) -> Rule | None:
        """The row of an op; None for whatever is no op, or is itself traced."""
        leaf = self.leaf(node)
        if not node.op.startswith("call_") or isinstance(leaf, TracedModule):
            return None
        return rule_for(node, leaf)

    def holds_tensors(self, node: fx.Node) -> bool:
        return any(True for _ in labelled_leaves(self.value(node)))

    def range(self, node: fx.Node) -> tuple[float, float]:
        """Bounds of the numbers in a value, as far as activations set them and pools and concatenations keep them."""
        return self._ranges(node, {})

    def _ranges(self, node: fx.Node, known: dict[fx.Node, tuple[float, float]]) -> tuple[float, float]:
        if node not in known:
            known[node] = -math.inf, math.inf
            rule = self.rule(node)
            inner = [flow._ranges(end, {}) for flow, _, end in self._called(node)]
            if inner:
                known[node] = min(r[0] for r in inner), max(r[1] for r in inner)
            elif rule is not None and isinstance(rule.within, tuple):
                known[node] = rule.within
            elif rule is not None and (rule.movement or rule.within):
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

    # ---- what can be 0

    def zeros_of(self, node: fx.Node) -> frozenset[Zero] | None:
        """What to set to 0 for a value to be 0: the parameters of the last layer that writes it. None where there is
        no such layer."""
        if node.op == "get_attr":
            value = self.value(node)
            learned = isinstance(value, Labelled) and isinstance(value.constant, nn.Parameter)
            return frozenset({Zero(str(node.target))}) if learned else None
        rule = self.rule(node)
        if rule is None:
            return None
        if rule.zeros:
            own = self._own_zeros(node, rule)
            if own is None or rule.linear != "affine":
                return own
            before = self.zeros_of(self.tensors(node)[0])
            return None if before is None else own | before
        if rule.linear in ("product", "writes"):
            read = sorted((n for n in node.all_input_nodes if self.holds_tensors(n)), key=lambda n: n.op != "get_attr")
            return next((found for n in read if (found := self.zeros_of(n)) is not None), None)
        if not rule.movement and rule.linear not in ("first", "quotient"):
            return None
        if node.target is operator.getitem and node.args[1] != 0:
            source = node.args[0]
            if not isinstance(source, fx.Node) or not isinstance(self.value(source), Labelled):
                part_of = self.rule(source) if isinstance(source, fx.Node) else None
                if part_of is None or not part_of.movement:
                    return None  # such as the weights of an attention, which stay
        return _all(self.zeros_of(n) for n in self.tensors(node))

    def _own_zeros(self, node: fx.Node, rule: Rule) -> frozenset[Zero] | None:
        leaf = self.leaf(node)
        if leaf is not None:
            tensors = {name: _tensor(leaf, name) for name in rule.zeros}
            if tensors[rule.zeros[0]] is None or leaf._forward_hooks:
                return None
            settable = {id(t) for t in (*leaf.parameters(), *(leaf.buffers() if rule.linear == "affine" else ()))}
            if any(tensor is not None and id(tensor) not in settable for tensor in tensors.values()):
                return None  # computed from others, or never learned
            return frozenset(Zero(str(node.target), name) for name, tensor in tensors.items() if tensor is not None)
        given = rule.arguments(node)
        arguments = [given.get(name) for name in rule.zeros]
        if arguments[0] is None:
            return None
        return _all(self.zeros_of(a) if isinstance(a, fx.Node) else None for a in arguments if a is not None)

    # ---- blocks

    def blocks(self, end: fx.Node, within: str = "") -> Iterator[Block]:
        """The blocks that end at a node, the smallest first, as far as a container reaches."""
        open_ways: list[tuple[fx.Node, tuple[fx.Node, ...], frozenset[Zero]]] = [(end, (), frozenset())]
        while open_ways:
            node, path, zeros = open_ways.pop()
            if zeros and self._is_identity(node, path):
                nodes = self.region(node, end)
                if nodes is not None and self._read_once(nodes, zeros) and not self._overwrites(nodes, path, node):
                    yield Block(node, end, nodes, zeros)
            if not within or node is end or is_inside(node, within):
                for before, more in reversed(self._back(node)):
                    open_ways.append((before, (*path, node), zeros | more))

    def _back(self, node: fx.Node) -> list[tuple[fx.Node, frozenset[Zero]]]:
        """Values that a value may be equal to, and what has to be 0 for that."""
        rule = self.rule(node)
        if rule is None:
            zeros = self._zeros_inside(node)
            return [] if zeros is None else [(node.all_input_nodes[0], zeros)]
        if rule.linear == "sum":
            operands = [n for n in node.all_input_nodes if self.holds_tensors(n)]
            if len(operands) != 2 or len(node.args) != 2:
                return []
            ways = [(skip, self.zeros_of(branch)) for skip, branch in (operands, operands[::-1])]
            return [(skip, zeros) for skip, zeros in ways if zeros is not None]
        if rule.movement or rule.kind == "idempotent":
            read = self.tensors(node)
            return [(read[0], frozenset())] if len(read) == 1 else []
        return []

    def _called(self, node: fx.Node) -> list[tuple[Flow, fx.Node, fx.Node]]:
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

    def _zeros_inside(self, node: fx.Node) -> frozenset[Zero] | None:
        """What to set to 0 for a traced module that a node calls to hand on what it is given."""
        found = [
            next((block.zeros for block in flow.blocks(end) if block.entry is entry), None)
            for flow, entry, end in self._called(node)
        ]
        inside = _all(found)
        return None if inside is None else frozenset(Zero(f"{node.target}.{z.holder}", z.tensor) for z in inside)

    def _is_identity(self, entry: fx.Node, path: tuple[fx.Node, ...]) -> bool:
        """Whether the ops on the way from ``entry``, whose branches are 0, give what they are given: tried on numbers
        that the value may have. Movements show by themselves, and nothing else on the way can tell one from another."""
        value, result = self.value(entry), self.value(path[0])
        if not isinstance(value, Labelled) or not isinstance(result, Labelled) or value.shape != result.shape:
            return False
        least, greatest = self.range(path[0])
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(value.shape, dtype=torch.float64, generator=generator)
        if least >= 0:
            x = x.abs().clamp(max=greatest)
            x.reshape(-1)[:1] = min(greatest, 100.0)
        env: dict[fx.Node, Any] = {entry: x.clone()}

        def given(node: fx.Node) -> Any:
            known = env[node] if node in env else self.value(node)
            return torch.zeros(known.shape, dtype=torch.float64) if isinstance(known, Labelled) else known

        for node in reversed(path):
            args, kwargs = fx.map_arg((node.args, node.kwargs), given)
            leaf, target = self.leaf(node), node.target
            if isinstance(leaf, TracedModule):
                env[node] = args[0]  # as `_zeros_inside` has seen
            elif leaf is not None:
                if leaf._forward_hooks or leaf._forward_pre_hooks:
                    return False
                env[node] = leaf.forward(*args, **kwargs)
            elif node.op == "call_method":
                env[node] = getattr(args[0], str(target))(*args[1:], **kwargs)
            else:
                assert callable(target)
                env[node] = target(*args, **kwargs)
        last = env[path[0]]
        return isinstance(last, torch.Tensor) and torch.equal(last, x)

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

    def _read_once(self, nodes: tuple[fx.Node, ...], zeros: frozenset[Zero]) -> bool:
        """Whether each tensor that becomes 0 is read by one op: two that read it could never leave 0."""
        readers: dict[int, int] = {}
        for node in nodes:
            leaf = self.leaf(node)
            if leaf is not None:
                for held in {id(t) for t in (*leaf.parameters(), *leaf.buffers())}:
                    readers[held] = readers.get(held, 0) + 1
            elif node.op == "get_attr":
                held = id(_tensor(self.owner, str(node.target)))
                readers[held] = readers.get(held, 0) + sum(user in nodes for user in node.users)
        return all(readers.get(id(_tensor(self.owner, f"{z.holder}.{z.tensor}".rstrip("."))), 0) == 1 for z in zeros)

    def _overwrites(self, nodes: tuple[fx.Node, ...], path: tuple[fx.Node, ...], entry: fx.Node) -> bool:
        """Whether an op besides those on the way changes in place what is handed on."""
        for node in nodes:
            if node in path or not node.op.startswith("call_") or not self._in_place(node):
                continue
            changed = self.tensors(node)[:1]
            while changed and changed[0] not in (*path, entry):
                rule = self.rule(changed[0])
                changed = self.tensors(changed[0])[:1] if rule is not None and rule.movement else []
            if changed:
                return True
        return False

    def _in_place(self, node: fx.Node) -> bool:
        leaf = self.leaf(node)
        if leaf is not None:
            return bool(getattr(leaf, "inplace", False))
        if node.op == "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        rule = self.rule(node)
        if (rule is not None and node.target in rule.in_place) or getattr(node.target, "__name__", "").endswith("_"):
            return True
        try:
            assert callable(node.target)
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
        except (TypeError, ValueError):
            return False
        return bool(given.get("inplace", False))


def _all(zeros: Iterable[frozenset[Zero] | None]) -> frozenset[Zero] | None:
    """What to set to 0 for each of some values to be 0; None where one of them cannot be, or there is none."""
    found = list(zeros)
    known = [z for z in found if z is not None]
    return frozenset[Zero]().union(*known) if found and len(known) == len(found) else None


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    parent, _, own = name.rpartition(".")
    found = getattr(module.get_submodule(parent), own, None)
    return found if isinstance(found, torch.Tensor) else None


def find_block(flow: Flow, end: fx.Node, name: str) -> tuple[str, Block] | None:
    """The block at the end of a container, and the container that is exactly that block: the outermost one that is no
    row of such containers. Its name is empty where there is none, and the smallest block is taken."""
    found = list(flow.blocks(end, name))
    back = flow.before(end)
    within: str | None = name
    while within is not None and found:
        filled = flow.inside(within) & back
        block = next((b for b in found if filled == set(b.nodes) & set(flow.operations)), None)
        chain, parts = _parts(flow, within)
        if block is not None and not _is_row(flow, parts):
            numbered = [n for n in chain if n[-1:].isdigit()]
            like = (numbered or [n for n in chain if n] or [""])[-1 if numbered else 0]
            if like:
                return like, block
        within = next((part for part in parts if end in flow.inside(part)), None)
    return ("", found[0]) if found else None


def block_of(flow: Flow, end: fx.Node, like: str) -> Block | None:
    """The block at ``end`` that is exactly the container ``like``; the smallest one for ``""``."""
    if not like:
        return next(flow.blocks(end), None)
    filled = flow.inside(like) & flow.before(end)
    return next((b for b in flow.blocks(end, like) if filled == set(b.nodes) & set(flow.operations)), None)


def _parts(flow: Flow, name: str) -> tuple[list[str], list[str]]:
    """Containers with the same ops, from ``name`` inwards, and the children of the last that run."""
    chain = [name]
    while True:
        children = [f"{chain[-1]}.{n}".lstrip(".") for n, _ in flow.owner.get_submodule(chain[-1]).named_children()]
        parts = [child for child in children if flow.inside(child)]
        if len(parts) != 1 or flow.inside(parts[0]) != flow.inside(name):
            return chain, parts
        chain.append(parts[0])


def _is_row(flow: Flow, parts: list[str]) -> bool:
    """Whether all of several containers are blocks with parameters of the same shapes."""
    if len(parts) < 2:
        return False
    shapes = [[p.shape for p in flow.owner.get_submodule(part).parameters()] for part in parts]
    if any(other != shapes[0] for other in shapes):
        return False
    ends = [max(flow.inside(part), key=flow.order.__getitem__) for part in parts]
    return all(block_of(flow, end, part) is not None for end, part in zip(ends, parts, strict=True))
