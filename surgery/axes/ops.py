"""The rule table's machinery: how a rule is registered and found, and the words a rule has to say how axes relate.

A rule is a function that takes the op and the op's own arguments, and returns the `Field`s of its output. On the way it
may tie channels together (`Op.tie`), freeze them (`Op.freeze`), or say what becomes of a parameter's axis
(`Op.produces`, `Op.consumes`, `Op.per_channel`). An op without a rule freezes every axis that reaches it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from surgery.axes.labels import Field, Fields, Labelled, moved
from surgery.axes.ledger import Grid, Norm

if TYPE_CHECKING:
    from surgery.axes.ledger import Ledger


class Op:
    """One op in a graph, as a rule sees it: its output's shape, and the words to say how its axes relate."""

    def __init__(
        self, run: Ledger, node: fx.Node, module: nn.Module | None, path: str, key: tuple[str, str], out: Any
    ) -> None:
        self.run = run
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

    def param(self, name: str, dims: int = 2) -> Labelled | None:
        """A parameter or buffer of the layer, its first ``dims`` axes labelled (those after two are kernels)."""
        value: torch.Tensor | None
        if parametrize.is_parametrized(self.module, name):  # to compute it may change what it is computed from
            value = copy.deepcopy(self.module.parametrizations[name]).eval()()
        else:
            value = getattr(self.module, name, None)
        return None if value is None else self.run.tensor(value, range(min(value.ndim, dims)))

    def cut(self, f: Field) -> None:
        """``f`` is a part of an axis: its channels are not moved into or out of it."""
        self.run.findings.cuts.append(f.ids.ravel())

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
        self.run.tie_ids(first, f.ids)
        self.rows(f.ids.reshape(-1, f.ids.shape[-1]))
        rest = tuple(d for d in f.dims if d not in dims)
        return Field(rest, first.reshape([s for s, d in zip(f.ids.shape, f.dims, strict=True) if d in rest]), f.key)

    def rows(self, ids: Any) -> None:
        """The rows of ``ids``, which lie behind one another, stay rows: no channel is moved from one to the next."""
        if len(ids) > 1:
            what = f"{self.name} reads parts of it that cannot be told apart"
            self.run.findings.rows.append((ids[:-1, -1], ids[1:, 0], ids[:-1, 0], what))

    def mixes(self, f: Field, first: int, last: int) -> None:
        """Statistics are computed over ``f``, by a norm with an entry for each position of dims ``first`` to
        ``last``."""
        self.run.findings.mixed.append((f.ids.ravel(), self.name))
        dims, shape = tuple(d - first for d in f.dims), self.shape[first : last + 1]
        self.run.findings.norms.append(Norm(self.path, (self.key[1], self.key[2]), shape, dims, f.ids))

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
            self.run.tie(a, b, self.name)

    def together(self, ids: Any) -> None:
        """Along the first axis of ``ids``, channels are chosen together: row by row the same units."""
        self.run.tie_ids(ids[:1], ids)
        self.rows(ids)

    def freeze(self, f: Field | None, reason: str) -> None:
        if f is not None:
            self.run.freeze(f.ids, reason)

    def produces(self, f: Field | None) -> None:
        self._role(f, "producer")

    def consumes(self, f: Field | None) -> None:
        self._role(f, "consumer")

    def per_channel(self, f: Field | None) -> None:
        self._role(f, "per-channel")

    def _role(self, f: Field | None, role: str) -> None:
        if f is None:
            return
        if f.key is not None and f.key[0] == "param":
            self.run.findings.axes[f.key[1], f.key[2]].roles.add(role)
            self.claimed.add((f.key[1], f.key[2]))
        elif role == "consumer":
            self.run.findings.single.append((f.ids.ravel(), f"{self.name} contracts a computed weight"))

    def elementwise(self, *operands: Any) -> Fields:
        """Output fields of an op that works position by position, with broadcasting."""
        shape = self.shape
        tensors = [t for t in operands if isinstance(t, Labelled)]
        result: list[Field] = []
        for tensor in tensors:
            shift = len(shape) - tensor.ndim
            for f in tensor.fields:
                f = moved(f, tuple(d + shift for d in f.dims))
                if any(f.ids.shape[k] != shape[d] for k, d in enumerate(f.dims)):
                    self.freeze(f, f"{self.name} broadcasts it")
                else:
                    self.meet(result, f)
        return tuple(self.beside(f, tensors, len(shape)) for f in result)

    def beside(self, f: Field, tensors: list[Labelled], rank: int) -> Field:
        """``f`` in an op that needs it to be a grid, and its dims to be as long in all of ``tensors``."""
        for tensor in tensors:
            shift = rank - tensor.ndim
            bare = {d for d in f.dims if d >= shift and tensor.shape[d - shift] > 1 and tensor.at(d - shift) is None}
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
        self.run.findings.grids.append(Grid(f.ids, self.name, along))

    def per_position(self, x: Labelled, dim: int, *vectors: Field | None) -> Field | None:
        """The field along ``dim``, for which ``vectors`` have an entry for each position."""
        f = x.at(dim)
        for vector in vectors:
            self.per_channel(vector)
            if f is None or len(f.dims) == 1:
                self.tie(f, vector)
            elif vector is not None:
                self.grid(f, (dim % x.ndim, vector))
        return f

    def contracts(self, f: Field) -> None:
        """Two activations are contracted over ``f``."""
        self.run.findings.contracted.append(f.ids.ravel())
        self.sums(f, "contracts over it")

    def sums(self, f: Field, how: str) -> None:
        """Something is added up over ``f``, to which copies would add and whatever is switched off must not."""
        self.run.findings.single.append((f.ids.ravel(), f"{self.name} {how}"))
        self.run.findings.sums.append(((self.key[1], self.key[2]), f.ids.ravel()))

    def meet(self, result: list[Field], f: Field) -> None:
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
                self.run.tie_ids(_spread(coarse, fine), fine.ids)
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

    def lose(self, fields: list[Field], reason: str) -> None:
        for f in fields:
            self.freeze(f, reason)


def _spread(coarse: Field, fine: Field) -> Any:
    shape = [coarse.ids.shape[coarse.dims.index(d)] if d in coarse.dims else 1 for d in fine.dims]
    return np.broadcast_to(coarse.ids.reshape(shape), fine.ids.shape)
