"""Where the tensors of an edited module come from: what a state that belongs to weights needs to follow them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgery.edit.apply import apply
from surgery.edit.recipe import recipe
from surgery.edit.step import MEAN, AxisOrigin, Origin, Step
from surgery.errors import UsageError
from surgery.graph.traced import named_tensors


def origins(before: nn.Module, after: nn.Module) -> dict[str, Origin | None]:
    """Where each parameter and buffer of ``after`` comes from, which passes made from ``before``.

    Each step accounts for itself (`Step.origins`); the accounts are composed. Where several steps move tensors, the
    modules in between are made again, one at a time.

    Args:
        before: a traced module.
        after: a module whose recipe begins with that of ``before``.

    Returns:
        by qualified name, tied tensors under each of theirs; None for what no tensor of ``before`` was moved to, such
        as the weights of an inserted layer.

    Raises:
        UsageError: ``after`` was not made from ``before``.

    Example:
        >>> origins(traced, surgery.slim(traced, 0.5))["conv1.weight"].axes[0].old
    """
    steps = _steps_between(before, after)
    old, new = named_tensors(before), named_tensors(after)
    lost = [name for name in old if name not in new]
    if lost:
        raise UsageError(f"{lost[0]} is not in the edited module: it was not made from the other one")
    moved = _compose(before, steps)
    first = {id(tensor): name for name, tensor in reversed(old.items())}
    found: dict[str, Origin | None] = dict.fromkeys(new)
    for name in new:
        own = first[id(old[name])] if name in old else name
        origin = moved.get(own) or (Origin(own, (None,) * old[name].ndim) if name in old else None)
        if origin is None:
            continue
        source = old[origin.name]
        expected = tuple(
            size if axis is None else len(axis.old) for axis, size in zip(origin.axes, source.shape, strict=True)
        )
        if tuple(new[name].shape) != expected:
            raise UsageError(
                f"{name} has the shape {tuple(new[name].shape)}, where the recipe makes {expected} of the other "
                f"module's {tuple(source.shape)}: the module was not made from that one"
            )
        found[name] = Origin(name if origin.name == own else origin.name, origin.axes)
    return found


def _steps_between(before: nn.Module, after: nn.Module) -> Sequence[Step]:
    done, steps = recipe(before).steps, recipe(after).steps
    if steps[: len(done)] != done:
        raise UsageError("the module was not made from the other one: its recipe does not begin with the other's")
    return steps[len(done) :]


def _compose(before: nn.Module, steps: Sequence[Step]) -> dict[str, Origin]:
    """The tensors that the steps move, and where from in ``before``; a step without an account moves none."""
    last = max((k for k, step in enumerate(steps) if type(step).origins is not Step.origins), default=-1)
    held = named_tensors(before)
    moved: dict[str, Origin] = {}
    module = before
    for k, step in enumerate(steps[: last + 1]):
        account = step.origins(module)
        composed = {}
        for name, origin in account.items():
            if origin.name in moved or origin.name in held:  # what is inserted in between has no origin
                composed[name] = _through(moved.get(origin.name), origin)
        moved |= composed
        if k < last:
            module = apply(module, step)
    return moved


def _through(first: Origin | None, second: Origin) -> Origin:
    """``second``, traced back to what ``first`` was gathered from."""
    if first is None:
        return second
    return Origin(first.name, tuple(map(_axis_through, first.axes, second.axes)))


def _axis_through(first: AxisOrigin | None, second: AxisOrigin | None) -> AxisOrigin | None:
    if first is None or second is None:
        return second if first is None else first
    mean = second.old == MEAN
    old, new = first.old[second.old], first.new[second.old]
    return AxisOrigin(old.masked_fill(mean, MEAN), second.new | new.masked_fill(mean, True))
