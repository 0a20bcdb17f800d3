"""Two networks side by side: which of their values are compared, and which of their tensors are the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import EditError, UsageError
from surgery.graph.traced import named_tensors
from surgery.selectors import Where
from surgery.taps.network import Tap, TappedNetwork, names_of
from surgery.taps.regressors import grid
from surgery.taps.stages import align_stages

Guided = Where | Mapping[Any, Where] | None
"""Guided layers, or guided layers with their hints."""


def names_of_pair(
    student: TappedNetwork, teacher: TappedNetwork, guided: Guided, hint: Where | None
) -> tuple[list[str] | None, list[str] | None]:
    """The names of guided layers and of hints, each None where none are given.

    Raises:
        UsageError: a mapping from guided layers to hints, and hints as well; or a name that matches nothing.
    """
    if isinstance(guided, Mapping):
        if hint is not None:
            raise UsageError("a mapping from guided layers to hints names both: leave out hint=")
        both = [(names_of(student.module, g), names_of(teacher.module, h)) for g, h in guided.items()]
        for ours, theirs in both:
            _refuse_unequal(ours, theirs)
        return [name for ours, _ in both for name in ours], [name for _, theirs in both for name in theirs]
    return (
        None if guided is None else names_of(student.module, guided),
        None if hint is None else names_of(teacher.module, hint),
    )


def tap_pairs(
    student: TappedNetwork, teacher: TappedNetwork, guided: Sequence[str], hint: Sequence[str]
) -> list[tuple[Tap, Tap]]:
    """The outputs of guided layers and of their hints.

    Raises:
        UsageError: unequal numbers of them, or unknown names.
        EditError: a layer without one output.
    """
    _refuse_unequal(guided, hint)
    return [(student.tap(g), teacher.tap(h)) for g, h in zip(guided, hint, strict=True)]


def _refuse_unequal(guided: Sequence[str], hint: Sequence[str]) -> None:
    if not guided or len(guided) != len(hint):
        raise UsageError(f"{len(guided)} guided layers for {len(hint)} hints: each pair needs one of both")


def stage_pairs(
    student: TappedNetwork, teacher: TappedNetwork, guided: Guided, hint: Where | None
) -> list[tuple[Tap, Tap]]:
    """The outputs of guided layers and of their hints; where none are named, the ends of the stages, as many as both
    networks have (`surgery.taps.stages.aligned`).

    Raises:
        UsageError: names for one of the networks alone.
    """
    ours, theirs = names_of_pair(student, teacher, guided, hint)
    if ours is not None and theirs is not None:
        return tap_pairs(student, teacher, ours, theirs)
    if ours is not None or theirs is not None:
        raise UsageError("name layers of both networks, guided= and hint=, or of neither")
    ends = student.stages(), teacher.stages()
    first, second = (
        [math.prod(network.layout(end).sizes) for end in found]
        for network, found in zip((student, teacher), ends, strict=True)
    )
    places = align_stages(first, second)
    return list(zip(ends[0][places[0]], ends[1][places[1]], strict=True))


def as_maps(student: TappedNetwork, teacher: TappedNetwork, pair: tuple[Tap, Tap]) -> tuple[Tap, Tap]:
    """Both values as maps (N, C, H, W): channels to the front; tokens as the grid that `surgery.taps.regressors.grid`
    finds, of the other map's aspect ratio, without a class token.

    Raises:
        EditError: one of them is something else.
    """
    layouts = student.layout(pair[0]), teacher.layout(pair[1])
    result = []
    for value, layout, other in zip(pair, layouts, reversed(layouts), strict=True):
        aspect = other.sizes if len(other.sizes) == 2 else (1, 1)
        found = (
            (0, layout.sizes) if len(layout.sizes) == 2 else grid(layout.sizes[0], aspect) if layout.is_tokens else None
        )
        if found is None:
            raise EditError(
                f"{value.where} is {layout}: only maps, and tokens that are a grid, can be compared as maps"
            )
        value = value.without_first(found[0])
        value = value.through((torch.movedim, (-1, 1))) if layout.last else value
        result.append(value.through((torch.unflatten, (2, found[1]))) if layout.is_tokens else value)
    return result[0], result[1]


def restore_tensors(trained: nn.Module, student: nn.Module, names: Iterable[str], what: str, source: str) -> nn.Module:
    """A copy of ``student`` with the tensors of these names as they are in ``trained``: see `counterparts`."""
    result = copy.deepcopy(student)
    with torch.no_grad():
        for own, given in counterparts(trained, result, names, what, source):
            given.copy_(own)
    return result


def counterparts(
    trained: nn.Module, student: nn.Module, names: Iterable[str], what: str, source: str
) -> list[tuple[Tensor, Tensor]]:
    """The tensors of these names in both modules.

    Args:
        what: ``trained``, for errors.
        source: what to pass as ``student``.

    Raises:
        UsageError: ``student`` has no tensor of this name and shape.
    """
    own, known = named_tensors(trained), named_tensors(student)
    for name in names:
        if name not in known or known[name].shape != own[name].shape:
            found = f"has it as {tuple(known[name].shape)}" if name in known else "has none"
            raise UsageError(f"{name!r} of {what} is {tuple(own[name].shape)}, and this student {found}: pass {source}")
    return [(own[name], known[name]) for name in names]
