"""`InsertDense`: one more layer at the end of a dense block (Huang et al., CVPR 2017).

A dense block is found from the graph: it ends in a concatenation whose last part is computed from the concatenation of
the others.

Two gathers make what it takes. In one the channels of the last layer are copied with a share of 0: what reads the
block then has columns for a further layer's channels, and they are 0. In the other as many of the last channels that
the last layer reads are copied: there it reads as many as its copy has to, which is taken from it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.groups import DimensionGroup
from surgery.axes.labels import Ids, Labelled, runs
from surgery.edit.flow import Flow
from surgery.edit.insert_block import rename
from surgery.edit.layout import Layouts
from surgery.edit.reindex import Reindex, gather, gathered_origins
from surgery.edit.sites import Site, is_inside, local_name, op_of, output_sites, place_for
from surgery.edit.step import Inserted, Origin, Step
from surgery.errors import EditError
from surgery.graph.traced import TracedModule, named_tensors, traced_parts


@dataclass(frozen=True)
class InsertDense(Step):
    """Insert one more layer at the end of a dense block, a copy of its last one. Whatever reads the block reads the new
    channels with weights of 0.

    Attributes:
        after: qualified name of the container at whose end the dense block is.
        name: qualified name of the new layer.
        like: qualified name of the container that is the block's last layer; empty where none is.
    """

    after: str
    name: str
    like: str

    def apply(self, module: nn.Module) -> nn.Module:
        """See `Step.apply`."""
        analysis = analyse(module)
        edit = self._edit(module, analysis)
        result = gather(module, analysis, edit.readers)
        _insert_layer(self, edit, result, gather(module, analysis, edit.wider))
        return result

    def origins(self, module: nn.Module) -> dict[str, Origin]:
        """See `Step.origins`."""
        analysis = analyse(module)
        edit = self._edit(module, analysis)
        kept = {name for name, tensor in named_tensors(module).items() if id(tensor) in edit.kept}
        found = gathered_origins(module, analysis, edit.readers)
        return {name: origin for name, origin in found.items() if name not in kept}

    def inserted(self) -> tuple[Inserted, ...]:
        """See `Step.inserted`."""
        return (Inserted(self.name, self.after, self.like),)

    def describe(self) -> str:
        """See `Step.describe`."""
        what = f", a copy of {self.like!r}" if self.like else ""
        return f"InsertDense: layer {self.name!r}{what}, at the end of the dense block {self.after!r}"

    def _edit(self, module: nn.Module, analysis: Analysis) -> DenseEdit:
        edit = dense_edit(module, analysis, self.after)
        if edit is None or edit.like != self.like:
            raise EditError(f"{self.after!r} does not end in a dense block whose last layer is {self.like!r}")
        return edit


@dataclass(frozen=True, eq=False)
class Layer:
    """The last layer of a dense block, in one graph."""

    site: Site
    """Where the block's output is: the concatenation of ``parts`` along ``dim``."""
    parts: tuple[fx.Node, ...]
    dim: int
    entry: fx.Node
    """The concatenation, in any order, of all parts but ``end``, which the layer reads."""
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    """From ``entry``, which is not among them, to ``end``."""


@dataclass(frozen=True, eq=False)
class DenseEdit:
    """What it takes to put a layer behind the last one of a dense block."""

    layers: tuple[Layer, ...]
    like: str
    """The container that is the last layer; empty where none is."""
    kept: frozenset[int]
    """Ids of the last layer's own tensors, which stay as they are."""
    readers: Reindex
    """Gives what reads the block the channels of a further layer."""
    wider: Reindex
    """Lets the last layer read as many channels as its copy has to."""


def dense_edit(module: nn.Module, analysis: Analysis, after: str) -> DenseEdit | None:
    """How the dense block at the end of the container ``after`` gets one more layer; None where there is none.

    Raises:
        EditError: what reads the block cannot ignore further channels, or its last layer cannot read any.
    """
    where = f"the dense block at the end of {after!r}"
    sites = list(output_sites(module, after))
    flows = [Flow(analysis, site) for site in sites]
    found = [_last_layer(site, flow) for site, flow in zip(sites, flows, strict=True)]
    layers = tuple(layer for layer in found if layer is not None)
    if len(layers) < len(found):
        return None
    ways = [
        (_container(layer, flow, local_name(after, flow.path)), *_reindexes(analysis, layer, flow, where))
        for layer, flow in zip(layers, flows, strict=True)
    ]
    if any(way != ways[0] for way in ways):
        raise EditError(f"{where} ends in another layer in training than in evaluation")
    own = {node for layer in layers for node in layer.nodes}
    graphs = [(owner, graph) for _, owner in traced_parts(module) for graph in owner.graphs]
    kept = {id(tensor) for layer in layers for tensor in _tensors(layer.site.owner, layer.nodes)}
    if any(id(t) in kept for owner, graph in graphs for t in _tensors(owner, (n for n in graph.nodes if n not in own))):
        raise EditError(f"{where} shares weights of its last layer with others")
    return DenseEdit(layers, ways[0][0], frozenset(kept), *ways[0][1:])


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def _last_layer(site: Site, flow: Flow) -> Layer | None:
    parts, dim = _find_parts(site.owner, site.node)
    joined = {
        node: own for node in flow.order for own, along in [_find_parts(site.owner, node)] if own and along == dim
    }
    for end in reversed(parts):
        rest = [part for part in parts if part is not end]
        if not rest or len(rest) < len(parts) - 1 or set(end.users) != {site.node}:
            continue
        entries = [node for node, own in joined.items() if len(own) == len(rest) and set(own) == set(rest)]
        for entry in (*entries, *(rest if len(rest) == 1 else ())):
            nodes = flow.region(entry, end)
            if nodes is not None and any(isinstance(t, nn.Parameter) for t in _tensors(site.owner, nodes)):
                return Layer(site, tuple(parts), dim, entry, end, nodes)
    return None


