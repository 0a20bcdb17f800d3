"""Makes the graphs of an edited module agree with its new tensors.

For each node whose channels change, its constants follow by the rule table. Then, for an op that only moves data,
the movement is run on the new labels. Where it does not give the layout that the edit asks for (a ``chunk`` whose
halves are no longer equal, a shuffle of channels that no longer form a rectangle), the node becomes a selection from
the nearest value it can be selected from, and that it can be is checked on the old graph.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.axes.analysis import Analysis
from surgery.axes.labels import Field, Ids, Labelled
from surgery.axes.ledger import Silent
from surgery.axes.ledger import labelled_leaves as _labelled
from surgery.axes.ops import Op
from surgery.edit.edited_graph import EditedGraph
from surgery.edit.layout import Layout, Layouts
from surgery.edit.selection import find_selection, first_input
from surgery.edit.sites import add_constant
from surgery.edit.sizes import pin_size
from surgery.errors import EditError
from surgery.graph.outputs import Rebuild
from surgery.graph.rule_table import NodeEdit
from surgery.graph.tracing import TracedModule


def rewire(old: nn.Module, new: nn.Module, analysis: Analysis, layouts: Layouts) -> None:
    """Adapt every graph of ``new``, a copy of ``old`` whose tensors have been gathered already."""
    for scope, (path, graph) in analysis.graphs.items():
        source, target = old.get_submodule(path), new.get_submodule(path)
        assert isinstance(source, TracedModule)
        assert isinstance(target, TracedModule)
        copy = target.graphs[source.graphs.index(graph)]
        _Rewiring(source, target, graph, copy, scope, path, analysis, layouts).run()
        target.recompile()


class _Rewiring(EditedGraph):
    """Makes the copy of one graph do what the edit asks for."""

    def run(self) -> None:
        self.edited_layers = {
            name.rpartition(".")[0]
            for (name, _), units in self.analysis.axis_units.items()
            if self.layouts.of(units) is not None
        }
        self.stale: set[fx.Node] = set()  # nodes that cannot be as asked; what reads them selects from before them
        self.failed: dict[fx.Node, EditError] = {}  # and why, of those whose new value would be another
        replaced = False
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or isinstance(node.target, Rebuild):
                self.refuse_stale(node)
                continue
            out = self.record(node)
            if not any(True for _ in _labelled(out)):
                pin_size(self, node, out)
                continue
            if not self.is_concerned(node, out):
                continue
            fits = node.args[0] not in self.stale if self.takes_piece(node) else self.adapt(node, out)
            empty = isinstance(out, Labelled) and not out.value.numel() and self.is_movement(node)
            if fits or empty or (isinstance(out, Labelled) and self.reorder(node, out)):
                continue
            if isinstance(out, Labelled) and all(len(f.dims) == 1 for f in out.fields):
                try:
                    self.select(node, out)
                    replaced = True
                    continue
                except EditError as error:
                    if not self.is_movement(node):
                        raise
                    self.failed[node] = error
            self.stale.add(node)
        if replaced:
            self.sweep()
        for node, why in self.failed.items():
            if self.new[node.name].users:
                raise why
        for node in reversed(self.copy.nodes):
            if "path" not in node.meta and node.users:  # a new node is where its reader is
                node.meta["path"] = next(iter(node.users)).meta.get("path", "")
        self.copy.lint()

    def refuse_stale(self, node: fx.Node) -> None:
        """What hands values on cannot take instead what they are selected from."""
        late = next((n for n in node.all_input_nodes if n in self.stale), None)
        if late is not None:
            raise EditError(f"{_where(late)} cannot follow the edit: its parts would be of other sizes")

    def is_concerned(self, node: fx.Node, out: Any) -> bool:
        if any(self.layouts.changes(leaf) for leaf in _labelled((out, [self.record(n) for n in node.all_input_nodes]))):
            return True
        return node.op == "call_module" and f"{self.path}.{node.target}".lstrip(".") in self.edited_layers

    def takes_piece(self, node: fx.Node) -> bool:
        """Whether a node takes a value out of a container, or out of an object that holds several."""
        pieces = node.target in (operator.getitem, getattr)
        return pieces and not isinstance(self.record(node.args[0]), Labelled)  # type: ignore[arg-type]

    # ---- labels before and after

    def is_rectangular(self, value: Labelled) -> bool:
        return all((layout := self.layouts.along(f)) is None or layout.shape is not None for f in value.fields)

    def edit_labels(self, value: Any, bases: Mapping[Field, int] | None = None) -> Any:
        """The value as the edit asks for it: new shape and, as ids, new units or, from ``bases``, old positions."""
        if not isinstance(value, Labelled):
            return value
        fields = []
        for f in value.fields:
            layout = self.layouts.along(f)
            if bases is not None:
                old = _positions(f, bases)
                ids = old if layout is None else old.ravel()[layout.old].reshape(layout.units.shape)
            else:
                ids = self.layouts.renumber(self.analysis.unit_of[f.ids]) if layout is None else layout.units
            fields.append(Field(f.dims, ids))
        return Labelled(torch.empty(self.layouts.shape(value), device="meta"), tuple(fields), value.constant)

    # ---- following the edit

    def adapt(self, node: fx.Node, out: Any) -> bool:
        """Let constants follow; whether the node then does what the edit asks of it."""
        leaf, rule = self.leaf(node), self.rule(node)
        if isinstance(leaf, TracedModule):
            return True
        outs = list(_labelled(out))
        inputs = [self.record(a) if isinstance(a, fx.Node) else a for a in node.args]
        new = self.new[node.name]
        if self.stale & set(node.all_input_nodes) or not all(self.is_rectangular(v) for v in _labelled((outs, inputs))):
            if not rule.movement:
                why = f"{_where(node)} cannot follow the edit: its channels would not fill a rectangle"
                raise next((self.failed[n] for n in node.all_input_nodes if n in self.failed), EditError(why))
            return False
        if rule.rewrite is not None and outs:
            changed = {d for o in outs for f in o.fields if self.layouts.along(f) is not None for d in f.dims}
            rule.rewrite(
                NodeEdit(
                    new,
                    None if leaf is None else self.target.get_submodule(str(node.target)),
                    tuple(self.layouts.shape(o) for o in outs),
                    tuple(o.shape for o in outs),
                    frozenset(changed),
                    tuple(self.layouts.shape(v) if isinstance(v, Labelled) else None for v in inputs),
                    self.find_sizes(new),
                    self.copies(outs[0]),
                    self.tensors(new),
                    self.read_copies(new),
                    self.sources(outs[0]),
                )
            )
        moved = self.try_movement(node, out) if rule.movement else []
        return moved is not None and all(np.array_equal(got, asked) for got, asked in moved)

    def find_sizes(self, new: fx.Node) -> dict[fx.Node, tuple[int, ...]]:
        """Values of the shapes that a new node reads."""
        found: dict[fx.Node, tuple[int, ...]] = {}
        for n in new.all_input_nodes:
            value = self.record(self.old_of[n]) if n in self.old_of else n.args[0] if n.target is torch.Size else None
            if isinstance(value, tuple) and not any(isinstance(v, Labelled) for v in value):
                found[n] = value
        return found

    def copies(self, value: Labelled) -> dict[int, int]:
        """For each dim of the value how often each of its channels is there after the edit, where equally often."""
        found = {}
        for f in value.fields:
            counts = np.unique(self.layouts.copies[self.analysis.unit_of[f.ids]])
            counts = counts[counts > 0]
            if len(f.dims) == 1 and len(counts) == 1:
                found[f.dims[0]] = int(counts[0])
        return found

    def tensors(self, new: fx.Node) -> dict[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Old and new shapes of the tensors that a new node reads."""
        values = {n: self.record(self.old_of[n]) for n in new.all_input_nodes if n in self.old_of}
        return {n: (v.shape, self.layouts.shape(v)) for n, v in values.items() if isinstance(v, Labelled)}

    def sources(self, value: Labelled) -> dict[int, Ids]:
        """For each changed dim of the value that alone holds its channels, the old positions that new ones copy."""
        layouts = ((f, self.layouts.along(f)) for f in value.fields if len(f.dims) == 1)
        return {f.dims[0]: layout.old for f, layout in layouts if layout is not None}

    def read_copies(self, new: fx.Node) -> dict[fx.Node, dict[int, int]]:
        """As `copies`, of the tensors that a new node reads."""
        values = {n: self.record(self.old_of[n]) for n in new.all_input_nodes if n in self.old_of}
        return {n: self.copies(v) for n, v in values.items() if isinstance(v, Labelled)}

    def reorder(self, node: fx.Node, out: Labelled) -> bool:
        """Let the node run as it is and put its result in order, if all that is asked for is in it."""
        if self.stale & set(node.all_input_nodes) or self.takes_piece(node):
            return False
        if not all(self.is_rectangular(v) for v in _labelled((out, [self.record(n) for n in node.all_input_nodes]))):
            return False
        moved = self.try_movement(node, out)
        changed = [f for f in out.fields if self.layouts.along(f) is not None]
        if moved is None or len(changed) != 1 or len(changed[0].dims) != 1:
            return False
        (got, asked) = next(m for m, f in zip(moved, out.fields, strict=True) if f is changed[0])
        if got.shape != asked.shape or got.ndim != 2:
            return False
        have, want = (np.lexsort(pairs.T[::-1]) for pairs in (got, asked))
        if not np.array_equal(got[have], asked[want]):
            return False
        index = np.empty_like(have)
        index[want] = have
        new = self.new[node.name]
        users = list(new.users)
        with self.copy.inserting_after(new):
            constant = self.constant(index)
        with self.copy.inserting_after(constant):
            selected = self.copy.call_function(torch.index_select, (new, changed[0].dims[0], constant))
        for user in users:
            user.replace_input_with(new, selected)
        selected.meta["path"] = new.meta.get("path", "")
        self.new[node.name] = selected
        self.old_of[selected] = node
        return True

    def try_movement(self, node: fx.Node, out: Any) -> list[tuple[Ids, Ids]] | None:
        """For each field of the outputs what the op does to the new inputs, and what is asked of it.

        Both as pairs along the last axis: the old position that a new one copies, and its new unit. None where the op
        cannot be run on the new inputs.
        """
        new = self.new[node.name]
        before: Any = fx.map_arg((node.args, node.kwargs), self.record)
        after: Any = fx.map_arg(
            (new.args, new.kwargs), lambda n: self.record(self.old_of[n]) if n in self.old_of else None
        )
        inputs = dict.fromkeys(f for value in _labelled((before, after)) for f in value.fields)
        bases = dict(zip(inputs, itertools.accumulate((f.ids.size for f in inputs), initial=0), strict=False))
        asked = pytree.tree_map(self.edit_labels, out)
        shapes = (_first_shape(before), _first_shape(out))
        gone = self.analysis.merged.get((self.scope, node.name), frozenset())
        runs = (
            (Silent(shapes, places=True, gone=gone), before, out, lambda v: _number(v, bases)),
            (Silent(shapes, places=True, gone=gone), after, asked, lambda v: self.edit_labels(v, bases)),
            (Silent(shapes, gone=gone), after, asked, self.edit_labels),
        )
        results: list[list[Any]] = []
        for ledger, given, result, labels in runs:
            args, kwargs = pytree.tree_map_only(Labelled, labels, given)
            try:
                fields = self.rule(node).relate(
                    Op(ledger, node, self.leaf(node), "", ("", ""), result), *args, **kwargs
                )
            except (ValueError, IndexError):  # the new sizes do not fit the op
                return None
            results.append([fields] if isinstance(result, Labelled) else [f for f in fields if f is not None])
        pairs = []
        for was, wanted, *got in zip(_labelled(out), _labelled(asked), *results, strict=True):
            for f, g in zip(was.fields, wanted.fields, strict=True):
                found = [next((r for r in fields if set(f.dims) <= set(r.dims)), None) for fields in got]
                content, place, unit = found
                if content is None or place is None or unit is None:
                    return None
                layout = self.layouts.along(f)
                source = content.ids if layout is None else _take(content, f, layout)
                if source.shape != place.ids.shape or place.ids.shape != unit.ids.shape:
                    return None
                holds = np.where(unit.ids < 0, unit.ids, _spread(g, unit))
                pairs.append((np.stack([place.ids, unit.ids], -1), np.stack([source, holds], -1)))
        return pairs

    # ---- selecting instead

    def select(self, node: fx.Node, out: Labelled) -> None:
        """Replace a node by positions selected from the nearest value before it that holds them."""
        changed = [f for f in out.fields if self.layouts.along(f) is not None]
        if len(changed) != 1 or len(changed[0].dims) != 1:
            raise EditError(f"{_where(node)} cannot follow the edit")
        asked = changed[0]
        chain = [node]
        while True:
            parent = first_input(chain[-1])
            if not isinstance(parent, fx.Node):
                raise EditError(f"{_where(node)} cannot follow the edit: it is not a selection of what it reads")
            value = self.record(parent)
            found = None
            if isinstance(value, Labelled) and parent not in self.stale:
                found = find_selection(self.source, self.record, chain, value, asked)
            if found is not None:
                break
            if self.takes_piece(chain[-1]) or self.is_movement(parent):
                chain.append(parent)
                continue
            raise EditError(f"{_where(node)} cannot follow the edit: it is not a selection of what it reads")
        index = self.positions(found.held, asked, found.places)
        new, read = self.new[node.name], self.new[parent.name]
        with self.copy.inserting_before(new):
            if found.order != tuple(range(len(found.order))):
                read = self.copy.call_function(torch.permute, (read, found.order))
            dim = found.order.index(found.held.dims[0])
            if read is self.new[parent.name] and (np.diff(index) == 1).all():
                selected = self.copy.call_function(torch.narrow, (read, dim, int(index[0]), len(index)))
            else:
                constant = self.constant(index)
                selected = self.copy.call_function(torch.index_select, (read, dim, constant))
            if found.then is not None:
                selected = self.copy.call_function(operator.getitem, (selected, found.then))
        selected.meta["path"] = new.meta.get("path", "")
        new.replace_all_uses_with(selected)
        self.new[node.name] = selected
        self.old_of[selected] = node

    def is_movement(self, node: fx.Node) -> bool:
        return node.op.startswith("call") and self.rule(node).movement

    def positions(self, held: Field, asked: Field, places: Ids) -> Ids:
        """For each position asked for, the position in the new layout of the axis that holds it."""
        have, want = self.layouts.along(held), self.layouts.along(asked)
        assert have is not None
        assert want is not None
        stride = len(self.layouts.source)
        keys = have.old * stride + have.unit
        order = np.argsort(keys)
        wanted = places[want.old] * stride + want.unit
        at = order[np.searchsorted(keys, wanted, sorter=order)]
        assert np.array_equal(keys[at], wanted)
        return at

    def constant(self, positions: Ids) -> fx.Node:
        like = next(itertools.chain(self.target.parameters(), self.target.buffers()), None)
        value = torch.from_numpy(positions).to(None if like is None else like.device)
        return add_constant(self.target, self.copy, "positions", value)

    def sweep(self) -> None:
        """Erase what selections left without a reader."""
        for node in reversed(self.copy.nodes):
            if node.users or node.op not in ("call_function", "call_method", "get_attr", "call_module"):
                continue
            old = self.analysis.values.get((self.scope, node.name))
            if node.op == "get_attr" or not any(True for _ in _labelled(old)) or self.rule(node).movement:
                self.copy.erase_node(node)


