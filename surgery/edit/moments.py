"""Mean and variance of activations: what a BatchNorm that computes the identity is set to (Net2Net, section 3.2).

With ``weight = sqrt(var + eps)`` and ``bias = mean`` a BatchNorm changes nothing in ``eval()``; with the activation's
own mean and variance it changes little in ``train()``, where it normalises by those of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.edit.sites import called_layer, compute, op_of
from surgery.errors import UsageError
from surgery.graph.rule_table import UNKNOWN
from surgery.graph.traced import TracedModule

_BITS = {torch.float32: 24, torch.float64: 53}

Moments = tuple[Tensor, Tensor]
"""Mean and variance of each channel, float64 of shape (channels,)."""


def identity_eps(dtype: torch.dtype) -> float:
    """``eps`` of an inserted BatchNorm: near the usual 1e-5, more in 16 bits; 1 less it is a number of ``dtype``."""
    return max(2.0**-17, torch.finfo(dtype).eps / 2)


def predicted_moments(owner: TracedModule, node: fx.Node) -> Moments | None:
    """What the BatchNorms before a value say of it: each gives a normal distribution, which ReLU and ReLU6 rectify;
    summands count as independent, and pools as neutral. None where something else writes it."""
    return _moments(owner, node, {})


def _moments(owner: TracedModule, node: fx.Node, known: dict[fx.Node, Moments | None]) -> Moments | None:
    if node not in known:
        known[node] = _predict(owner, node, known)
    return known[node]


def _predict(owner: TracedModule, node: fx.Node, known: dict[fx.Node, Moments | None]) -> Moments | None:
    leaf: Any = called_layer(owner, node)
    rule = op_of(owner, node)
    if leaf is not None and rule.kind == "batch norm":
        if leaf.weight is None:
            device = next((t.device for t in (*leaf.buffers(), *owner.parameters())), None)
            mean = torch.zeros(leaf.num_features, dtype=torch.float64, device=device)
            return mean, torch.ones_like(mean)
        return leaf.bias.detach().double(), leaf.weight.detach().double().square()
    if rule is UNKNOWN or not node.args:
        return None
    first = node.args[0]
    operands = first if isinstance(first, (list, tuple)) else [n for n in node.args if isinstance(n, fx.Node)]
    found = [_moments(owner, n, known) if isinstance(n, fx.Node) else None for n in operands]
    given = [moments for moments in found if moments is not None]
    if not given or len(given) < len(found):
        return None
    if rule.kind == "idempotent" and isinstance(rule.within, tuple) and rule.within[0] == 0:
        return _rectify(*given[0], rule.within[1])
    if rule.linear == "sum" and len(given) == 2:
        first_factor, second_factor = (_factor(owner, node, k) for k in range(2))
        return (
            first_factor * given[0][0] + second_factor * given[1][0],
            first_factor**2 * given[0][1] + second_factor**2 * given[1][1],
        )
    if rule.kind == "concatenation" and 1 in (node.kwargs.get("dim"), *node.args[1:2]):
        return torch.cat([m for m, _ in given]), torch.cat([v for _, v in given])
    return given[0] if not rule.activation and (rule.within is True or rule.linear == "first") else None


def _factor(owner: TracedModule, node: fx.Node, operand: int) -> Tensor:
    """What an op that is linear in two operands multiplies one of them by."""
    operands = tuple(torch.tensor(float(k == operand), dtype=torch.float64) for k in range(2))
    found = compute(owner, node, operands, node.kwargs)
    assert isinstance(found, Tensor)
    return found


def _rectify(mean: Tensor, variance: Tensor, top: float) -> Moments:
    """Mean and variance of a normal variable that is clamped to [0, top]."""
    first, second = _positive_part(mean, variance)
    if top < math.inf:
        above, above_squared = _positive_part(mean - top, variance)
        first, second = first - above, second - above_squared - 2 * top * above
    return first, (second - first.square()).clamp(min=0)


def _positive_part(mean: Tensor, variance: Tensor) -> Moments:
    """The first two moments of ``max(x, 0)``, for normal ``x``."""
    spread = variance.sqrt().clamp(min=1e-12)
    share = torch.special.ndtr(mean / spread)
    density = torch.exp(-(mean / spread).square() / 2) / math.sqrt(2 * math.pi)
    return mean * share + spread * density, (mean.square() + variance) * share + mean * spread * density


def set_moments(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Let a BatchNorm with an `identity_eps` be the identity in ``eval()``, with these statistics.

    The weight is rounded to so few bits that its square less ``eps`` is a number of the same dtype: the identity is
    exact in every wider dtype too. For that, standard deviations are limited to those from 2**-8 to 8 in float32. In
    16 bits there is no room for it: the BatchNorm stays as it is.
    """
    layer: Any = norm
    bits = _BITS.get(layer.weight.dtype)
    if (
        bits is None
        or layer.weight.is_meta
        or len(mean) != layer.num_features
        or not (mean.isfinite() & variance.isfinite()).all()
    ):
        return
    scale = (variance + layer.eps).sqrt().clamp(2.0**-8, 2.0 ** ((bits - 17) // 2))
    mantissa, exponent = torch.frexp(scale)
    scale = torch.ldexp((mantissa * 2 ** (bits // 3)).round() / 2 ** (bits // 3), exponent)
    with torch.no_grad():
        for tensor, values in ((layer.weight, scale), (layer.bias, mean)):
            tensor.copy_(values)
        layer.running_mean.copy_(layer.bias)
        layer.running_var.copy_(scale.square() - layer.eps)


def calibrate(module: nn.Module, norms: Iterable[str], batch: Any) -> None:
    """Set BatchNorms that compute the identity to the mean and variance of what they are given.

    Args:
        module: runs once, in ``eval()``; its modes and the global RNG are as before.
        norms: qualified names.
        batch: its input, or a tuple of its positional inputs.

    Raises:
        UsageError: a BatchNorm has no finite statistics on that batch.
    """
    sums: dict[str, list[Tensor]] = {}

    def observe(name: str, x: Tensor) -> None:
        x = x.detach().double().movedim(1, 0).flatten(1)
        seen = [x.new_tensor(x.shape[1]), x.sum(1), x.square().sum(1)]
        sums[name] = [a + b for a, b in zip(sums[name], seen, strict=True)] if name in sums else seen

    modes = {part: part.training for part in module.modules()}
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: observe(name, given[0]))
        for name in norms
    ]
    try:
        module.eval()
        with torch.random.fork_rng(), torch.no_grad():
            module(*batch) if isinstance(batch, tuple) else module(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    for name, (count, first, second) in sums.items():
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=0)
        if not (mean.isfinite() & variance.isfinite()).all():
            raise UsageError(f"the calibration batch gives {name} no finite mean and variance")
        set_moments(module.get_submodule(name), mean, variance)