def _find_parts(owner: TracedModule, node: fx.Node) -> tuple[list[fx.Node], int]:
    """The parts of a concatenation, none for any other op, and its dim."""
    rule = op_of(owner, node)
    if rule.kind != "concatenation":
        return [], 0
    named = rule.arguments(node)
    parts, dim = next(iter(named.values())), named.get("dim", named.get("axis", 0))
    if isinstance(dim, int) and isinstance(parts, (list, tuple)):
        return [part for part in parts if isinstance(part, fx.Node)], dim
    return [], 0


def _find_held(owner: nn.Module, node: fx.Node) -> nn.Module | torch.Tensor | None:
    """The layer that a node calls, or the tensor that it reads; None for any other node, such as one of a flag."""
    if node.op not in ("call_module", "get_attr"):
        return None
    found = operator.attrgetter(str(node.target))(owner)
    return found if isinstance(found, (nn.Module, torch.Tensor)) else None


def _tensors(owner: nn.Module, nodes: Iterable[fx.Node]) -> Iterator[torch.Tensor]:
    """What is read by the layers of some nodes, or by the nodes themselves."""
    for node in nodes:
        held = _find_held(owner, node)
        if isinstance(held, torch.Tensor):
            yield held
        elif held is not None and not isinstance(held, TracedModule):
            yield from (*held.parameters(), *held.buffers())


def _container(layer: Layer, flow: Flow, stage: str) -> str:
    """The outermost container in ``stage`` that runs nothing but the layer, and its own concatenations."""
    read = [n for n in layer.nodes if _find_held(flow.owner, n) is not None]
    paths = [str(n.target).split(".")[: -1 if n.op == "get_attr" else None] for n in read]
    common = [names[0] for names in zip(*paths, strict=False)]
    while any(names[: len(common)] != common for names in paths):
        common.pop()
    own = {*layer.nodes, layer.site.node}
    if layer.entry not in layer.parts and set(layer.entry.users) <= own:
        own.add(layer.entry)
    found = ""
    while common:
        name = ".".join(common)
        if (stage and not name.startswith(f"{stage}.")) or not flow.inside(name) <= own:
            break
        found = f"{flow.path}.{name}".lstrip(".")
        common.pop()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Channels


def _reindexes(analysis: Analysis, layer: Layer, flow: Flow, where: str) -> tuple[Reindex, Reindex]:
    """The edits that copy the layer's channels for what reads the block, and the last channels that the layer reads."""
    whole, read, written = (
        _units(analysis, flow.value(node), layer.dim) for node in (layer.site.node, layer.entry, layer.end)
    )
    if whole is None or read is None or written is None:
        raise EditError(f"{where} joins what holds no channels")
    if len(np.unique([*read, *written])) < len(np.unique(read)) + len(written):
        raise EditError(f"{where} has layers whose channels are tied to each other")
    start, run = runs(read, analysis.fence)
    last = np.resize(read[start[run == run[-1]]], len(written))
    behind = int(np.flatnonzero(whole == written[-1])[-1]) + 1
    problem = f"what reads {where} cannot ignore further channels"
    readers = _copy_units(analysis, written, {len(written): written, behind: whole}, problem)
    wider = _copy_units(analysis, last, {len(read): read}, f"the last layer of {where} cannot read further channels")
    shares = {g.name: (*[1.0] * g.units, *[0.0] * (len(index) - g.units)) for g, index in readers.items()}
    return Reindex({g.name: index for g, index in readers.items()}, shares), Reindex(
        {g.name: index for g, index in wider.items()}
    )


def _units(analysis: Analysis, value: Any, dim: int) -> Ids | None:
    field = value.at(dim) if isinstance(value, Labelled) else None
    return None if field is None or len(field.dims) > 1 else analysis.unit_of[field.ids]


