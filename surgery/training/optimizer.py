"""Optimiser surgery: the state of an optimiser follows the weights that it belongs to through an edit."""

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
"""What further copies can begin with: the state of what they copy, or none."""


def transfer_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module, *, new: str = "copied") -> Optimizer:
    """An optimiser of the same class for ``after``, which passes made from ``before``, that goes on where this one is.

    State that has the shape of its parameter (momentum buffers, first and second moments) is gathered as the weight
    was, but not divided where copies share a weight out; at a mean it is the mean. Single numbers, such as the count of
    steps, are kept. Options of the parameter groups are kept too, among them ``lr`` and ``initial_lr``: a schedule
    goes on if it is made again with ``last_epoch``.

    Parameters of inserted layers have no state yet. Each joins the group that holds most of the parameters with as
    many dims in the place that the layer was inserted behind, or in the smallest container around it that has any;
    where the whole model has none, the group with most parameters. Parameters that the optimiser did not hold stay out.

    Args:
        optimizer: one of `torch.optim` that keeps its state parameter by parameter, over some or all parameters of
            ``before``, whether it has stepped or not.
        before: a traced module.
        after: a module whose recipe begins with that of ``before``.
        new: what further copies and means begin with: ``"copied"`` as above, or ``"zero"`` (SPARKLING, 2026: the old
            state for old channels, none for new ones). With Adam, whose count of steps is kept, a zero second moment
            makes the first steps up to ``(1 - beta1) / sqrt(1 - beta2)`` times as long as usual.

    None of the three is changed, and nothing is shared with ``optimizer``.

    Raises:
        UsageError: ``after`` was not made from ``before``, a parameter is not one of ``before``'s, or a state that is
            neither of its parameter's shape nor a single number, as in Adafactor and LBFGS.
    """
    if new not in NEW:
        raise unknown_name("state of new channels", new, NEW)
    known = origins(before, after)
    names = _names(optimizer, before)
    target = dict(after.named_parameters(remove_duplicate=False))
    moved = {origin.name: (name, origin) for name, origin in known.items() if origin is not None}
    held = [[moved[names[p]][0] for p in group["params"]] for group in optimizer.param_groups]
    joined = _joined(held, before, after, known)
    result = _same_class(
        optimizer,
        [
            _group(group, [target[name] for name in own], {name: target[name] for name in others})
            for group, own, others in zip(optimizer.param_groups, held, joined, strict=True)
        ],
    )
    for parameter, state in optimizer.state.items():
        name, origin = moved[names[parameter]]
        result.state[target[name]] = {
            key: _carried(value, f"the state {key!r} of {name}", parameter, target[name], origin, new)
            for key, value in state.items()
        }
    return result


def _names(optimizer: Optimizer, before: nn.Module) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in before.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise UsageError(
                    f"parameter group {number} of the optimizer holds a parameter of shape {tuple(parameter.shape)} "
                    "that is not one of the module's: pass the module that the optimizer was made for"
                )
    return names


def _joined(
    held: Sequence[Sequence[str]], before: nn.Module, after: nn.Module, known: Mapping[str, Origin | None]
) -> list[list[str]]:
    """For each parameter group the parameters of inserted layers that join it."""
    steps = recipe(after).steps[len(recipe(before).steps) :]
    place = {new.name: new.after for step in steps for new in step.inserted()}
    dims = {name: parameter.ndim for name, parameter in after.named_parameters(remove_duplicate=False)}
    group_of = {name: number for number, names in enumerate(held) for name in names}
    result: list[list[str]] = [[] for _ in held]
    for name, parameter in after.named_parameters():
        if known[name] is not None or not parameter.requires_grad:
            continue
        scope = next((where for inserted, where in place.items() if name.startswith(f"{inserted}.")), "")
        number = _nearest(scope, {n: g for n, g in group_of.items() if dims[n] == dims[name]})
        group_of[name] = _largest(group_of) if number is None else number
        result[group_of[name]].append(name)
    return result


def _nearest(scope: str, group_of: Mapping[str, int]) -> int | None:
    """The group of most parameters in ``scope``, or in the smallest container around it that has some."""
    for path in _containers(scope):
        inside = {name: group for name, group in group_of.items() if not path or name.startswith(f"{path}.")}
        if inside:
            return _largest(inside)
    return None


def _containers(path: str) -> Iterator[str]:
    """``"a.b.c"``, ``"a.b"``, ``"a"``, ``""``"""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _largest(group_of: Mapping[str, int]) -> int:
    return Counter(group_of.values()).most_common(1)[0][0]


def _group(group: Mapping[str, Any], own: Sequence[Tensor], others: Mapping[str, Tensor]) -> dict[str, Any]:
    """A group with the options of ``group``; its parameters are named if those of ``group`` are."""
    options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    if "param_names" in group:
        return {**options, "params": [*zip(group["param_names"], own, strict=True), *others.items()]}
    return {**options, "params": [*own, *others.values()]}


def _same_class(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    cls = type(optimizer)
    accepted = inspect.signature(cls).parameters
    return cls(groups, **{key: copy.deepcopy(v) for key, v in optimizer.defaults.items() if key in accepted})


def _carried(value: Any, what: str, old: Tensor, target: Tensor, origin: Origin, new: str) -> Any:
    """An entry of the state of ``old`` for ``target``, in whose memory format it is if it has its shape."""
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
            result = _with_means(result, axis, means)
        if new == "zero":
            result = result.index_fill(axis, fresh.nonzero().squeeze(1), 0)
    return torch.empty_like(target, dtype=value.dtype, requires_grad=False).copy_(result)


def _with_means(copies: Tensor, axis: int, means: Tensor) -> Tensor:
    """The mean of all copies put at the positions ``means``."""
    shape = list(copies.shape)
    shape[axis] = len(means)
    return copies.mean(axis, keepdim=True).expand(shape).index_copy(axis, (~means).nonzero().squeeze(1), copies)
