"""Parameters and multiplications as the FitNets paper counts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.counting.cost import weight_macs


@dataclass(frozen=True)
class PaperCost:
    """What one sample costs by the paper's counting."""

    weights: int
    """Entries of weight matrices and kernels, all pieces of maxout units among them; no biases, no norms."""
    multiplications: int
    """By weights alone: each as often as its layer has output positions."""


def paper_cost(module: nn.Module, example_inputs: Any = None) -> PaperCost:
    """Count as table 5 of FitNets (Romero et al., ICLR 2015) does; inputs as for `surgery.cost`."""
    macs = weight_macs(module, example_inputs)
    return PaperCost(
        weights=sum(p.numel() for p in module.parameters() if p.ndim > 1),
        multiplications=sum(count for name, count in macs.items() if name),
    )
