"""What a slimmed model will cost, predicted from its widths before it is made.

A layer's MACs, parameters and bytes are those of the dense layer times the shares of its axes that are kept. Latency is
not the sum of layers' latencies, and not proportional to MACs: its coefficients are fitted to whole models that were
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls
from torch import nn

from surgery.axes.analysis import analyse
from surgery.axes.groups import DimensionGroup
from surgery.counting.cost import weight_macs

Array = np.ndarray[Any, np.dtype[np.float64]]

_PRIOR = 0.1
"""How much a measurement counts that each part takes a share of the time as large as its share of the MACs."""


class Layers:
    """The parameters of a traced module, and what share of each is left when groups keep a share of their units."""

    def __init__(self, module: nn.Module, groups: Sequence[DimensionGroup]) -> None:
        analysis = analyse(module)
        parameters = dict(module.named_parameters())
        macs = weight_macs(module)
        self.groups = list(groups)
        self.loose = float(macs.get("", 0))
        """MACs of products of activations, which no width here is known to change."""
        names = list(parameters)
        self.macs = np.array([macs.get(name, 0) for name in names], dtype=float)
        self.params = np.array([parameters[name].numel() for name in names], dtype=float)
        self.bytes = np.array([parameters[name].numel() * parameters[name].element_size() for name in names], float)
        lengths = np.array([len(parameters[name]) if parameters[name].ndim else 1 for name in names])
        self.outputs = self.macs / np.maximum(self.params, 1) * lengths
        """Numbers that each layer writes: as many as its weights are used times, for each of its channels."""
        rows: list[Array] = []
        self._starts: list[int] = []
        for name in names:
            self._starts.append(len(rows))
            for axis in range(max(parameters[name].ndim, 1)):
                rows.append(self._shares(analysis.axis_units.get((name, axis))))
        self._rows = np.array(rows)
        self._writes = np.array([self._rows[start] for start in self._starts])

    def _shares(self, units: Any) -> Array:
        """Of an axis, the share of positions that hold each group's units."""
        if units is None:
            return np.zeros(len(self.groups))
        return np.array([np.mean((units >= g.start) & (units < g.start + g.units)) for g in self.groups])

    def left(self, kept: Array) -> Array:
        """The share of each parameter that is left (parameters, N), where groups keep shares of units (groups, N)."""
        axes = 1 - self._rows @ (1 - kept)
        return np.multiply.reduceat(axes, self._starts, axis=0)

    def written(self, kept: Array) -> Array:
        """The share of what each parameter writes that is left, (parameters, N)."""
        return 1 - self._writes @ (1 - kept)

    def stages(self, parts: Mapping[str, Sequence[DimensionGroup]]) -> list[int]:
        """For each parameter the number of the part that it writes for, by the group that its first axis holds."""
        number = {group: k for k, groups in enumerate(parts.values()) for group in groups}
        found, last = [], 0
        for row in self._writes:
            last = number[self.groups[int(row.argmax())]] if row.any() else last
            found.append(last)
        return found


class Linear:
    """Predicts a figure that layers' shares add up to: MACs, parameters or bytes."""

    def __init__(self, layers: Layers, amounts: Array, rest: float) -> None:
        self._layers, self._amounts, self._rest = layers, amounts, rest

    def __call__(self, kept: Array) -> Array:
        """For shares of units (groups, N), the figure (N,)."""
        return np.asarray(self._amounts @ self._layers.left(kept) + self._rest)


class Latency:
    """Predicts latency: a constant, a part for what all layers write, and one for the MACs of each stage.

    The coefficients are not negative, and fitted to whole models that were measured, each of which counts by its
    relative error; where these leave it open, time goes with MACs.
    """

    def __init__(self, layers: Layers, parts: Mapping[str, Sequence[DimensionGroup]]) -> None:
        self._layers = layers
        stages = np.array(layers.stages(parts))
        self._stages = [np.where(stages == k, layers.macs, 0.0) for k in range(len(parts))]
        self._measured: list[tuple[Array, float]] = []
        self._coefficients = np.zeros(2 + len(parts))

    def _features(self, kept: Array) -> Array:
        """(2 + stages, N), each the share of its dense value."""
        left, written = self._layers.left(kept), self._layers.written(kept)
        rows = [np.ones(kept.shape[1]), self._layers.outputs @ written / max(self._layers.outputs.sum(), 1)]
        rows += [amounts @ left / max(amounts.sum(), 1) for amounts in self._stages]
        return np.array(rows)

    def learn(self, kept: Array, ms: float) -> None:
        """Note what a model took, whose groups keep shares of units (groups,), and fit again."""
        self._measured.append((kept, ms))
        times = np.array([ms for _, ms in self._measured])
        rows = self._features(np.array([kept for kept, _ in self._measured]).T).T / times[:, None]
        amounts = np.array([0.0, 0.0, *(amounts.sum() for amounts in self._stages)])
        prior = times.max() * amounts / max(amounts.sum(), 1)
        weight = _PRIOR / times.max()
        design = np.vstack([rows, weight * np.eye(len(prior))])
        self._coefficients = nnls(design, np.concatenate([np.ones(len(times)), weight * prior]))[0]

    def __call__(self, kept: Array) -> Array:
        """For shares of units (groups, N), ms (N,)."""
        return np.asarray(self._coefficients @ self._features(kept))
