"""The words that a rule has to say how the axes of an op relate.

A rule is a function that takes the op and the op's own arguments, and returns the `Field`s of its output. On the way it
may tie channels together (`Op.tie`), freeze them (`Op.freeze`), or say what becomes of a parameter's axis
(`Op.produces`, `Op.consumes`, `Op.per_channel`). An op without a rule freezes every axis that reaches it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from surgery.axes.labels import Field, Fields, Labelled, Pairing, move_field, reshape_fields
from surgery.axes.ledger import Grid, Norm

if TYPE_CHECKING:
    from surgery.axes.ledger import Ledger


class Op:
    """One op in a graph, as a rule sees it: its output's shape, and the words to say how its axes relate.

    A rule is called with the op and the op's arguments, in which each tensor is a `Labelled`: a shape, and a `Field` of
    channels along each axis that holds any. It returns the fields of the output, or a list of them for several.

    Attributes:
        module: the layer that is called; None for a function or method.
        node: the node of the graph.
        out: the output's tree, with a `Labelled` for each tensor.
        name: of the op, for messages.
    """

    def __init__(
        self, ledger: Ledger, node: fx.Node, module: nn.Module | None, path: str, key: tuple[str, str], out: Any
    ) -> None:
        self._ledger = ledger
        self.node = node
        self.module: Any = module
        self.path = path
        self.key = ("node", *key)
        self.out = out
        self.name = path or getattr(node.target, "__name__", str(node.target))
        self.claimed: set[tuple[str, int]] = set()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output, or of its first tensor."""
        first: Labelled = next(leaf for leaf in pytree.tree_leaves(self.out) if isinstance(leaf, Labelled))
        return first.shape

    @property
    def trial(self) -> bool:
        """Whether only the output's labels are wanted: an op that moves data is tried on others."""
        return self._ledger.whole

    @property
    def in_graph(self) -> bool:
        """Whether the op is a node of a graph; otherwise Python calls it, and its arguments stay as they are."""
        return self.key[1] in self._ledger.findings.graphs

    def setting(self, name: str, given: Any = None) -> Any:
        """The layer's attribute of that name; for a function ``given``, its argument."""
        return given if self.module is None else getattr(self.module, name)

    def param(self, name: str, given: Labelled | None = None, *, dims: int = 2) -> Labelled | None:
        """The layer's parameter or buffer, its first ``dims`` axes labelled (those after two are kernels); for a
        function ``given``, its argument."""
        if self.module is None:
            return None if given is None else self._ledger.parameter(given, dims)
        path, _, own = name.rpartition(".")
        owner = self.module.get_submodule(path)
        value: torch.Tensor | None
        if parametrize.is_parametrized(owner, own):  # to compute it may change what it is computed from
            value = copy.deepcopy(owner.parametrizations[own]).eval()()
        else:
            value = getattr(owner, own, None)
        return None if value is None else self._ledger.tensor(value, range(min(value.ndim, dims)))

    def cut(self, f: Field) -> None:
        """``f`` is a part of an axis: its channels are not moved into or out of it."""
        self._ledger.findings.cuts.append(f.ids.ravel())

    def takes_apart(self, x: Labelled, dims: Iterable[int]) -> None:
        """Positions along ``dims`` go different ways: what is one of several factors of an axis there, as keys and
        values are of a packed projection, must be as long in each."""
        for f in x.fields:
            if len(f.dims) > 1 and set(f.dims) & set(dims):
                self.grid(f)

    def axis(self, x: Labelled, dim: int) -> tuple[Field | None, Fields]:
        """The channels along ``dim``, and the fields along other dims. Where ``dim`` is one factor of a field, the
        channels are chosen alike along the other factors."""
        f = x.at(dim)
        rest = tuple(g for g in x.fields if g is not f)
        if f is not None and len(f.dims) > 1:
            f = self.across(f, set(f.dims) - {dim % x.ndim})
        return f, rest

    def across(self, f: Field, dims: Any) -> Field:
        """``f`` without some of its dims, along which its channels are chosen alike."""
        first = f.ids[tuple(slice(0, 1) if d in dims else slice(None) for d in f.dims)]
        self._ledger.tie_ids(first, f.ids)
        inner = max((k for k, d in enumerate(f.dims) if d not in dims), default=0)
        ids = f.ids[(slice(None),) * (inner + 1) + (0,) * (f.ids.ndim - 1 - inner)]  # a channel may fill the rest
        if set(f.dims[:inner]) & set(dims):
            self.rows(ids.reshape(-1, ids.shape[-1]))
        rest = tuple(d for d in f.dims if d not in dims)
        return Field(rest, first.reshape([s for s, d in zip(f.ids.shape, f.dims, strict=True) if d in rest]), f.key)

    def rows(self, ids: Any) -> None:
        """The rows of ``ids``, which lie behind one another, stay rows: no channel is moved from one to the next."""
        if len(ids) > 1:
            what = f"{self.name} reads parts of it that cannot be told apart"
            self._ledger.findings.rows.append((ids[:-1, -1], ids[1:, 0], ids[:-1, 0], what))

    def mixes(self, f: Field, first: int, last: int) -> None:
        """Statistics are computed over ``f``, by a norm with an entry for each position of dims ``first`` to
        ``last``."""
        self._ledger.findings.mixed.append((f.ids.ravel(), self.name))
        dims, shape = tuple(d - first for d in f.dims), self.shape[first : last + 1]
        self._ledger.findings.norms.append(Norm(self.path, (self.key[1], self.key[2]), shape, dims, f.ids))

    def averages(self, x: Labelled, f: Field, dims: Iterable[int]) -> None:
        """One number is computed over ``f`` and the other ``dims`` of ``x``, which equally many copies of each channel
        leave as it is: a mean, a maximum. `Rule.over` leaves channels out of it."""
        if not self.in_graph:
            self.freeze(f, _OUTSIDE.format(self.name))
            return
        along = {d for g in x.fields for d in g.dims if set(g.dims) <= set(dims)}
        shape = tuple(size if d in along else 1 for d, size in enumerate(x.shape))
        if len(f.dims) > 1:
            self.grid(f)
        findings = self._ledger.findings
        findings.mixed.append((f.ids.ravel(), self.name))
        findings.contracted.append(f.ids.ravel())
        findings.norms.append(Norm(self.path, (self.key[1], self.key[2]), shape, f.dims, f.ids))

    def adds(self, f: Field) -> None:
        """A sum or a length is computed over ``f``, to which equally many copies of each channel add by a known
        factor: the op's rewrite takes it out."""
        if not self.in_graph:
            self.freeze(f, _OUTSIDE.format(self.name))
            return
        self.measures(f)
        self._ledger.findings.contracted.append(f.ids.ravel())

    def alike(self, fields: Fields) -> Fields:
        """The same fields for each output; a tree of them where the op has several."""
        found: Fields = pytree.tree_map(lambda _: fields, self.out)
        return found

    def tie(self, a: Field | None, b: Field | None) -> None:
        """Position for position, ``a`` and ``b`` hold the same channel."""
        if a is None or b is None:
            self.freeze(a if b is None else b, f"{self.name} relates it to an axis that holds no channels")
        elif a.ids.shape != b.ids.shape:
            for f in (a, b):
                self.freeze(f, f"{self.name} relates it to an axis of another size")
        else:
            self._ledger.tie(a, b, self.name)

    def units(self, ids: Any) -> None:
        """All positions of a unit are chosen as one. ``ids`` is (units, positions), or (parts, units, positions) where
        several parts are chosen alike."""
        self._ledger.tie_ids(ids[..., :1] if ids.ndim == 2 else ids[:1, :, :1], ids)
        self.rows(ids.reshape(len(ids), -1))

    def together(self, ids: Any) -> None:
        """Along the first axis of ``ids``, channels are chosen together: row by row the same units."""
        self._ledger.tie_ids(ids[:1], ids)
        self.rows(ids)

    def stays(self, f: Field) -> bool:
        """Whether all of ``f`` must stay as it is, by what was said before."""
        said = [np.isin(f.ids, ids) for ids, _ in self._ledger.findings.frozen]
        return bool(np.logical_or.reduce(said, axis=0).all()) if said else False

    def freeze(self, f: Field | None, reason: str) -> None:
        """``f`` must stay as it is."""
        if f is not None:
            self._ledger.freeze(f.ids, reason)

    def produces(self, f: Field | None) -> None:
        """The channels of a parameter's axis are written: copies of a channel are copies of the entries."""
        self._role(f, "producer")

    def consumes(self, f: Field | None) -> None:
        """The op contracts over a parameter's axis: copies of a channel share out the entries."""
        self._role(f, "consumer")

    def per_channel(self, f: Field | None) -> None:
        """A parameter's axis has an entry for each channel of an activation: copies have the same."""
        self._role(f, "per-channel")

    def _role(self, f: Field | None, role: str) -> None:
        if f is None:
            return
        if f.key is not None and f.key[0] == "param":
            self._ledger.findings.axes[f.key[1], f.key[2]].roles.add(role)
            self.claimed.add((f.key[1], f.key[2]))
        elif role == "consumer":
            (self.sums if self.in_graph else self.once)(f, "contracts a computed weight")

    def elementwise(self, *operands: Any) -> Fields:
        """Output fields of an op that works position by position, with broadcasting."""
        shape = self.shape
        tensors = [t for t in operands if isinstance(t, Labelled)]
        result: list[Field] = []
        for tensor in tensors:
            shift = len(shape) - tensor.ndim
            for f in tensor.fields:
                f = move_field(f, tuple(d + shift for d in f.dims))
                if any(f.ids.shape[k] != shape[d] for k, d in enumerate(f.dims)):
                    self.freeze(f, f"{self.name} broadcasts it")
                else:
                    self.meet(result, f)
        return tuple(self.beside(f, tensors, len(shape)) for f in result)

    def beside(self, f: Field, tensors: list[Labelled], rank: int, *, spreads: bool = True) -> Field:
        """``f`` in an op that needs it to be a grid, and its dims to be as long in all of ``tensors``; or of length 1,
        if it ``spreads`` these."""
        for tensor in tensors:
            shift, least = rank - tensor.ndim, 2 if spreads else 1
            bare = {d for d in f.dims if d >= shift and tensor.shape[d - shift] >= least}
            bare = {d for d in bare if tensor.at(d - shift) is None}
            if bare == set(f.dims):
                self.freeze(f, f"{self.name} combines it with an axis that holds no channels")
            elif bare:
                f = self.across(f, bare)
        if len(f.dims) > 1:
            self.grid(f)
        return f

    def grid(self, f: Field, *partners: tuple[int, Field]) -> None:
        """Only one of the dims of ``f`` may change. ``partners`` are axes of other tensors that run along a dim."""
        along = tuple((f.dims.index(dim), g.ids) for dim, g in partners)
        self._ledger.findings.grids.append(Grid(f.ids, self.name, along))

    def per_position(self, x: Labelled, dim: int, *vectors: Field | None) -> Field | None:
        """The field along ``dim``, for which ``vectors`` have an entry for each position; None: one of no channels."""
        f = x.at(dim)
        for vector in vectors:
            self.per_channel(vector)
            if f is None or vector is None or len(f.dims) == 1:
                self.tie(f, vector)
            else:
                self.grid(f, (dim % x.ndim, vector))
        return f

    def fresh(self, dim: int, size: int | None = None) -> Field:
        """Channels along an axis of the output, or ``size`` of them, that nothing is tied to yet."""
        return Field((dim,), self._ledger.fresh(self.shape[dim] if size is None else size))

    def repeated(self, dim: int) -> Field:
        """As `fresh`, where the op repeats what it reads: the axis can be as long as what it meets."""
        return replace(self.fresh(dim), repeats=True)

    def reshapes(self, x: Labelled, pairing: Pairing | None = None) -> Fields:
        """``x`` in the output's shape, positions in their order. ``pairing`` are two shapes, of the input and of the
        output, that say which sizes belong together where some are equal."""
        run = self._ledger
        named: Any = {"pairing": pairing or run.pairing, "whole": run.whole, "places": run.places}
        held = run.unmerged(x.fields)
        fields, lost = reshape_fields(held, x.shape, self.shape, **named)
        for gone in () if self.trial or not lost else self._merged(lost):
            kept = tuple(f for f in held if f not in gone)
            found, still = reshape_fields(kept, x.shape, self.shape, **named)
            if not still:
                numbers = frozenset(k for k, f in enumerate(x.fields) if f in gone)
                run.findings.merged[self.key[1], self.key[2]] = numbers
                fields, lost = found, gone
                break
        self.lose(lost, f"{self.name} merges it with another axis")
        return fields

    def _merged(self, lost: list[Field]) -> Iterator[list[Field]]:
        """Of axes that the op merges, those that stay as they are so that another may change: what is repeated, then
        what must stay already, then all but the outermost."""
        first = min(lost, key=lambda f: f.dims)
        for gone in ([f for f in lost if f.repeats], [f for f in lost if self.stays(f)]):
            if gone and len(gone) < len(lost):
                yield gone
        yield [f for f in lost if f is not first]

    def concatenates(self, tensors: Sequence[Labelled], dim: int) -> Fields:
        """The tensors one after the other along ``dim``; along other axes their channels are chosen alike."""
        rank = len(self.shape)
        dim %= rank
        tensors = [t for t in tensors if t.value.numel()] or tensors  # an empty one adds nothing
        parts = [t.at(dim) for t in tensors]
        whole = len({None if f is None else f.dims for f in parts}) == 1 and parts[0] is not None
        fields: list[Field] = []
        along: list[Field] = []
        others: list[Labelled] = []
        for t, part in zip(tensors, parts, strict=True):
            f, rest = (part, tuple(g for g in t.fields if g is not part)) if whole else self.axis(t, dim)
            if f is None:
                f = Field((dim,), self._ledger.fresh(t.shape[dim]))
                self.freeze(f, f"{self.name} takes it from an axis that holds no channels")
            along.append(f)
            others.append(Labelled(t.value, rest))
            for g in rest:
                self.meet(fields, g)
        fields = [self.beside(f, others, rank, spreads=False) for f in fields]
        if any(part is not None for part in parts):
            for f in along:
                self._ledger.edge(f.key, self.key, self.name)
            dims = along[0].dims
            fields.append(Field(dims, np.concatenate([f.ids for f in along], axis=dims.index(dim))))
            if len(dims) > 1:
                self.grid(fields[-1])
        return tuple(fields)

    def contracts(self, f: Field) -> None:
        """Two activations are contracted over ``f``."""
        self._ledger.findings.contracted.append(f.ids.ravel())
        self.sums(f, "contracts over it")

    def sums(self, f: Field, how: str) -> None:
        """Something is added up over ``f``, to which copies would add and whatever is switched off must not."""
        self.once(f, how)
        self._ledger.findings.sums.append(((self.key[1], self.key[2]), f.ids.ravel()))

    def once(self, f: Field, how: str) -> None:
        """``f`` cannot have copies: they would count twice."""
        self._ledger.findings.single.append((f.ids.ravel(), f"{self.name} {how}"))

    def measures(self, f: Field) -> None:
        """A length is taken over ``f``: copies add to it, in equal numbers by a known factor."""
        self._ledger.findings.sums.append(((self.key[1], self.key[2]), f.ids.ravel()))
        self._ledger.findings.mixed.append((f.ids.ravel(), self.name))

    def meet(self, result: list[Field], f: Field) -> None:
        """Add ``f`` to the output's fields, tied to those that lie along the same dims."""
        for k, g in enumerate(result):
            common = set(f.dims) & set(g.dims)
            if not common:
                continue
            if f.dims == g.dims:
                self.tie(f, g)
                for side in (f, g):
                    if side.key is not None and side.key[0] == "param":
                        self.per_channel(side)
                return
            fine, coarse = (f, g) if len(f.dims) > len(g.dims) else (g, f)
            if coarse.dims == fine.dims[-1:]:
                self.grid(fine, (coarse.dims[0], coarse))
                result[k] = fine
            elif set(coarse.dims) <= set(fine.dims):
                self._ledger.tie_ids(_spread(coarse, fine), fine.ids)
                result[k] = fine
            else:  # as heads x queries and heads x keys: what they have in common is chosen as a whole
                f, g = (self.across(h, set(h.dims) - common) for h in (f, g))
                self.tie(f, g)
                result[k] = g
            return
        result.append(f)

    def keep(self, x: Labelled, dims: Any = (), reason: str = "") -> Fields:
        """Fields of ``x`` in an op that works along ``dims``: what lies along them is frozen and dropped; where they
        are factors of a field, its channels are chosen alike along them."""
        touched = {d % max(x.ndim, 1) for d in dims}
        result = []
        for f in x.fields:
            if touched >= set(f.dims):
                self.freeze(f, reason or f"{self.name} works along it")
            else:
                result.append(self.across(f, touched & set(f.dims)) if touched & set(f.dims) else f)
        return tuple(result)

    def unknown(self, *operands: Any, why: str = "has no rule") -> Fields:
        """Freeze every axis of ``operands``: the op, or what it is called with, is not understood."""
        for leaf in pytree.tree_leaves(operands):
            if isinstance(leaf, Labelled):
                for f in leaf.fields:
                    self.freeze(f, f"{self.name} {why}")
        return self.alike(())

    def lose(self, fields: Iterable[Field], reason: str) -> None:
        """The output does not hold these fields: they must stay as they are."""
        for f in fields:
            self.freeze(f, reason)


_OUTSIDE = "{} reduces it outside the traced parts"


def _spread(coarse: Field, fine: Field) -> Any:
    shape = [coarse.ids.shape[coarse.dims.index(d)] if d in coarse.dims else 1 for d in fine.dims]
    return np.broadcast_to(coarse.ids.reshape(shape), fine.ids.shape)
