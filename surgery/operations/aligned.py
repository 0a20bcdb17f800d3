"""Two modules that return different channels of one model: which entries of their outputs are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from surgery.axes.network_outputs import output_name
from surgery.errors import UsageError
from surgery.graph.traced import KeptChannels, info, is_traced

Axis = tuple[str, int]
"""Name of an output, and an axis of it."""


@dataclass(frozen=True)
class Taken:
    """What is taken of the outputs of a module, to be compared."""

    sizes: Mapping[Axis, int] = field(default_factory=dict)
    """The length that an axis has."""
    places: Mapping[Axis, tuple[int, ...]] = field(default_factory=dict)

    def of(self, outputs: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """The tensors, each by the path that leads to it, with the entries that are compared; an axis of another length
        as it is."""
        return [self._take(output_name(path), tensor) for path, tensor in outputs]

    def _take(self, name: str, tensor: Tensor) -> Tensor:
        for (output, axis), places in self.places.items():
            if output == name and axis < tensor.ndim and tensor.shape[axis] == self.sizes[output, axis]:
                tensor = tensor.index_select(axis, torch.tensor(places, device=tensor.device))
        return tensor

    def __str__(self) -> str:
        return ", ".join(f"{size} along axis {axis} of {name!r}" for (name, axis), size in self.sizes.items())


def align(module: nn.Module, reference: nn.Module, training: bool) -> tuple[Taken, Taken]:
    """What to take of the outputs of two modules, so that the same entries stand at the same places.

    Of the channels that both hold, each copy in either is compared with the first copy in the other.

    Args:
        module: traced or not: one that is not has all the channels of the model.
        reference: likewise.
        training: the mode in which they are compared.

    Raises:
        UsageError: each holds channels that the other lacks, or they are of different models.
    """
    ours, theirs = (_kept(m, training) for m in (module, reference))
    sizes: tuple[dict[Axis, int], ...] = ({}, {})
    places: tuple[dict[Axis, tuple[int, ...]], ...] = ({}, {})
    for axis in dict.fromkeys((*ours, *theirs)):
        known = [kept[axis].size for kept in (ours, theirs) if axis in kept]
        if len(set(known)) > 1:
            raise UsageError(
                f"output {axis[0]!r} had {known[0]} channels along axis {axis[1]} in the model that the first was made "
                f"from, {known[1]} in that of the second: they cannot be compared"
            )
        a, b = (kept[axis].positions if axis in kept else tuple(range(known[0])) for kept in (ours, theirs))
        if not (set(a) <= set(b) or set(b) <= set(a)):
            only = [sorted(set(one) - set(other))[0] for one, other in ((a, b), (b, a))]
            raise UsageError(
                f"output {axis[0]!r} cannot be compared along axis {axis[1]}: each module lacks channels of the other, "
                f"such as {only[0]} and {only[1]} of the model they were made from"
            )
        first = [dict(reversed(list(zip(held, range(len(held)), strict=True)))) for held in (a, b)]
        pairs = [(i, first[1][c]) for i, c in enumerate(a) if c in first[1]]
        pairs += [(first[0][c], j) for j, c in enumerate(b) if c in first[0] and first[1][c] != j]
        for side, held in enumerate((a, b)):
            sizes[side][axis] = len(held)
            places[side][axis] = tuple(pair[side] for pair in pairs)
    return Taken(sizes[0], places[0]), Taken(sizes[1], places[1])


def _kept(module: nn.Module, training: bool) -> dict[Axis, KeptChannels]:
    known = info(module).kept if is_traced(module) else ()
    return {(k.output, k.axis): k for k in known if training in k.modes}
