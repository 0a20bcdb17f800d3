"""Rows of the rule table for reductions: sums, means, extremes, variances and lengths, over whatever axes.

Where they run over channels, copies of all channels in equal numbers leave a mean or an extreme as it is, and change a
sum or a length by a factor that the op's input is divided by.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from surgery.axes.labels import Fields, Labelled, move_field
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule
from surgery.layers.reductions import (
    amax_over,
    amin_over,
    max_over,
    mean_over,
    min_over,
    reduced_dims,
    spread_settings,
    std_mean_over,
    std_over,
    var_mean_over,
    var_over,
)

# ---------------------------------------------------------------------------------------------------------------------
# Means, variances and extremes


@oprule(torch.mean, "mean", linear="first", over=mean_over)
def _mean(op: Op, input: Labelled, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None,
          **named: Any) -> Fields:  # fmt: skip
    return _reduce(op, input, reduced_dims(dim, axis), "averages")


def _correct_for_copies(edit: NodeEdit) -> None:
    """A variance divides by the number of channels less a correction, which grows as they do."""
    named = ("dim", "axis", "unbiased", "correction")
    dims, less = spread_settings(*(edit.argument(name) for name in named))
    copies = math.prod(n for d, n in edit.copies_of("input").items() if dims is None or d in _inside(edit, dims))
    if copies == 1 or less == 0:
        return
    keepdim = edit.argument("keepdim", False)
    edit.node.args = (edit.argument("input"),)
    edit.node.kwargs = {"dim": dims, "correction": less * copies, "keepdim": keepdim}


def _inside(edit: NodeEdit, dims: tuple[int, ...]) -> set[int]:
    read = edit.tensor("input")
    return set() if read is None else {d % len(read[0]) for d in dims}


def _spread(op: Op, input: Labelled, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *,
            correction: Any = None, axis: Any = None, **named: Any) -> Any:  # fmt: skip
    return op.alike(_reduce(op, input, spread_settings(dim, axis, unbiased, correction)[0], "averages"))


for _functions, _over in (
    ((torch.var, "var"), var_over),
    ((torch.std, "std"), std_over),
    ((torch.var_mean,), var_mean_over),
    ((torch.std_mean,), std_mean_over),
):
    oprule(*_functions, rewrite=_correct_for_copies, over=_over, python="always")(_spread)


@oprule(torch.amax, "amax", over=amax_over)
@oprule(torch.amin, "amin", over=amin_over)
def _extreme(op: Op, input: Labelled, dim: Any = (), keepdim: bool = False, **named: Any) -> Fields:
    return _reduce(op, input, reduced_dims(dim, named.get("axis")), "averages")


@oprule(torch.max, "max", over=max_over)
@oprule(torch.min, "min", over=min_over)
def _greatest(op: Op, input: Labelled, dim: Any = None, keepdim: bool = False, *, other: Any = None,
              axis: Any = None, **named: Any) -> Any:  # fmt: skip
    if isinstance(dim, Labelled) or other is not None:  # the larger of two
        return op.elementwise(input, dim if other is None else other)
    users = op.node.users
    read = [user for user in users if user.users or user.op == "output"]
    # Python that is not traced says nothing of what it reads.
    numbered = isinstance(op.out, tuple) and not (users and all(map(_takes_values, read)))
    return op.alike(_reduce(op, input, reduced_dims(dim, axis), "numbers" if numbered else "averages"))


def _takes_values(user: Any) -> bool:
    """Whether a node takes the values of a maximum, not their positions."""
    given = user.args[1:2]
    return (user.target is operator.getitem and given == (0,)) or (user.target is getattr and given == ("values",))


# ---------------------------------------------------------------------------------------------------------------------
# Sums and lengths


def _share_sum(edit: NodeEdit) -> None:
    """A sum of copies is that of one of each where each counts for a part."""
    _divide(edit, reduced_dims(edit.argument("dim"), edit.argument("axis")), 1.0)


@oprule(torch.sum, "sum", linear="first", rewrite=_share_sum, python="always")
def _sum(op: Op, input: Labelled, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None,
         **named: Any) -> Fields:  # fmt: skip
    return _reduce(op, input, reduced_dims(dim, axis), "sums")


def _share_length(edit: NodeEdit) -> None:
    power = _power(edit.argument("p"), edit.argument("ord"))
    if power is not None and not math.isinf(power):
        _divide(edit, reduced_dims(edit.argument("dim")), power)


@oprule(torch.norm, "norm", rewrite=_share_length, python="always")
def _norm(op: Op, input: Labelled, p: Any = "fro", dim: Any = None, keepdim: bool = False, **named: Any) -> Fields:
    return _reduce(op, input, reduced_dims(dim), "freezes" if _power(p) is None else "sums")


@oprule(torch.linalg.vector_norm, rewrite=_share_length, python="always")
def _vector_norm(op: Op, input: Labelled, ord: Any = 2, dim: Any = None, keepdim: bool = False, **named: Any) -> Fields:
    return _reduce(op, input, reduced_dims(dim), "freezes" if _power(ord) is None else "sums")


@oprule(torch.linalg.norm, rewrite=_share_length, python="always")
def _linalg_norm(
    op: Op, input: Labelled, ord: Any = None, dim: Any = None, keepdim: bool = False, **named: Any
) -> Fields:
    dims = reduced_dims(dim)
    vector = ord is None or (input.ndim == 1 if dims is None else len(dims) == 1)
    return _reduce(op, input, dims, "sums" if vector and _power(ord) is not None else "freezes")


def _power(p: Any, ord: Any = None) -> float | None:
    """The power of a length; None where absent channels would not count as zeros."""
    given = ord if p is None else p
    if given is None or given == "fro":
        return 2.0
    return float(given) if isinstance(given, (int, float)) and given > 0 else None


def _divide(edit: NodeEdit, dims: tuple[int, ...] | None, power: float) -> None:
    """Let each copy count for its part in the sum of powers along ``dims``."""
    read, rank = edit.argument("input"), len((edit.tensor("input") or ((),))[0])
    inside = range(rank) if dims is None else {d % rank for d in dims}
    copies = math.prod(n for d, n in edit.copies_of("input").items() if d in inside)
    if copies == 1:
        return
    with edit.node.graph.inserting_before(edit.node):
        shared = edit.call(operator.mul, read, copies ** (-1 / power))
    edit.node.replace_input_with(read, shared)


# ---------------------------------------------------------------------------------------------------------------------
# What no number of copies keeps


@oprule(torch.any, torch.all, "any", "all", finite=lambda found, *_, **named: found)
@oprule(torch.prod, torch.logsumexp, "prod", "logsumexp")
def _other(op: Op, input: Labelled, dim: Any = None, *args: Any, **named: Any) -> Any:
    return op.alike(_reduce(op, input, reduced_dims(dim, named.get("axis")), "freezes"))


def _reduce(op: Op, input: Labelled, dims: tuple[int, ...] | None, how: str) -> Fields:
    """What is left of ``input``. Channels that are reduced over are averaged (``"averages"``), added up (``"sums"``),
    or must stay."""
    gone = set(range(input.ndim)) if dims is None else {d % max(input.ndim, 1) for d in dims}
    fields = []
    for f in input.fields:
        inside = gone & set(f.dims)
        if inside < set(f.dims):
            fields.append(op.across(f, inside) if inside else f)
        elif how == "averages":
            op.averages(input, f, gone)
        elif how == "sums" and len(f.dims) == 1:
            op.adds(f)
        else:
            op.freeze(f, f"{op.name} reduces it" if how != "numbers" else f"{op.name} numbers its positions")
    if len(op.shape) == input.ndim:
        return tuple(fields)
    place = {d: k for k, d in enumerate(d for d in range(input.ndim) if d not in gone)}
    return tuple(move_field(f, tuple(place[d] for d in f.dims)) for f in fields)


@oprule(mean_over, var_over, std_over, var_mean_over, std_mean_over, amax_over, amin_over, max_over, min_over,
        kind="restricted norm")  # fmt: skip
def _restricted(op: Op, *args: Any, **named: Any) -> Any:
    return op.unknown(*args, *named.values(), why="leaves channels that are switched off out of its result")
