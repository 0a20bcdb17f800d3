"""Lottery tickets: masks by magnitude, weights of an early step under them, and training that keeps to the mask.

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019: train, keep the largest weights, set these back to what
they were at the start, and train again. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
ICML 2020: set them back to an early step k instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UsageError, unknown_name
from surgery.graph.traced import named_tensors
from surgery.graph.tracing import info
from surgery.operations.masks import by_first_name, largest, tensors_of
from surgery.selectors import Where

SCOPES = ("layer", "global")


def magnitude_masks(
    module: nn.Module,
    sparsity: float,
    *,
    scope: str = "layer",
    within: Mapping[str, Tensor] | None = None,
    vectors: bool = False,
    whole: Where = (),
) -> dict[str, Tensor]:
    """A bool tensor for each parameter, True for the weights of largest magnitude.

    Exactly ``ceil((1 - sparsity) * n)`` of ``n`` weights are kept, those of a tie in their order. For iterative pruning
    pass the masks before as ``within``, and the sparsity that all rounds together come to: ``1 - (1 - p) ** rounds``
    where each prunes the fraction ``p`` of what is left.

    Args:
        module: a traced, trained module.
        sparsity: the fraction of weights that is pruned, in [0, 1).
        scope: ``"layer"``: of each parameter that fraction; ``"global"``: of all together, the smallest anywhere.
        within: masks that the new ones lie within.
        vectors: prune parameters of one dimension too: biases and norms. By default they are kept whole.
        whole: further layers, containers or parameters that are kept whole (`surgery.selectors`): ``["fc", "*.bias"]``.

    Returns:
        by qualified name, tied parameters under each of theirs.

    Raises:
        UsageError: a sparsity outside [0, 1), an unknown scope or name, weights that are not numbers, or ``within``
            keeps fewer weights than are to be kept.

    Example:
        >>> masks = surgery.magnitude_masks(trained, 0.8, whole="fc")
    """
    info(module)
    if isinstance(sparsity, bool) or not (isinstance(sparsity, Real) and 0 <= sparsity < 1):
        raise UsageError(f"sparsity must be in [0, 1), not {sparsity}")
    sparsity = float(sparsity)
    if scope not in SCOPES:
        raise unknown_name("scope", scope, SCOPES)
    before = by_first_name(module, within or {})
    parameters = dict(module.named_parameters())
    left = tensors_of(module, whole)
    chosen = {n: p for n, p in parameters.items() if (vectors or p.ndim > 1) and id(p) not in left}
    scores = {}
    for name, parameter in chosen.items():
        score = parameter.detach().abs().flatten()
        scores[name] = score if name not in before else score.masked_fill(~before[name].flatten(), -1.0)
    masks = {n: torch.ones_like(p, dtype=torch.bool) if n not in before else before[n].clone()
             for n, p in parameters.items()}  # fmt: skip
    if scope == "layer":
        masks |= {name: _largest(score, sparsity, name).view(chosen[name].shape) for name, score in scores.items()}
    elif scores:
        device = next(iter(scores.values())).device
        together = _largest(torch.cat([score.to(device) for score in scores.values()]), sparsity, "the network")
        parts = torch.split(together, [score.numel() for score in scores.values()])
        masks |= {n: part.to(p.device).view(p.shape) for (n, p), part in zip(chosen.items(), parts, strict=True)}
    first = {id(p): n for n, p in parameters.items()}
    return {name: masks[first[id(p)]] for name, p in module.named_parameters(remove_duplicate=False)}


def rewind(module: nn.Module, weights: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> nn.Module:
    """A ticket: a copy of ``module`` with the weights of an early step where the masks are true, and 0 elsewhere.

    What has no mask is taken whole. Buffers of the state dict, such as statistics of norms, are those of the early step
    too, as far as ``weights`` has them.

    Args:
        module: a traced module. It is not changed, and nothing is shared with it.
        weights: the module at step k (0: as it was initialised), or its state dict.
        masks: a bool tensor for each parameter (`magnitude_masks`).

    Returns:
        a new module.

    Raises:
        UsageError: masks that do not fit, or a parameter that ``weights`` lacks or has in another shape.

    Example:
        >>> ticket = surgery.rewind(trained, initial, surgery.magnitude_masks(trained, 0.8))
    """
    info(module)
    given = named_tensors(weights) if isinstance(weights, nn.Module) else weights
    kept = by_first_name(module, masks)
    result = copy.deepcopy(module)
    parameters = {name for name, _ in module.named_parameters()}
    with torch.no_grad():
        for name, tensor in result.state_dict(keep_vars=True).items():
            early = given.get(name)
            if early is None and name in parameters:
                raise UsageError(f"the weights to rewind to have no {name!r}")
            if early is not None and early.shape != tensor.shape:
                raise UsageError(
                    f"{name!r} is {tuple(early.shape)} at the step to rewind to, not {tuple(tensor.shape)}"
                )
            if early is not None:
                tensor.copy_(early)
    hold_masked(result, kept)()
    return result


def hold_masked(module: nn.Module, masks: Mapping[str, Tensor]) -> Callable[..., None]:
    """A function that sets the masked weights of ``module`` to 0, in place.

    Called after each step of an optimiser it keeps a ticket to its mask, whatever momentum and weight decay do. It
    takes any arguments and so can be registered: ``optimizer.register_step_post_hook(hold_masked(ticket, masks))``.
    Called with a module, as ``after_step`` of `surgery.train` is, it holds that copy of ``module`` instead. It
    holds the masks in the weights' dtype.

    Args:
        module: the ticket that is trained.
        masks: a bool tensor for each parameter (`magnitude_masks`).

    Returns:
        the function.

    Raises:
        UsageError: masks that do not fit.

    Example:
        >>> optimizer.register_step_post_hook(surgery.hold_masked(ticket, masks))
    """
    parameters = dict(module.named_parameters())
    pruned = {name: mask for name, mask in by_first_name(module, masks).items() if not bool(mask.all())}
    factors: list[Tensor] = [mask.to(parameters[name].dtype) for name, mask in pruned.items()]

    def hold(*called: Any) -> None:
        copied = bool(called) and isinstance(called[0], nn.Module) and called[0] is not module
        held = dict(called[0].named_parameters()) if copied else parameters
        weights: list[Tensor] = [held[name] for name in pruned]
        if weights:
            with torch.no_grad():
                torch._foreach_mul_(weights, factors)

    return hold


def _largest(scores: Tensor, sparsity: float, where: str) -> Tensor:
    """True at the largest ``scores``, exactly as many as are kept; negative scores are never among them."""
    if bool(scores.isnan().any()):
        raise UsageError(f"there are weights of {where} that are not numbers: none of these is the largest")
    count = math.ceil(round((1 - sparsity) * len(scores), 6))
    available = int((scores >= 0).sum())
    if count > available:
        raise UsageError(
            f"within keeps {available} of {len(scores)} weights of {where}, and a sparsity of {sparsity:g} is {count}: "
            "ask for a higher one"
        )
    return largest(scores, count)
