"""The cost of a slim model, predicted from its widths before it is made.

A layer's MACs, parameters and bytes are the dense layer's times the kept shares of its axes. Latency is neither the sum
of layers' latencies nor proportional to MACs: its coefficients are fitted to measurements of whole models.
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
"""Weight of the prior that each part's share of the time equals its share of the MACs."""


class Layers:
    """The parameters of a traced module, and the share of each that is left when groups keep a share of their units."""

    def __init__(self, module: nn.Module, groups: Sequence[DimensionGroup]) -> None:
        analysis = analyse(module)
        parameters = dict(module.named_parameters())
        macs = weight_macs(module)
        self.groups = list(groups)
        self.loose = float(macs.get("", 0))
        """MACs of products of activations, which are taken as constant."""
        names = list(parameters)
        self.macs = np.array([macs.get(name, 0) for name in names], dtype=float)
        self.params = np.array([parameters[name].numel() for name in names], dtype=float)
        self.bytes = np.array([parameters[name].numel() * parameters[name].element_size() for name in names], float)
        lengths = np.array([len(parameters[name]) if parameters[name].ndim else 1 for name in names])
        self.outputs = self.macs / np.maximum(self.params, 1) * lengths
        """Numbers that each layer writes: the uses of each weight, for each output channel."""
        rows: list[Array] = []
        self._starts: list[int] = []
        for name in names:
            self._starts.append(len(rows))
            for axis in range(max(parameters[name].ndim, 1)):
                rows.append(self._shares(analysis.axis_units.get((name, axis))))
        self._rows = np.array(rows)
        self._writes = np.array([self._rows[start] for start in self._starts])

    def _shares(self, units: Any) -> Array:
        """The share of an axis that holds each group's units."""
        if units is None:
            return np.zeros(len(self.groups))
        return np.array([np.mean((units >= g.start) & (units < g.start + g.units)) for g in self.groups])

    def left(self, kept: Array) -> Array:
        """The share of each parameter that is left (parameters, N), for kept shares of units (groups, N)."""
        axes = 1 - self._rows @ (1 - kept)
        return np.multiply.reduceat(axes, self._starts, axis=0)

    def written(self, kept: Array) -> Array:
        """The share of each parameter's output that is left (parameters, N)."""
        return 1 - self._writes @ (1 - kept)

    def stages(self, parts: Mapping[str, Sequence[DimensionGroup]]) -> list[int]:
        """The number of the part that each parameter writes, by the group of its first axis."""
        number = {group: k for k, groups in enumerate(parts.values()) for group in groups}
        found, last = [], 0
        for row in self._writes:
            last = number[self.groups[int(row.argmax())]] if row.any() else last
            found.append(last)
        return found


class Linear:
    """Predicts a sum over layers: MACs, parameters or bytes."""

    def __init__(self, layers: Layers, amounts: Array, rest: float) -> None:
        self._layers, self._amounts, self._rest = layers, amounts, rest

    def __call__(self, kept: Array) -> Array:
        """From kept shares of units (groups, N) to the sum (N,)."""
        return np.asarray(self._amounts @ self._layers.left(kept) + self._rest)


class Latency:
    """Predicts latency: a constant, a term for the outputs of all layers, and one for the MACs of each stage.

    The nonnegative coefficients minimise relative errors on whole models that were measured. Where these leave them
    open, time is proportional to MACs.
    """

    def __init__(self, layers: Layers, parts: Mapping[str, Sequence[DimensionGroup]]) -> None:
        self._layers = layers
        stages = np.array(layers.stages(parts))
        self._stages = [np.where(stages == k, layers.macs, 0.0) for k in range(len(parts))]
        self._measured: list[tuple[Array, float]] = []
        self._coefficients = np.zeros(2 + len(parts))

    def _features(self, kept: Array) -> Array:
        """Features (2 + stages, N), each relative to the dense model."""
        left, written = self._layers.left(kept), self._layers.written(kept)
        rows = [np.ones(kept.shape[1]), self._layers.outputs @ written / max(self._layers.outputs.sum(), 1)]
        rows += [amounts @ left / max(amounts.sum(), 1) for amounts in self._stages]
        return np.array(rows)

    def learn(self, kept: Array, ms: float) -> None:
        """Add the latency of a model with these kept shares of units (groups,), and fit again."""
        self._measured.append((kept, ms))
        times = np.array([ms for _, ms in self._measured])
        rows = self._features(np.array([kept for kept, _ in self._measured]).T).T / times[:, None]
        amounts = np.array([0.0, 0.0, *(amounts.sum() for amounts in self._stages)])
        prior = times.max() * amounts / max(amounts.sum(), 1)
        weight = _PRIOR / times.max()
        design = np.vstack([rows, weight * np.eye(len(prior))])
        self._coefficients = nnls(design, np.concatenate([np.ones(len(times)), weight * prior]))[0]

    def __call__(self, kept: Array) -> Array:
        """From kept shares of units (groups, N) to ms (N,)."""
        return np.asarray(self._coefficients @ self._features(kept))
