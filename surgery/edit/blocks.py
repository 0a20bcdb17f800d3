"""Finds blocks in a graph: regions that hand their entry on unchanged once a few of their parameters are 0.

A block is a chain of residual sums: each adds a branch to what came in, and the branch ends in a layer whose
parameters, set to 0, make it add nothing. ResNet's blocks, inverted residuals and the layers of Transformers are such,
whatever their classes are called. A copy of a block with these parameters at 0 can be put behind it (LLaMA-Pro, ACL
2024).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgery.axes.labels import Labelled
from surgery.edit.flow import Flow
from surgery.edit.sites import compute, is_inside
from surgery.graph.rule_table import Rule
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


def find_block(flow: Flow, end: fx.Node, name: str) -> tuple[str, Block] | None:
    """The block at the end of a container, and the container that is exactly that block: the outermost one that is not
    a row of such containers. Without one the name is empty and the block is the smallest."""
    found = list(_find_blocks(flow, end, name))
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
        return next(_find_blocks(flow, end), None)
    filled = flow.inside(like) & flow.before(end)
    return next((b for b in _find_blocks(flow, end, like) if filled == set(b.nodes) & set(flow.operations)), None)


def block_between(flow: Flow, entry: fx.Node, end: fx.Node) -> Block | None:
    """The block that makes the one value of the other."""
    return next((block for block in _find_blocks(flow, end) if block.entry is entry), None)


def branch_of(flow: Flow, end: fx.Node, name: str) -> Block | None:
    """At the end of a container, a branch that is added to a skip connection with layers of its own, as a block from
    the skip's value to the sum; its nodes are the branch's. Of two operands that could be either, the branch is the
    one with more layers that contract."""
    node = end
    while (not name or is_inside(node, name)) and (flow.rule(node).movement or flow.rule(node).kind == "idempotent"):
        read = flow.tensors(node)
        if len(read) != 1:
            return None
        node = read[0]
    operands = [n for n in node.all_input_nodes if flow.holds_tensors(n)]
    if flow.rule(node).linear != "sum" or len(operands) != 2 or len(node.args) != 2:
        return None
    if any(name and not is_inside(operand, name) for operand in operands):
        return None
    ways = [flow.before(operand) for operand in operands]
    counts = [sum(bool(flow.rule(n).contracts) for n in way - other) for way, other in (ways, ways[::-1])]
    if counts[0] == counts[1]:
        return None
    branch, skip = operands if counts[0] > counts[1] else operands[::-1]
    zeros, kept = _zeros_of(flow, branch), flow.before(skip)
    nodes = tuple(flow.before(branch) - kept)
    if zeros is None or not _is_identity(flow, skip, (node,)) or not _are_read_once(flow, nodes, zeros):
        return None
    return None if _overwrites(flow, nodes, tuple(kept), skip) else Block(skip, node, nodes, zeros)


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


def _find_blocks(flow: Flow, end: fx.Node, within: str = "") -> Iterator[Block]:
    """The blocks that end at a node, the smallest first, as far as a container reaches."""
    open_ways: list[tuple[fx.Node, tuple[fx.Node, ...], frozenset[Zero]]] = [(end, (), frozenset())]
    while open_ways:
        node, path, zeros = open_ways.pop()
        if zeros and _is_identity(flow, node, path):
            nodes = flow.region(node, end)
            if nodes is not None and _are_read_once(flow, nodes, zeros) and not _overwrites(flow, nodes, path, node):
                yield Block(node, end, nodes, zeros)
        if not within or node is end or is_inside(node, within):
            for before, more in reversed(_step_back(flow, node)):
                open_ways.append((before, (*path, node), zeros | more))


def _step_back(flow: Flow, node: fx.Node) -> list[tuple[fx.Node, frozenset[Zero]]]:
    """Values that a value may be equal to, and what has to be 0 for that."""
    rule = flow.rule(node)
    inside = _zeros_inside(flow, node)
    if inside is not None:
        return [(node.all_input_nodes[0], inside)]
    if rule.linear == "sum":
        operands = [n for n in node.all_input_nodes if flow.holds_tensors(n)]
        if len(operands) != 2 or len(node.args) != 2:
            return []
        ways = [(skip, _zeros_of(flow, branch)) for skip, branch in (operands, operands[::-1])]
        return [(skip, zeros) for skip, zeros in ways if zeros is not None]
    if rule.movement or rule.kind == "idempotent":
        read = flow.tensors(node)
        return [(read[0], frozenset())] if len(read) == 1 else []
    return []


def _zeros_inside(flow: Flow, node: fx.Node) -> frozenset[Zero] | None:
    """What to set to 0 for a traced module that a node calls to hand on what it is given."""
    found = [block_between(inner, entry, end) for inner, entry, end in flow.called(node)]
    inside = _all(None if block is None else block.zeros for block in found)
    return None if inside is None else frozenset(Zero(f"{node.target}.{z.holder}", z.tensor) for z in inside)


def _zeros_of(flow: Flow, node: fx.Node) -> frozenset[Zero] | None:
    """What to set to 0 for a value to be 0: the parameters of the last layer that writes it. None where there is
    no such layer."""
    if node.op == "get_attr":
        value = flow.value(node)
        learned = isinstance(value, Labelled) and isinstance(value.constant, nn.Parameter)
        return frozenset({Zero(str(node.target))}) if learned else None
    rule = flow.rule(node)
    if rule.zeros:
        own = _own_zeros(flow, node, rule)
        if own is None or rule.linear != "affine":
            return own
        before = _zeros_of(flow, flow.tensors(node)[0])
        return None if before is None else own | before
    if rule.linear in ("product", "writes"):
        read = sorted((n for n in node.all_input_nodes if flow.holds_tensors(n)), key=lambda n: n.op != "get_attr")
        return next((found for n in read if (found := _zeros_of(flow, n)) is not None), None)
    if not rule.movement and rule.linear not in ("first", "quotient"):
        return None
    if node.target is operator.getitem and node.args[1] != 0:
        source = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(flow.value(source), Labelled):
            part_of = flow.rule(source) if isinstance(source, fx.Node) else None
            if part_of is None or not part_of.movement:
                return None  # such as the weights of an attention, which stay
    return _all(_zeros_of(flow, n) for n in flow.tensors(node))


def _own_zeros(flow: Flow, node: fx.Node, rule: Rule) -> frozenset[Zero] | None:
    leaf = flow.leaf(node)
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
    return _all(_zeros_of(flow, a) if isinstance(a, fx.Node) else None for a in arguments if a is not None)


def _is_identity(flow: Flow, entry: fx.Node, path: tuple[fx.Node, ...]) -> bool:
    """Whether the ops on the way from ``entry``, whose branches are 0, give what they are given: tried on numbers
    that the value may have. Movements show by themselves, and nothing else on the way can tell one from another."""
    value, result = flow.value(entry), flow.value(path[0])
    if not isinstance(value, Labelled) or not isinstance(result, Labelled) or value.shape != result.shape:
        return False
    least, greatest = flow.range(path[0])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(value.shape, dtype=torch.float64, generator=generator)
    if least >= 0:
        x = x.abs().clamp(max=greatest)
        x.reshape(-1)[:1] = min(greatest, 100.0)
    env: dict[fx.Node, Any] = {entry: x.clone()}

    def given(node: fx.Node) -> Any:
        known = env[node] if node in env else flow.value(node)
        return torch.zeros(known.shape, dtype=torch.float64) if isinstance(known, Labelled) else known

    for node in reversed(path):
        args, kwargs = fx.map_arg((node.args, node.kwargs), given)
        leaf = flow.leaf(node)
        if isinstance(leaf, TracedModule):
            env[node] = args[0]  # as `_zeros_inside` has seen
        elif leaf is not None and (leaf._forward_hooks or leaf._forward_pre_hooks):
            return False
        else:
            env[node] = compute(flow.owner, node, args, kwargs)
    last = env[path[0]]
    return isinstance(last, torch.Tensor) and torch.equal(last, x)


def _are_read_once(flow: Flow, nodes: tuple[fx.Node, ...], zeros: frozenset[Zero]) -> bool:
    """Whether each tensor that becomes 0 is read by one op: two that read it could never leave 0."""
    readers: dict[int, int] = {}
    for node in nodes:
        leaf = flow.leaf(node)
        if leaf is not None:
            for held in {id(t) for t in (*leaf.parameters(), *leaf.buffers())}:
                readers[held] = readers.get(held, 0) + 1
        elif node.op == "get_attr":
            held = id(_tensor(flow.owner, str(node.target)))
            readers[held] = readers.get(held, 0) + sum(user in nodes for user in node.users)
    return all(readers.get(id(_tensor(flow.owner, f"{z.holder}.{z.tensor}".rstrip("."))), 0) == 1 for z in zeros)


def _overwrites(flow: Flow, nodes: tuple[fx.Node, ...], path: tuple[fx.Node, ...], entry: fx.Node) -> bool:
    """Whether an op that is not on the way changes in place what is handed on."""
    for node in nodes:
        if node in path or not node.op.startswith("call_") or not _works_in_place(flow, node):
            continue
        changed = flow.tensors(node)[:1]
        while changed and changed[0] not in (*path, entry):
            rule = flow.rule(changed[0])
            changed = flow.tensors(changed[0])[:1] if rule.movement else []
        if changed:
            return True
    return False


def _works_in_place(flow: Flow, node: fx.Node) -> bool:
    leaf = flow.leaf(node)
    if leaf is not None:
        return bool(getattr(leaf, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    rule = flow.rule(node)
    if node.target in rule.in_place or getattr(node.target, "__name__", "").endswith("_"):
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
