"""Linear least squares on sums that are added up batch by batch, drawn towards weights that are there already.

For inputs ``x`` and targets ``y`` it minimises ``|y - x W - c|^2 + damping * d * |W - W0|^2``, with ``d`` the mean of
the diagonal of the inputs' covariance. Everything is in float64 and for several independent problems at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPINGS = (1e-12, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Dampings that are tried. The first is there for what can be given back exactly."""


@dataclass
class Sums:
    """Sums over rows of inputs and targets, for ``g`` problems with ``p`` inputs and ``o`` targets each."""

    count: int
    x: Tensor
    """(g, p)"""
    y: Tensor
    """(g, o)"""
    xx: Tensor
    """(g, p, p)"""
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
        return Sums(0, zeros(g, p), zeros(g, o), zeros(g, p, p), zeros(g, p, o), zeros(g, o))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: ``x`` is (g, n, p), ``y`` is (g, n, o), both float64."""
        self.count += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.yy += y.square().sum(1)
        self.xx.baddbmm_(x.transpose(1, 2), x)
        self.xy.baddbmm_(x.transpose(1, 2), y)

    def spread(self) -> Tensor:
        """What errors are measured by: the variance of each target, above 0, (g, o)."""
        variance = self.yy / self.count - (self.y / self.count).square()
        return variance.clamp(min=1e-6 * float(variance.max())) + torch.finfo(torch.float64).tiny

    def finite(self) -> bool:
        """Whether all that was added is finite."""
        return bool(self.xx.isfinite().all() and self.yy.isfinite().all())


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


def solve(sums: Sums, carved: Tensor, damping: Tensor, *, constant: bool) -> Fit:
    """The weights that minimise the squared error with one damping for each problem.

    Args:
        sums: of at least one row.
        carved: (g, p, o), the weights that are drawn to.
        damping: (g,), relative to the mean of the diagonal over the inputs that vary; infinity keeps the weights.
        constant: whether there is a constant; without one it is 0.

    Returns:
        the fit; not finite for a problem that is singular at its damping.
    """
    mean_x, mean_y = (sums.x / sums.count, sums.y / sums.count) if constant else (sums.x * 0, sums.y * 0)
    weight = carved.clone()
    fitted = damping.isfinite()
    if bool(fitted.any()):
        diagonal = sums.xx.diagonal(dim1=1, dim2=2) - sums.count * mean_x.square()
        live = (diagonal > sums.xx.diagonal(dim1=1, dim2=2) * 1e-12).any(0).nonzero().squeeze(1)
        if len(live):
            weight[:, live] += _step(sums, carved, damping, mean_x, mean_y, live).where(fitted.view(-1, 1, 1), 0.0)
    return Fit(weight, mean_y - (mean_x.unsqueeze(1) @ weight).squeeze(1))


def _step(sums: Sums, carved: Tensor, damping: Tensor, mean_x: Tensor, mean_y: Tensor, live: Tensor) -> Tensor:
    """What is added to the carved weights of the ``live`` inputs."""
    whole = len(live) == sums.x.shape[1]
    mean_live, kept = mean_x[:, live], carved[:, live]
    gram = sums.xx.clone() if whole else sums.xx[:, live][:, :, live]
    gram.baddbmm_(mean_live.unsqueeze(2), mean_live.unsqueeze(1), alpha=-sums.count)
    wanted = torch.baddbmm(sums.xy[:, live], mean_live.unsqueeze(2), mean_y.unsqueeze(1), alpha=-sums.count)
    wanted.baddbmm_(gram, kept, alpha=-1)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1)
    diagonal += (damping.where(damping.isfinite(), 1.0) * scale.where(scale > 0, 1.0)).unsqueeze(1)
    factor, failed = torch.linalg.cholesky_ex(gram)
    found = torch.cholesky_solve(wanted, factor)
    return found.where((failed == 0).view(-1, 1, 1), float("nan"))
