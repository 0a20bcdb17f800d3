"""Optimizer surgery: the state of an optimizer follows its weights through an edit."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.edit.origins import origins
from surgery.edit.recipe import recipe
from surgery.edit.step import MEAN, Origin
from surgery.errors import UsageError, unknown_name

NEW = ("copied", "zero")
"""Initial state of further copies: the state of the original, or zero."""


def transfer_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module, *, new: str = "copied") -> Optimizer:
    """Make an optimizer for ``after``, an edit of ``before``, that continues from the state of ``optimizer``.

    State with the shape of its parameter (momentum buffers, first and second moments) is gathered as the weight was,
    but not divided where copies share a weight; at a mean it is the mean. Single numbers, such as the number of steps,
    are kept. Options of the parameter groups are kept too, among them ``lr`` and ``initial_lr``: a schedule continues
    if it is made again with ``last_epoch``.

    Parameters of inserted layers have no state yet. Each joins the group that holds most parameters of the same
    dimension in the place behind which the layer was inserted, else in the smallest container around it that has any,
    else the largest group. Parameters that the optimizer did not hold stay out.

    Args:
        optimizer: one of `torch.optim` that keeps state for each parameter, over some or all parameters of ``before``,
            whether it has stepped or not. It is not changed, and shares nothing with the result.
        before: a traced module.
        after: a module whose recipe begins with the recipe of ``before``.
        new: initial state of further copies and means: ``"copied"`` as above, or ``"zero"`` (SPARKLING, 2026: the old
            state for old channels, zero for new ones). Adam's number of steps is kept, so a zero second moment makes
            its first steps up to ``(1 - beta1) / sqrt(1 - beta2)`` times as long as usual.

    Returns:
        An optimizer of the same class over the parameters of ``after``.

    Raises:
        UsageError: ``after`` was not made from ``before``; a parameter does not belong to ``before``; or a state is
            neither of its parameter's shape nor a single number, as in Adafactor and LBFGS.

    Example:
        >>> wide = surgery.widen(traced, 1.5)
        >>> optimizer = surgery.transfer_optimizer(optimizer, traced, wide)
    """
    if new not in NEW:
        raise unknown_name("state of new channels", new, NEW)
    known = origins(before, after)
    names = _name_parameters(optimizer, before)
    target = dict(after.named_parameters(remove_duplicate=False))
    moved = {origin.name: (name, origin) for name, origin in known.items() if origin is not None}
    held = [[moved[names[p]][0] for p in group["params"]] for group in optimizer.param_groups]
    joined = _join_groups(held, before, after, known)
    result = _make_optimizer(
        optimizer,
        [
            _extend_group(group, [target[name] for name in own], {name: target[name] for name in others})
            for group, own, others in zip(optimizer.param_groups, held, joined, strict=True)
        ],
    )
    for parameter, state in optimizer.state.items():
        name, origin = moved[names[parameter]]
        result.state[target[name]] = {
            key: _carry(value, f"the state {key!r} of {name}", parameter, target[name], origin, new)
            for key, value in state.items()
        }
    return result


def _name_parameters(optimizer: Optimizer, before: nn.Module) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in before.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise UsageError(
                    f"parameter group {number} of the optimizer holds a parameter of shape {tuple(parameter.shape)} "
                    "that the module does not have: pass the module that the optimizer was made for"
                )
    return names


def _join_groups(
    held: Sequence[Sequence[str]], before: nn.Module, after: nn.Module, known: Mapping[str, Origin | None]
) -> list[list[str]]:
    """Find, for each parameter group, the parameters of inserted layers that join it."""
    steps = recipe(after).steps[len(recipe(before).steps) :]
    place = {new.name: new.after for step in steps for new in step.inserted()}
    dims = {name: parameter.ndim for name, parameter in after.named_parameters(remove_duplicate=False)}
    group_of = {name: number for number, names in enumerate(held) for name in names}
    result: list[list[str]] = [[] for _ in held]
    for name, parameter in after.named_parameters():
        if known[name] is not None or not parameter.requires_grad:
            continue
        scope = next((where for inserted, where in place.items() if name.startswith(f"{inserted}.")), "")
        number = _find_nearest(scope, {n: g for n, g in group_of.items() if dims[n] == dims[name]})
        group_of[name] = _find_largest(group_of) if number is None else number
        result[group_of[name]].append(name)
    return result


def _find_nearest(scope: str, group_of: Mapping[str, int]) -> int | None:
    """The largest group in ``scope``, or in the smallest container around it that has parameters."""
    for path in _containers(scope):
        inside = {name: group for name, group in group_of.items() if not path or name.startswith(f"{path}.")}
        if inside:
            return _find_largest(inside)
    return None


def _containers(path: str) -> Iterator[str]:
    """``"a.b.c"``, ``"a.b"``, ``"a"``, ``""``"""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _find_largest(group_of: Mapping[str, int]) -> int:
    return Counter(group_of.values()).most_common(1)[0][0]


def _extend_group(group: Mapping[str, Any], own: Sequence[Tensor], others: Mapping[str, Tensor]) -> dict[str, Any]:
    """Make a group with the options of ``group``; its parameters are named if those of ``group`` are."""
    options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    if "param_names" in group:
        return {**options, "params": [*zip(group["param_names"], own, strict=True), *others.items()]}
    return {**options, "params": [*own, *others.values()]}


def _make_optimizer(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    cls = type(optimizer)
    accepted = inspect.signature(cls).parameters
    return cls(groups, **{key: copy.deepcopy(v) for key, v in optimizer.defaults.items() if key in accepted})


def _carry(value: Any, what: str, old: Tensor, target: Tensor, origin: Origin, new: str) -> Any:
    """Carry an entry of the state of ``old`` over to ``target``, in the memory format of ``target``."""
    if not isinstance(value, Tensor):
        if isinstance(value, (int, float, type(None))):
            return value
        raise UsageError(f"{what} is a {type(value).__name__}: only tensors and numbers follow the weights")
    if value.shape != old.shape:
        if value.numel() == 1:
            return value.clone()
        raise UsageError(
            f"{what} has the shape {tuple(value.shape)}, not the parameter's {tuple(old.shape)}: it cannot follow it"
        )
    result = value.detach()
    for axis, moved in enumerate(origin.axes):
        if moved is None:
            continue
        places, fresh = moved.old.to(value.device), moved.new.to(value.device)
        means = places == MEAN
        result = result.index_select(axis, places[~means] if means.any() else places)
        if means.any():
            result = _insert_means(result, axis, means)
        if new == "zero":
            result = result.index_fill(axis, fresh.nonzero().squeeze(1), 0)
    return torch.empty_like(target, dtype=value.dtype, requires_grad=False).copy_(result)


def _insert_means(copies: Tensor, axis: int, means: Tensor) -> Tensor:
    """Insert the mean of all copies at the positions ``means``."""
    shape = list(copies.shape)
    shape[axis] = len(means)
    return copies.mean(axis, keepdim=True).expand(shape).index_copy(axis, (~means).nonzero().squeeze(1), copies)
