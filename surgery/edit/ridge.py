"""Linear least squares on sums that are added up batch by batch, drawn towards weights that are there already.

For inputs ``x`` and targets ``y`` it minimises ``|y - x W - c|^2 + damping * d * |W - W0|^2``, with ``d`` the mean of
the diagonal of the inputs' covariance. Everything is in float64 and for several independent problems at once. Of the
symmetric matrix of sums, and of its Cholesky factor, the lower triangle is kept, in rows of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.edit.shelf import Shelf

DAMPINGS = (1e-12, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Dampings that are tried. The first is there for what can be given back exactly."""

_BLOCK = 512
"""Rows of a block."""


@dataclass
class Sums:
    """Sums over rows of inputs and targets, for ``g`` problems with ``p`` inputs and ``o`` targets each."""

    count: int
    x: Tensor
    """(g, p)"""
    y: Tensor
    """(g, o)"""
    xx: list[Tensor]
    """The rows ``first`` to ``last`` of the lower triangle in blocks of (g, last - first, last)."""
    xy: Tensor
    """(g, p, o)"""
    yy: Tensor
    """(g, o)"""

    @staticmethod
    def zeros(problems: int, inputs: int, targets: int, device: torch.device) -> Sums:
        """Sums over nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        g, p, o = problems, inputs, targets
        xx = [zeros(g, last - first, last) for first, last in _blocks(p)]
        return Sums(0, zeros(g, p), zeros(g, o), xx, zeros(g, p, o), zeros(g, o))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: ``x`` is (g, n, p), ``y`` is (g, n, o), both float64."""
        self.count += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.yy += y.square().sum(1)
        turned = x.transpose(1, 2)
        for rows, (first, last) in zip(self.xx, _blocks(x.shape[2]), strict=True):
            rows.baddbmm_(turned[:, first:last], x[:, :, :last])
        self.xy.baddbmm_(turned, y)

    def spread(self) -> Tensor:
        """What errors are measured by: the variance of each target, above 0, (g, o)."""
        variance = self.yy / self.count - (self.y / self.count).square()
        return variance.clamp(min=1e-6 * float(variance.max())) + torch.finfo(torch.float64).tiny

    def finite(self) -> bool:
        """Whether all that was added is finite."""
        return bool(self.diagonal().isfinite().all() and self.yy.isfinite().all())

    def diagonal(self) -> Tensor:
        """(g, p)"""
        blocks = zip(self.xx, _blocks(self.x.shape[1]), strict=True)
        return torch.cat([rows[:, :, first:].diagonal(dim1=1, dim2=2) for rows, (first, _) in blocks], 1)


