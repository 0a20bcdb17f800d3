"""Whether two modules compute the same, with figures."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.errors import UsageError, VerificationError

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Verification:
    """How far two modules are apart on the same inputs."""

    max_abs: float
    """Largest absolute difference of any output element."""
    max_rel: float
    """Largest absolute difference within an output, divided by that output's largest magnitude; over all outputs."""
    tolerance: float
    """Bound on ``max_rel``."""
    dtype: str
    outputs: int
    """Number of output tensors compared."""

    @property
    def ok(self) -> bool:
        """Whether the modules agree; never for outputs that are not numbers."""
        return self.max_rel <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def raise_if_different(self) -> Verification:
        """Return self, or raise `VerificationError` with the figures."""
        if not self.ok:
            raise VerificationError(
                f"outputs differ by {self.max_rel:.2e} of their magnitude ({self.max_abs:.2e} absolute); "
                f"{self.tolerance:.0e} is allowed in {self.dtype}"
            )
        return self


def verify(
    a: nn.Module,
    b: nn.Module,
    example_inputs: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    train: bool = False,
    seed: int = 0,
) -> Verification:
    """Run two modules on the same inputs and compare their outputs, ``b`` being the reference.

    Both run as copies: their modes, statistics and the global RNG stay as they are.

    Args:
        example_inputs: a tensor, or a tuple of the positional inputs.
        dtype: compute in this dtype (``torch.float64`` tells rounding from errors); by default in the modules' own.
        tolerance: bound on the relative difference; 1e-10 in float64, 1e-4 in float32 by default.
        train: compare in ``train()`` rather than in ``eval()``; both copies see the same random numbers.

    Raises:
        UsageError: the outputs do not have the same structure and shapes, or are empty.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    first, second = (_outputs(m, args, kwargs or {}, dtype, train, seed) for m in (a, b))
    if len(first) != len(second) or any(x.shape != y.shape for x, y in zip(first, second, strict=False)):
        shapes = [[tuple(t.shape) for t in side] for side in (first, second)]
        raise UsageError(f"outputs have different shapes: {shapes[0]} and {shapes[1]}")
    if not any(t.numel() for t in first):
        raise UsageError("the outputs are empty on these inputs: there is nothing to compare")
    max_abs = max_rel = 0.0
    for x, y in zip(first, second, strict=False):
        difference = _magnitude(x.double() - y.double())
        scale = _magnitude(y.double())
        max_abs = _larger(max_abs, difference)
        max_rel = _larger(max_rel, difference / scale if scale else (math.inf if difference else 0.0))
    used = first[0].dtype if first else torch.float32
    bound = _TOLERANCE.get(used, 1e-4) if tolerance is None else tolerance
    return Verification(max_abs, max_rel, bound, str(used).removeprefix("torch."), len(first))


def _outputs(
    module: nn.Module, args: Any, kwargs: dict[str, Any], dtype: torch.dtype | None, train: bool, seed: int
) -> list[torch.Tensor]:
    twin = copy.deepcopy(module).train(train)
    inputs = pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, (args, kwargs))
    if dtype is not None:
        twin = twin.to(dtype)
        inputs = pytree.tree_map(
            lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v, inputs
        )
    with torch.no_grad(), _seeded(seed):
        output = twin(*inputs[0], **inputs[1])
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _magnitude(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a
