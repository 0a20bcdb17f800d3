"""The widths that a model can be slimmed to, by part, and a choice of them that keeps to a predicted cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from surgery.axes.analysis import analyse
from surgery.axes.groups import DimensionGroup
from surgery.deploy.budget.predict import Array, Layers
from surgery.operations.importance.registry import How
from surgery.operations.importance.scores import score_units
from surgery.operations.slim import fit_units, slim

_STEPS = 16
"""Number of steps between the rates 0 and 1."""

Levels = np.ndarray[Any, np.dtype[np.int64]]
"""A level for each part: 0 keeps it as it is, higher levels are narrower."""


class Widths:
    """The widths that a model can be slimmed to, and the damage of slimming each part."""

    def __init__(
        self,
        module: nn.Module,
        found: Mapping[str, Sequence[DimensionGroup]],
        least: float,
        round_to: int,
        importance: How,
    ) -> None:
        self._module, self._parts, self._analysis = module, found, analyse(module)
        self.groups = [group for groups in found.values() for group in groups]
        self.round_to, self.importance = round_to, score_units(module, self._analysis, importance, self.groups)
        self.layers = Layers(module, self.groups)
        self._part = np.repeat(np.arange(len(found)), [len(groups) for groups in found.values()])
        steps = max(1, math.floor(_STEPS * (1 - least) + 1e-9))
        self.levels = [*(1 - k / _STEPS for k in range(steps)), least]

    def prepare(self, damage: Mapping[str, Mapping[float, float]]) -> None:
        """Set the damage at a few rates, between which it is interpolated. ``round_to`` must not change afterwards."""
        masks = [
            fit_units(self._analysis, self._module, {group.name: rate for group in self.groups}, self.round_to)
            for rate in self.levels
        ]
        self._shares = np.array([self.kept_shares(mask) for mask in masks])  # (levels, groups)
        self._harm = np.array([self._curve(damage[name]) for name in self._parts])  # (parts, levels)

    def _curve(self, damage: Mapping[float, float]) -> Array:
        """Damage by level: monotonic, with a small slope everywhere, so that no channel is removed for nothing."""
        rates = sorted(damage)
        known = [*(max(0.0, damage[rate]) for rate in rates), 0.0]
        slope = (known[0] - known[1]) / (rates[1] - rates[0])
        curve = [
            float(np.interp(level, [*rates, 1.0], known)) + max(0.0, slope * (rates[0] - level) * (level < rates[0]))
            for level in self.levels
        ]
        return np.maximum.accumulate(curve) + 1e-3 * (1 - np.array(self.levels))

    def kept_shares(self, masks: Mapping[DimensionGroup, Any]) -> Array:
        """The share of each group's units that masks keep."""
        return np.array([masks[group].mean() if group in masks else 1.0 for group in self.groups])

    def weights_lost(self, rates: Sequence[float]) -> dict[str, dict[float, float]]:
        """The share of each part's squared weights that is removed, by rate."""
        scores = score_units(self._module, self._analysis, "magnitude", self.groups)
        lost: dict[str, dict[float, float]] = {name: {} for name in self._parts}
        for rate in rates:
            wanted = {group.name: rate for group in self.groups}
            masks = fit_units(self._analysis, self._module, wanted, importance=self.importance)
            for name, groups in self._parts.items():
                shares = [scores[g.name][~masks[g]].sum() / max(scores[g.name].sum(), 1e-30) for g in groups]
                lost[name][rate] = float(np.mean(shares))
        return lost

    def shares(self, levels: Levels) -> Array:
        """From levels of parts (parts, N) to kept shares of units (groups, N)."""
        own = levels[self._part]
        return np.asarray(np.take_along_axis(self._shares.T, own, axis=1))

    def rates(self, levels: Levels) -> dict[str, float]:
        """The rate of each group that is slimmed."""
        return {g.name: self.levels[levels[p]] for g, p in zip(self.groups, self._part, strict=True) if levels[p]}

    def make(self, levels: Levels, calibration: Any = None) -> nn.Module:
        """Make the model of these widths, fitted where there are inputs for it."""
        options: dict[str, Any] = {"round_to": self.round_to, "importance": self.importance}
        return slim(self._module, self.rates(levels), **options, calibration=calibration)

    def fit(self, predict: Callable[[Array], Array], target: float) -> Levels:
        """Find levels for which the prediction is at most ``target``, or the highest levels.

        A greedy search from the whole model: each move slims the part, to the level, that saves most for its damage.
        At the end, each part gets back the widths that the target allows.
        """
        parts, last = self._harm.shape[0], len(self.levels) - 1
        levels = np.zeros(parts, dtype=np.int64)
        now = float(predict(self.shares(levels[:, None]))[0])
        while now > target and (levels < last).any():
            moves = [(p, k) for p in range(parts) for k in range(levels[p] + 1, last + 1)]
            after = predict(self.shares(self._move(levels, moves)))
            harm = np.array([self._harm[p, k] - self._harm[p, levels[p]] for p, k in moves])
            worth = np.minimum(now - after, now - target) / np.maximum(harm, 1e-12)
            part, level = moves[int(worth.argmax())]
            if worth.max() <= 0:
                part, level = moves[int((now - after).argmax())]
            levels[part] = level
            now = float(predict(self.shares(levels[:, None]))[0])
        for part in np.argsort(-self._harm[np.arange(parts), levels]):
            moves = [(int(part), k) for k in range(levels[part])]
            if moves:
                fits = predict(self.shares(self._move(levels, moves))) <= target
                levels[part] = next((k for (_, k), fit in zip(moves, fits, strict=True) if fit), levels[part])
        return levels

    @staticmethod
    def _move(levels: Levels, moves: Sequence[tuple[int, int]]) -> Levels:
        """``levels`` after each of the moves (parts, moves)."""
        moved = np.repeat(levels[:, None], len(moves), axis=1)
        moved[[part for part, _ in moves], np.arange(len(moves))] = [level for _, level in moves]
        return moved

    def harm(self, levels: Levels) -> float:
        """The sum of the damage to all parts."""
        return float(self._harm[np.arange(len(levels)), levels].sum())

    @property
    def smallest(self) -> Levels:
        """The highest level of each part."""
        return np.full(self._harm.shape[0], len(self.levels) - 1, dtype=np.int64)