@dataclass(frozen=True)
class Fit:
    """Weights (g, p, o) and constants (g, o)."""

    weight: Tensor
    constant: Tensor

    def finite(self) -> Tensor:
        """Whether the fit of each problem is finite, (g,)."""
        return self.weight.isfinite().flatten(1).all(1) & self.constant.isfinite().all(1)

    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of squared errors over rows as `Sums.add` takes them, (g, o)."""
        predicted = torch.baddbmm(self.constant.unsqueeze(1), x, self.weight)
        return predicted.sub_(y).square_().sum(1)


class Problems:
    """The least squares of `Sums`, to be solved with one damping after the other.

    Args:
        sums: of at least one row. They are to be `put_back` before more is added.
        carved: (g, p, o), the weights that are drawn to.
        constant: whether there is a constant; without one it is 0.
        shelf: where the matrix waits while its factors are computed.
    """

    def __init__(self, sums: Sums, carved: Tensor, *, constant: bool, shelf: Shelf) -> None:
        self.sums, self.carved, self.shelf = sums, carved, shelf
        self.mean_x, self.mean_y = (sums.x / sums.count, sums.y / sums.count) if constant else (sums.x * 0, sums.y * 0)
        whole = sums.diagonal()
        diagonal = whole - sums.count * self.mean_x.square()
        self.live = (diagonal > whole * 1e-12).any(0)
        """The inputs that vary, (p,)."""
        scale = diagonal[:, self.live].mean(1) if bool(self.live.any()) else diagonal.new_zeros(len(diagonal))
        self.scale = scale.where(scale > 0, 1.0)
        self._wanted = self._right_side()
        self._waiting = [shelf.put("sums", rows) for rows in sums.xx]
        sums.xx = []

    def solve(self, damping: Tensor, *, last: bool = False) -> Fit:
        """The weights that minimise the squared error with one damping for each problem.

        Args:
            damping: (g,), relative to the mean of the diagonal over the inputs that vary; infinity keeps the weights.
            last: whether the sums are not needed any more.

        Returns:
            the fit; not finite for a problem that is singular at its damping.
        """
        weight = self.carved.clone()
        fitted = damping.isfinite()
        if bool(fitted.any() and self.live.any()):
            matrix = [kept(own=not last) for kept in self._waiting]
            step = self._wanted if last else self._wanted.clone()
            failed = _solve_in_place(self._centred(matrix, damping.where(fitted, 1.0) * self.scale), step)
            step.masked_fill_((failed != 0).view(-1, 1, 1), float("nan"))
            weight += step.masked_fill_(~fitted.view(-1, 1, 1), 0.0)
        return Fit(weight, self.mean_y - (self.mean_x.unsqueeze(1) @ weight).squeeze(1))

    def put_back(self) -> None:
        """Give the sums their matrix back."""
        self.sums.xx = [kept() for kept in self._waiting]
        self.close()

    def close(self) -> None:
        """Forget the matrix."""
        self._waiting = []
        self.shelf.clear("sums")

    def _centred(self, xx: list[Tensor], ridge: Tensor) -> list[Tensor]:
        """The covariance of the inputs times their number, in place, with the ridge; 1 for inputs that do not vary."""
        for rows, (first, last) in zip(xx, _blocks(self.mean_x.shape[1]), strict=True):
            one, other = self.mean_x[:, first:last].unsqueeze(2), self.mean_x[:, :last].unsqueeze(1)
            rows.baddbmm_(one, other, alpha=-self.sums.count)
            live = self.live[first:last]
            rows *= self.live[:last]
            rows *= live.unsqueeze(1)
            rows[:, :, first:].diagonal(dim1=1, dim2=2).add_((~live).double() + ridge.unsqueeze(1) * live)
        return xx

    def _right_side(self) -> Tensor:
        """The right side: what of the targets the carved weights leave, times the inputs, (g, p, o)."""
        sums, mean = self.sums, self.mean_x.unsqueeze(1)
        carved = self.carved * self.live.unsqueeze(1)
        left = self.mean_y.unsqueeze(1) - mean @ carved
        wanted = torch.baddbmm(sums.xy, mean.transpose(1, 2), left, alpha=-sums.count)
        for rows, (first, last) in zip(sums.xx, _blocks(mean.shape[2]), strict=True):
            wanted[:, first:last].baddbmm_(rows, carved[:, :last], alpha=-1)
            wanted[:, :first].baddbmm_(rows[:, :, :first].transpose(1, 2), carved[:, first:last], alpha=-1)
        return wanted.mul_(self.live.unsqueeze(1))


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(first, min(first + _BLOCK, size)) for first in range(0, size, _BLOCK)]


def _solve_in_place(rows: list[Tensor], wanted: Tensor) -> Tensor:
    """Solve ``A z = wanted`` by Cholesky's factor, both in place.

    Args:
        rows: the lower triangle of ``A`` (g, p, p), as in `Sums`.
        wanted: (g, p, o)

    Returns:
        for each problem, 0 where the matrix is positive definite.
    """
    blocks = _blocks(wanted.shape[1])
    failed = wanted.new_zeros(len(wanted), dtype=torch.int32)
    for row, (first, _) in zip(rows, blocks, strict=True):
        for other, (start, end) in zip(rows, blocks, strict=True):
            part = row[:, :, start:end]
            part.baddbmm_(row[:, :, :start], other[:, :, :start].transpose(1, 2), alpha=-1)
            if start == first:
                factor, wrong = torch.linalg.cholesky_ex(part)
                part.copy_(factor)
                failed |= wrong
                break
            square = other[:, :, start:].transpose(1, 2)
            part.copy_(torch.linalg.solve_triangular(square, part, upper=True, left=False))
    for row, (first, last) in zip(rows, blocks, strict=True):
        part = wanted[:, first:last].baddbmm_(row[:, :, :first], wanted[:, :first], alpha=-1)
        part.copy_(torch.linalg.solve_triangular(row[:, :, first:], part, upper=False))
    for row, (first, last) in zip(reversed(rows), reversed(blocks), strict=True):
        part = wanted[:, first:last]
        part.copy_(torch.linalg.solve_triangular(row[:, :, first:].transpose(1, 2), part, upper=True))
        wanted[:, :first].baddbmm_(row[:, :, :first].transpose(1, 2), part, alpha=-1)
    return failed
