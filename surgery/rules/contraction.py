"""Rows of the rule table for products that sum over axes: matrix products, einsum and attention.

All of them are said in the letters of einsum. A letter that is not in the output is contracted: there the operands'
channels are the same. Where it is one factor of an axis, as head_dim is of heads x head_dim, the channels go together
along it, and what is left to choose are the other factors: whole heads.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from surgery.axes.labels import Field, Fields, Labelled, Shape, move_field
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule


def contract(op: Op, operands: Sequence[Labelled], letters: Sequence[str], out: str) -> Fields:
    """Fields of ``einsum("letters[0],letters[1],...->out", *operands)``."""
    held = [
        [_without(op, f, [d for d in f.dims if sub[d] not in out]) for f in x.fields]
        for x, sub in zip(operands, letters, strict=True)
    ]
    for letter in sorted(set("".join(letters)) - set(out)):
        _contract(op, operands, letters, held, letter)
    result: list[Field] = []
    for fields, sub in zip(held, letters, strict=True):
        for f in fields:
            if all(sub[d] in out for d in f.dims):
                _meet(op, result, move_field(f, tuple(out.index(sub[d]) for d in f.dims)), letters, out)
    return tuple(_beside(op, f, operands, letters, held, out) for f in result)


def _without(op: Op, f: Field, gone: list[int]) -> Field:
    """``f`` without the factors that are contracted; one of them is kept where all are."""
    if len(gone) == len(f.dims):
        gone = gone[1:]
    return op.across(f, gone) if gone else f


def _contract(
    op: Op, operands: Sequence[Labelled], letters: Sequence[str], held: list[list[Field]], letter: str
) -> None:
    along: list[Field] = []
    bare = False
    for x, sub, fields in zip(operands, letters, held, strict=True):
        if letter in sub:
            dim = sub.index(letter)
            f = next((f for f in fields if f.dims == (dim,)), None)
            bare = bare or (f is None and x.shape[dim] > 1)
            along += [] if f is None else [f]
    if bare or len(along) < 2:
        for f in along:
            op.freeze(f, f"{op.name} contracts it with an axis that does not change")
        return
    for f in along[1:]:
        op.tie(along[0], f)
    weights = [f for f in along if f.key is not None and f.key[0] == "param"]
    for f in weights:
        op.consumes(f)
    if len(weights) > 1:
        op.once(along[0], "contracts several weights over it")
    if not weights:
        op.contracts(along[0])


def _meet(op: Op, result: list[Field], f: Field, letters: Sequence[str], out: str) -> None:
    """An axis of one operand alone is written by it; one of several is multiplied position by position."""
    if sum(all(out[d] in sub for d in f.dims) for sub in letters) == 1 and f.key is not None and f.key[0] == "param":
        op.produces(f)
    op.meet(result, f)


def _beside(
    op: Op, f: Field, operands: Sequence[Labelled], letters: Sequence[str], held: list[list[Field]], out: str
) -> Field:
    """``f`` where another operand has a letter of it and no channels there."""
    for x, sub, fields in zip(operands, letters, held, strict=True):
        labelled = {sub[d] for g in fields for d in g.dims}
        bare = {d for d in f.dims if out[d] in sub and out[d] not in labelled and x.shape[sub.index(out[d])] > 1}
        if bare == set(f.dims):
            op.freeze(f, f"{op.name} combines it with an axis that holds no channels")
        elif bare:
            f = op.across(f, bare)
    if len(f.dims) > 1:
        op.grid(f)
    return f


def _einsum_macs(out: Shape, *, equation: str, operands: Any, **given: Any) -> int | None:
    """Of two operands, one multiplication for each combination of letters."""
    operands = operands[0] if len(operands) == 1 else operands
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2 or "." in equation or len(operands) != 2:
        return None
    sizes = {
        letter: n for sub, shape in zip(terms, operands, strict=True) for letter, n in zip(sub, shape, strict=True)
    }
    return math.prod(sizes.values())


@oprule(torch.einsum, linear="writes", macs=_einsum_macs)
def _einsum(op: Op, equation: str, *operands: Any) -> Fields:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    terms, arrow, out = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if "." in equation or any(len(set(sub)) < len(sub) for sub in letters):
        return op.unknown(*operands, why="has no rule for this equation")
    if not arrow:
        out = "".join(sorted(c for c in set(terms) - {","} if terms.count(c) == 1))
    return contract(op, operands, letters, out)


@oprule(torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.mv, "matmul", "mm", "bmm", "mv", "__matmul__",
        linear="writes", macs=lambda out, *, input, **given: math.prod(out) * input[-1])  # fmt: skip
def _matmul(op: Op, input: Labelled, other: Labelled) -> Fields:
    left, right, out = _matmul_letters(input.ndim, other.ndim)
    return contract(op, (input, other), (left, right), out)


def _matmul_letters(left: int, right: int) -> tuple[str, str, str]:
    rank = max(left, right, 2) - 2
    batch = string.ascii_lowercase[:rank]
    first = "Z" if left == 1 else batch[rank - (left - 2) :] + "YZ"
    second = "Z" if right == 1 else batch[rank - (right - 2) :] + "ZX"
    return first, second, batch[: max(rank, 0)] + "Y" * (left > 1) + "X" * (right > 1)


@oprule(torch.baddbmm, "baddbmm", torch.addmm, "addmm",
        macs=lambda out, *, batch1, **given: math.prod(out) * batch1[-1])  # fmt: skip
def _added_matmul(op: Op, input: Labelled, batch1: Labelled, batch2: Labelled, **named: Any) -> Fields:
    fields = _matmul(op, batch1, batch2)
    product = Labelled(torch.empty(op.shape, device="meta"), fields)
    for f in input.fields:
        op.produces(f if len(op.shape) == 2 else None)
    return op.elementwise(product, input)


def _keep_scale(edit: NodeEdit) -> None:
    """The scale that follows from the size of a head stays what it was."""
    sizes = edit.tensor("query")
    if edit.argument("scale") is None and sizes is not None and sizes[0][-1] != sizes[1][-1]:
        edit.set_argument("scale", sizes[0][-1] ** -0.5)


def _attention_macs(out: Shape, *, query: Shape, key: Shape, **given: Any) -> int:
    """Queries by keys, and weights by values, for each head of the queries."""
    return math.prod(query[:-1]) * key[-2] * (query[-1] + out[-1])


@oprule(F.scaled_dot_product_attention, rewrite=_keep_scale, python="always", macs=_attention_macs)
def _attention(
    op: Op, query: Labelled, key: Labelled, value: Labelled, attn_mask: Labelled | None = None, *rest: Any,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, **named: Any
) -> Fields:  # fmt: skip
    """Queries and keys are contracted over their last axis; the size that it had sets the scale."""
    if enable_gqa:
        key, value = (_repeat_heads(x, query) for x in (key, value))
    batch = string.ascii_lowercase[: query.ndim - 2]
    for x in (query, key):
        f = x.at(-1)
        if f is not None and len(f.dims) == 1 and scale is None and not op.in_graph:
            op.freeze(f, f"{op.name} takes its scale from the size")
    scores = contract(op, (query, key), (batch + "LE", batch + "SE"), batch + "LS")
    shape = (*op.shape[:-1], key.shape[-2])
    weights = Labelled(torch.empty(shape, device="meta"), scores)
    for dim in range(0 if attn_mask is None else attn_mask.ndim):
        assert attn_mask is not None
        if attn_mask.shape[dim] > 1:
            f, same = attn_mask.at(dim), weights.at(dim + len(shape) - attn_mask.ndim)
            if f is not None and len(f.dims) > 1:
                op.freeze(f, f"{op.name} is masked by it")
                f = None
            op.tie(same, f)
    if is_causal or (len(rest) > 1 and rest[1]):
        op.lose([f for x in (query, key, value) if (f := x.at(-2)) is not None], f"{op.name} takes them in order")
    scores = op.keep(weights, [-1], f"{op.name} normalises over it")
    return contract(op, (Labelled(weights.value, scores), value), (batch + "LS", batch + "SE"), batch + "LE")


def _repeat_heads(x: Labelled, query: Labelled) -> Labelled:
    """Keys or values with a head for each of the queries' heads, of which several share one."""
    heads = x.ndim - 3
    times = query.shape[heads] // x.shape[heads]
    fields = tuple(
        Field(f.dims, np.repeat(f.ids, times, f.dims.index(heads)), f.key) if heads in f.dims else f for f in x.fields
    )
    return Labelled(x.value.repeat_interleave(times, heads), fields)
