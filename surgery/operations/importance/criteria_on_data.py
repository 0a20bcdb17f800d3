"""The criteria that look at data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from surgery.operations.importance.observed import Reading
from surgery.operations.importance.registry import Scores, importance
from surgery.operations.importance.scored import Scored

_LEFT = 1e-12
"""The share of the readers' outputs below which units are taken to add nothing."""
_LINEAR = 1e-10
"""The share of its own variance below which a direction is taken to follow from the kept ones."""


@importance("taylor", across="raw")
def taylor(scored: Scored) -> Scores:
    """The squared change of the loss, to first order, if a unit's weights become 0: of each batch
    ``(sum of weight * gradient)^2`` over all weights of the group that go with the unit, averaged over the batches
    (Molchanov et al., CVPR 2019, equation 8, for a group as in Fang et al., CVPR 2023)."""
    return np.asarray(np.square(scored.products).mean(0))


@importance("variance", across="raw")
def variance(scored: Scored) -> Scores:
    """The variance of what readers are given of a unit, over images and places; averaged over its channels and over
    readers (Variance-Based Pruning: Berisha et al., ICCV 2025, there of an MLP's hidden neurons, and with the mean of
    removed ones added to the bias, as ``calibration`` does)."""
    total, places = np.zeros(scored.group.units), np.zeros(scored.group.units)
    for reading in scored.readings:
        inside = reading.units >= 0
        at = reading.units[inside]
        total += np.bincount(at, weights=reading.variance[inside], minlength=len(total))
        places += np.bincount(at, minlength=len(total))
    if not places.all():
        return scored.instead("magnitude", "no linear layer or convolution reads all of it on the data")
    return total / places


@importance("reconstruction", across="raw")
def reconstruction(scored: Scored) -> Scores:
    """The share of its readers' outputs that the units ranked before a unit cannot restore.

    Units are taken one after the other, each time the one that restores most. What units restore is what the best
    linear map from them to the outputs of a reader gives, with a constant; its squared error is that of the covariance
    ``C`` of the reader's inputs and its weights ``W``, ``tr(W' (C - C_S' C_SS^-1 C_S) W)`` for the units ``S``, as a
    share of ``tr(W' C W)``, averaged over the readers. That is what a compensation leaves (`surgery.edit.compensate`:
    of a linear layer and of a convolution of size 1 exactly, on the same rows and without damping; a larger convolution
    is looked at as if each of its taps read for itself). Greedy selection of columns; scores fall from 1 to 0.
    """
    problems = [
        _Problem(reading, scored.group.units)
        for reading in scored.joint_readings
        if reading.products is not None and reading.count > 1
    ]
    seen = np.zeros(scored.group.units, dtype=bool)
    for problem in problems:
        seen |= problem.seen
    if not seen.all():
        return scored.instead("magnitude", "no linear layer or convolution reads all of it on the data")
    problems = [problem for problem in problems if problem.total > 0]
    scores = np.zeros(scored.group.units)
    left, waiting = 1.0, ~scored.group.frozen
    for unit in np.flatnonzero(scored.group.frozen).tolist():  # they stay in any case
        scores[unit] = 1.0
        left -= _take(problems, unit)
    while waiting.any() and problems and left > _LEFT:
        gains = np.mean([problem.gains() for problem in problems], axis=0)
        unit = int(np.where(waiting, gains, -1.0).argmax())
        if gains[unit] <= _LEFT:
            break
        scores[unit], waiting[unit] = left, False
        left -= _take(problems, unit)
    return scores


def _take(problems: Sequence[_Problem], unit: int) -> float:
    """Take a unit; return by how much the share falls that is not restored."""
    return float(np.mean([problem.take(unit) for problem in problems])) if problems else 0.0


class _Problem:
    """What units restore of one reader's outputs: a Cholesky factorisation of the covariance with pivots, by unit.

    Of the residual covariance ``R = C - L L'`` only the blocks on the diagonal are kept, one for each unit; and
    ``G = R W``, from which what a unit ``u`` would restore is ``tr(G_u' R_uu^-1 G_u)``.
    """

    def __init__(self, reading: Reading, units: int) -> None:
        assert reading.products is not None
        n, device = len(reading.units), reading.products.device
        self.seen = np.isin(np.arange(units), reading.units)
        size = int(np.bincount(reading.units[reading.units >= 0], minlength=units).max(initial=0))
        places = np.full((units, size), n)  # n: a row of zeros
        for unit in np.flatnonzero(self.seen):
            found = np.flatnonzero(reading.units == unit)
            places[unit, : len(found)] = found
        self.places = torch.from_numpy(places).to(device)
        self.matrix = reading.products.new_zeros(n + 1, n + 1)
        self.matrix[:n, :n] = reading.products / reading.count
        outside = torch.from_numpy(np.append(reading.units < 0, True)).to(device)
        self.matrix[outside] = 0
        self.matrix[:, outside] = 0
        weight = reading.products.new_zeros(n + 1, reading.weight.shape[1])
        weight[:n] = reading.weight.to(device)
        if weight.shape[1] > n:  # the same products of rows, in fewer columns
            weight = torch.linalg.qr(weight.T, mode="r")[1].T.contiguous()
        self.outputs = self.matrix @ weight
        self.total = float((weight * self.outputs).sum())
        rows = self.places.unsqueeze(2), self.places.unsqueeze(1)
        self.blocks = self.matrix[rows].clone()
        self.least = self.blocks.diagonal(dim1=1, dim2=2).sum(1) * _LINEAR
        self.factor = reading.products.new_zeros(n + 1, n)
        self.used = 0

    def gains(self) -> Scores:
        """What each unit would restore, as a share of all, (units,)."""
        if self.blocks.shape[1] == 1:
            own = self.blocks.flatten()
            found = self.outputs.square().sum(1)[self.places.flatten()] / own.where(own > self.least, torch.inf)
        else:
            values, vectors = torch.linalg.eigh(self.blocks)
            turned = vectors.transpose(1, 2) @ self.outputs[self.places]
            values = values.where(values > self.least.unsqueeze(1), torch.inf)
            found = (turned.square().sum(2) / values).sum(1)
        gains: Scores = (found / self.total).cpu().numpy()
        return gains

    def take(self, unit: int) -> float:
        """Take a unit, and return what it restores, as a share of all."""
        at = self.places[unit]
        values, vectors = torch.linalg.eigh(self.blocks[unit])
        live = values > self.least[unit]
        root = vectors[:, live] * values[live].rsqrt()
        known = self.factor[:, : self.used]
        columns = (self.matrix[:, at] - known @ known[at].T) @ root  # (n + 1, rank)
        towards = root.T @ self.outputs[at]
        self.outputs -= columns @ towards
        mine = columns[self.places]
        self.blocks -= mine @ mine.transpose(1, 2)
        self.factor[:, self.used : self.used + columns.shape[1]] = columns
        self.used += columns.shape[1]
        return float(towards.square().sum()) / self.total
