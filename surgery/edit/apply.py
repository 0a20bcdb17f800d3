"""Steps + module -> new module, with a recipe of what was done."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import nn

from surgery.edit.recipe import Recipe
from surgery.edit.step import Step
from surgery.graph.structure import follow_seal
from surgery.graph.traced import info, with_info


def apply(module: nn.Module, edit: Recipe | Step | Iterable[Step]) -> nn.Module:
    """Carry steps out, in order, and record them in the recipe of the result.

    Args:
        module: a traced module.
        edit: a recipe, a step, or steps in order.

    Returns:
        a new module that shares no storage with ``module``.

    Raises:
        EditError: a step is not exact here.
        UsageError: a step names what is not there, or an index is out of range.

    Example:
        >>> again = surgery.apply(traced, surgery.recipe(slim))
    """
    info(module)
    return carry_out(module, edit.steps if isinstance(edit, Recipe) else (edit,) if isinstance(edit, Step) else edit)


def carry_out(
    module: nn.Module, steps: Iterable[Step], begin: Callable[[int, Step], object] = lambda number, step: None
) -> nn.Module:
    """`apply`, which calls ``begin`` with the number of each step and the step before it is carried out.

    Example:
        >>> again = carry_out(traced, surgery.recipe(slim).steps, lambda number, step: print(number, step))
    """
    result = module
    for number, step in enumerate(steps):
        begin(number, step)
        done = info(result).steps
        result = step.apply(result) if result is module else step.apply_in_place(result)
        with_info(result, steps=(*done, step))
    if result is module:
        return copy.deepcopy(module)
    follow_seal(module, result)
    return result