def _first_shape(tree: Any) -> tuple[int, ...]:
    return next(iter(_labelled(tree))).shape


def _positions(f: Field, bases: Mapping[Field, int]) -> Ids:
    return (np.arange(f.ids.size) + bases[f]).reshape(f.ids.shape)


def _number(value: Labelled, bases: Mapping[Field, int]) -> Labelled:
    """The value with a number of its own for each position."""
    return Labelled(value.value, tuple(Field(f.dims, _positions(f, bases)) for f in value.fields), value.constant)


def _take(before: Field, f: Field, layout: Layout) -> Ids:
    """What was at the positions that ``layout`` of ``f`` copies, along ``f``'s dims of ``before``."""
    assert layout.shape is not None
    at = [before.dims.index(d) for d in f.dims]
    front = np.moveaxis(before.ids, at, range(len(at)))
    rest = front.shape[len(at) :]
    taken = front.reshape(-1, *rest)[layout.old].reshape(*layout.shape, *rest)
    return np.moveaxis(taken, range(len(at)), at)


def _spread(f: Field, shape: Field) -> Ids:
    """Ids of ``f`` repeated along the dims that only ``shape`` has."""
    sizes = [shape.ids.shape[k] if d in f.dims else 1 for k, d in enumerate(shape.dims)]
    if math.prod(sizes) != f.ids.size:
        return np.full(shape.ids.shape, -2)
    return np.broadcast_to(f.ids.reshape(sizes), shape.ids.shape)


def _where(node: fx.Node) -> str:
    line = (node.stack_trace or "").strip().splitlines()
    return f"{node.name} ({getattr(node.target, '__name__', node.target)}{', ' + line[-1].strip() if line else ''})"
