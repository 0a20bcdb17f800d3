"""The outputs of a traced module: how many channels each has now, and which of those when it was traced they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.labels import Ids
from surgery.edit.layout import Layout, Layouts
from surgery.errors import EditError
from surgery.graph.traced import KeptChannels, info


@dataclass(frozen=True)
class Output:
    """A tensor that a network returns.

    Attributes:
        name: where it stands in what the network returns: ``"logits"``, ``"features.0"``; ``"output"`` for a tensor
            that is returned alone. `surgery.slim` and others take it in ``outputs``.
        channels: for each of its axes that holds channels, how many.
        kept: for each axis that edits changed, the old position of each new one, as it was when it was traced.
        modes: in which modes (``training``) it is returned.
    """

    name: str
    channels: Mapping[int, int]
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    modes: tuple[bool, ...] = (False, True)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        kept = {str(axis): list(positions) for axis, positions in self.kept.items()}
        channels = {str(axis): size for axis, size in self.channels.items()}
        return {"name": self.name, "channels": channels, "kept": kept, "modes": list(self.modes)}

    def __str__(self) -> str:
        changed = dict.fromkeys(self.kept, " (changed)")
        sizes = [f"{size} along axis {axis}{changed.get(axis, '')}" for axis, size in self.channels.items()]
        return f"{self.name}: {', '.join(sizes) or 'no channels'}"


def outputs(module: nn.Module) -> tuple[Output, ...]:
    """The tensors that a traced module returns, and what edits made of them.

    Args:
        module: a traced module.

    Returns:
        the outputs in order; where training returns others, those too.

    Raises:
        UsageError: ``module`` is not a traced module.

    Example:
        >>> small = surgery.reindex(traced, {"fc": [0, 2, 5]}, outputs="free")
        >>> print(*surgery.outputs(small), surgery.outputs(small)[0].kept)
        output: 3 along axis 1 (changed) {1: (0, 2, 5)}
    """
    kept, analysis = info(module).kept, analyse(module)
    found: dict[Any, Output] = {}
    for one in analysis.outputs:
        shape = one.value.shape
        written = (f.dims for f in one.value.fields if analysis.written[analysis.unit_of[f.ids]].any())
        channels = {dim: shape[dim] for dims in written for dim in dims}
        positions = {k.axis: k.positions for k in kept if (k.output, k.modes) == (one.name, one.modes)}
        key = one.name, tuple(channels.items()), tuple(positions.items())
        modes = one.modes if key not in found else (*found[key].modes, *one.modes)
        found[key] = Output(one.name, channels, positions, modes)
    return tuple(found.values())


def follow_outputs(analysis: Analysis, layouts: Layouts, known: tuple[KeptChannels, ...]) -> tuple[KeptChannels, ...]:
    """What `TraceInfo.kept` is after an edit, where it was ``known`` before.

    Raises:
        EditError: an output would hold the mean of its channels, which is none of them.
    """
    kept = {(k.output, k.axis, k.modes): k for k in known}
    for output in analysis.outputs:
        for f in output.value.fields:
            layout = layouts.along(f)
            if layout is None:
                continue
            if layouts.is_mean[layout.unit].any():
                raise EditError(f"the network's output {output.name!r} would hold means of its channels")
            for dim, old in zip(f.dims, _along(layout, f.ids.shape), strict=True):
                key, size = (output.name, dim, output.modes), output.value.shape[dim]
                before = kept.get(key, KeptChannels(*key[:2], size, tuple(range(size)), output.modes))
                positions = tuple(before.positions[k] for k in old)
                kept[key] = KeptChannels(*key[:2], before.size, positions, output.modes)
    return tuple(k for k in kept.values() if k.positions != tuple(range(k.size)))


def _along(layout: Layout, shape: tuple[int, ...]) -> list[Ids]:
    """For each of several axes the old position of each new one."""
    if layout.shape is None:
        raise EditError("the channels of an output would not fill a rectangle")
    places = (place.reshape(layout.shape) for place in np.unravel_index(layout.old, shape))
    return [np.moveaxis(place, k, 0).reshape(place.shape[k], -1)[:, 0] for k, place in enumerate(places)]