def _copy_units(
    analysis: Analysis, units: Ids, places: Mapping[int, Ids], problem: str
) -> dict[DimensionGroup, tuple[int, ...]]:
    """For each group the index that copies ``units``; the copies have to lie at those positions of some axes."""
    indices: dict[DimensionGroup, tuple[int, ...]] = {}
    for group in analysis.groups:
        own = units[(units >= group.start) & (units < group.start + group.units)] - group.start
        if len(own) == 0:
            continue
        both = [f"{member} is both written and read" for member in group.members if member.role == "both"]
        mixed = [f"{what} normalises over them" for what in group.mixed]
        reasons = [group.reason] if group.frozen[own].any() else [*mixed, *group.single, *both]
        if reasons:
            raise EditError(f"{problem}: {'; '.join(reasons)}")
        indices[group] = (*range(group.units), *sorted(map(int, own)))
    layouts = Layouts(analysis, indices, {})
    for at, axis in places.items():
        layout = layouts.of(axis)
        if layout is None or list(np.delete(layout.old, np.s_[at : at + len(units)])) != list(range(len(axis))):
            raise EditError(f"{problem}: these would lie between others")
    return indices


# ---------------------------------------------------------------------------------------------------------------------
# Inserting


def _insert_layer(step: InsertDense, edit: DenseEdit, result: nn.Module, wider: nn.Module) -> None:
    """Put the new layer into ``result``.

    Args:
        step: what names the layer.
        edit: what it takes, found in the module before the step.
        result: that module after ``edit.readers``; its last layer becomes again what it was.
        wider: that module after ``edit.wider``, from which the new layer is taken.
    """
    container, child = place_for(result, step.name)
    new = wider.get_submodule(step.like) if step.like else nn.Module().train(container.training)
    container.add_module(child, new)
    memo: dict[int, Any] = {}
    for layer in edit.layers:
        owner, path = layer.site.owner, layer.site.path
        for node in layer.nodes:
            held = _find_held(owner, node)
            if held is not None:
                _put(result.get_submodule(path), str(node.target), copy.deepcopy(held, memo))
                if not step.like:
                    taken = operator.attrgetter(str(node.target))(wider.get_submodule(path))
                    _put(new, str(node.target).replace(".", "_"), taken)
    for parameter in new.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for layer in edit.layers:
        _insert(layer, step, result, wider)


def _put(root: nn.Module, name: str, held: nn.Module | torch.Tensor) -> None:
    parent, _, own = name.rpartition(".")
    holder = root.get_submodule(parent)
    if isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter) and not hasattr(holder, own):
        holder.register_buffer(own, held)
    else:
        setattr(holder, own, held)


def _insert(layer: Layer, step: InsertDense, result: nn.Module, wider: nn.Module) -> None:
    site = layer.site
    (owner, graph), (_, source) = (_counterpart(site, root) for root in (result, wider))
    like, name = (local_name(whole, site.path) for whole in (step.like, step.name))
    known = {node.name for node in site.graph.nodes}
    ours, theirs = ({node.name: node for node in g.nodes if node.name in known} for g in (graph, source))

    def found(node: fx.Node, nodes: Mapping[str, fx.Node] = ours) -> fx.Node:
        if node.name not in nodes:
            raise EditError(f"{node.name}, at the end of {step.after!r}, cannot follow the edit")
        return nodes[node.name]

    def path(node: fx.Node) -> str:
        where = str(node.meta.get("path", ""))
        return name + where[len(like) :] if like and f"{where}.".startswith(f"{like}.") else name

    for node in layer.nodes:  # the last layer, as it was
        twin = found(node)
        twin.op, twin.target = node.op, node.target
        twin.args, twin.kwargs = fx.map_arg((node.args, node.kwargs), found)
    cat, end, parts = found(site.node), found(layer.end), [found(part) for part in layer.parts]
    with graph.inserting_before(cat):
        read = [layer.entry] if layer.entry in layer.parts else _find_parts(layer.site.owner, layer.entry)[0]
        new = graph.call_function(torch.cat, ([*map(found, read), end], layer.dim))
        new.meta["path"] = path(layer.entry)
        copies = {found(layer.entry, theirs): new}
        for node in layer.nodes:
            twin = found(node, theirs)
            new = copies[twin] = graph.node_copy(twin, lambda n: copies[n] if n in copies else found(n))
            new.meta["path"] = path(node)
            flag = node.op == "get_attr" and like and str(node.target).startswith(f"{like}.")
            if flag or _find_held(site.owner, node) is not None:
                new.target = local_name(rename(site, str(node.target), step.like, step.name), site.path)
    at = parts.index(end) + 1
    cat.args, cat.kwargs = ([*parts[:at], new, *parts[at:]], layer.dim), {}
    if like and is_inside(site.node, like):
        cat.meta["path"] = path(site.node)
    for node in reversed(graph.nodes):
        if not node.users and node.name not in known:
            graph.erase_node(node)  # what the last layer had between its ops
    graph.lint()
    owner.recompile()


def _counterpart(site: Site, root: nn.Module) -> tuple[TracedModule, fx.Graph]:
    """What stands in an edited copy of the model for the graph of a site, and its owner."""
    owner = root.get_submodule(site.path)
    assert isinstance(owner, TracedModule)
    return owner, owner.graphs[site.owner.graphs.index(site.graph)]
