"""Two networks side by side: which of their values are compared, and which of their tensors are the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from surgery.errors import UsageError
from surgery.graph.traced import named_tensors
from surgery.passes.taps import Names, Network, Tap


def unpacked(guided: Names | Mapping[str, str] | None, hint: Names | None) -> tuple[list[str] | None, list[str] | None]:
    """The names of guided layers and of hints, each None where none are given.

    Raises:
        UsageError: a mapping from guided layers to hints, and hints besides.
    """
    if isinstance(guided, Mapping):
        if hint is not None:
            raise UsageError("a mapping from guided layers to hints names both: leave out hint=")
        return list(guided), list(guided.values())
    ours, theirs = ([names] if isinstance(names, str) else names for names in (guided, hint))
    return None if ours is None else list(ours), None if theirs is None else list(theirs)


def tap_pairs(student: Network, teacher: Network, guided: Sequence[str], hint: Sequence[str]) -> list[tuple[Tap, Tap]]:
    """The outputs of guided layers and of their hints.

    Raises:
        UsageError: unequal numbers of them, or unknown names.
        EditError: a layer without one output.
    """
    if not guided or len(guided) != len(hint):
        raise UsageError(f"{len(guided)} guided layers for {len(hint)} hints: each pair needs one of both")
    return [(student.tap(g), teacher.tap(h)) for g, h in zip(guided, hint, strict=True)]


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
