"""Drawing the reset-hypothesis again: what Knowledge Evolution does between two generations.

Taha, Shrivastava, Davis, CVPR 2021, section 3: ``F <- M * F + (1 - M) * F_r``, where ``M`` is the mask of a tensor
``F`` and ``F_r`` is random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.axes.analysis import analyse
from surgery.edit.switch_off import kept_units
from surgery.errors import UsageError, unknown_name, whole_number
from surgery.graph.rule_table import rule_of_class
from surgery.graph.tracing import info
from surgery.operations.initial import Fresh, initial_values, seeded_draws
from surgery.operations.masks import by_first_name, tensors_of
from surgery.selectors import Where


def reset_hypothesis(
    module: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    seed: int = 0,
    weights: bool = True,
    biases: bool = True,
    norms: bool = True,
    statistics: bool = True,
    initialiser: str = "own",
    fresh: Fresh | None = None,
    unknown: str = "refuse",
    trust: bool = False,
    whole: Where = (),
) -> nn.Module:
    """Draw every entry outside of the fit-hypothesis again (Knowledge Evolution, section 3).

    With ``initialiser="own"`` it is drawn as in a new model: from ``fresh``, or from the architecture that the module's
    source names, built again at the module's own widths; without either, as the layer's class does it in
    ``reset_parameters``. Constructors may do otherwise than the classes of their layers (those of ResNets and
    Transformers do): trace with ``source=``, or pass ``fresh``. Layers that `deepen` inserted as identities are drawn
    by their class.

    Args:
        module: a traced module. It is not changed, nor is the global random state, and nothing is shared with it.
        masks: a bool tensor for each parameter, True where it is kept (`split_masks`, `magnitude_masks`). What has no
            mask is kept.
        seed: of the draw, at least 0. A model made with ``torch.manual_seed`` of the same number is not made again.
        weights: draw parameters of two and more dimensions, class tokens and tables of positions among them.
        biases: draw vectors, save those of norms.
        norms: give weights and biases of torch's normalisation layers their initial values, mostly 1 and 0.
        statistics: give running means and variances their initial values, 0 and 1, in the channels whose masks in
            the layer keep nothing (of a layer without weights: the masks of the layers that write them); its count of
            batches restarts where there are any. Other buffers are kept.
        initialiser: ``"own"``; or ``"authors"``, what their code runs: weights of convolutions and linear layers
            uniform within ``1 / sqrt(fan_in)``, which is about 0.4 of the deviation that their networks begin with, and
            all else kept: biases, norms and statistics, whatever the switches say.
        fresh: a newly initialised model with the names of ``module``, or a function that makes one, which is called
            with the global generator seeded. Where ``module`` was edited since, a function is better: it is called
            twice, and the second time its parameters have the edited shapes.
        unknown: ``"refuse"`` or ``"keep"`` parameters that nothing initialises: those of a class of your own that stand
            outside of layers, without a source and without ``fresh``.
        trust: allow a source of the form ``package.module:factory`` to be imported and called.
        whole: layers, containers or parameters that are kept whatever the masks say (`surgery.selectors`).

    Returns:
        a new module.

    Raises:
        UsageError: masks that do not fit, an unknown choice, a negative seed, a source that cannot be built, or
            parameters that nothing initialises.

    Example:
        >>> masks = surgery.split_masks(traced, 0.5)
        >>> next_generation = surgery.reset_hypothesis(traced, masks, seed=1)
    """
    info(module)
    if initialiser not in ("own", "authors"):
        raise unknown_name("initialiser", initialiser, ("own", "authors"))
    if unknown not in ("refuse", "keep"):
        raise unknown_name("way with unknown parameters", unknown, ("refuse", "keep"))
    seed = whole_number("seed", seed, 0)
    left = tensors_of(module, whole)
    given = {name: id(p) for name, p in module.named_parameters()}
    kept = {name: mask for name, mask in by_first_name(module, masks).items() if given[name] not in left}
    kinds = _kinds(module)
    authors = initialiser == "authors"
    chosen = {"weights": weights, "biases": biases and not authors, "norms": norms and not authors}
    names = [name for name, mask in kept.items() if chosen[kinds[name]] and not bool(mask.all())]
    if authors:
        values = _draw_uniform(module, names, seed)
    else:
        values = initial_values(module, names, seed=seed, fresh=fresh, trust=trust)
        _refuse_unknown([name for name in names if name not in values], unknown)
    parameters = dict(module.named_parameters())
    memo: dict[int, Any] = {
        id(parameters[name]): _mix(parameters[name], kept[name], value) for name, value in values.items()
    }
    result = copy.deepcopy(module, memo)
    if statistics and not authors:
        _reset_statistics(module, result, kept, left)
    return result


def _kinds(module: nn.Module) -> dict[str, str]:
    """Whether a parameter, by its first name, is one of the weights, biases or norms."""
    norms = {id(p) for layer in module.modules() if rule_of_class(layer).norm for p in layer.parameters(recurse=False)}
    return {
        name: "norms" if id(p) in norms else "weights" if p.ndim > 1 else "biases"
        for name, p in module.named_parameters()
    }


def _draw_uniform(module: nn.Module, names: list[str], seed: int) -> dict[str, Tensor]:
    """Weights of convolutions and linear layers as the authors' code draws them."""
    layers = {name.removesuffix(".weight"): name for name in names if name.endswith(".weight")}
    with seeded_draws(seed):
        return {
            name: nn.init.kaiming_uniform_(torch.empty(layer.weight.shape), a=math.sqrt(5))
            for path, name in layers.items()
            if _is_matrix(layer := cast(Any, module.get_submodule(path)))
        }


def _is_matrix(layer: nn.Module) -> bool:
    """Whether a layer contracts its input with its weight: a convolution or linear layer."""
    rule = rule_of_class(layer)
    return rule.linear == "writes" and "weight" in rule.zeros


def _refuse_unknown(names: list[str], unknown: str) -> None:
    if names and unknown == "refuse":
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UsageError(
            f"nothing says how to initialise {listed}: trace with source=, pass fresh= (a new model with these "
            "parameters in these shapes, or a function that makes one), or keep them with unknown='keep'"
        )


def _mix(parameter: nn.Parameter, mask: Tensor, value: Tensor) -> nn.Parameter:
    """``parameter`` where the mask is true, ``value`` elsewhere, in the memory format of ``parameter``."""
    drawn = torch.empty_like(parameter, requires_grad=False).copy_(value)
    torch.where(mask, parameter.detach(), drawn, out=drawn)
    return nn.Parameter(drawn, requires_grad=parameter.requires_grad)


def _reset_statistics(module: nn.Module, result: nn.Module, kept: Mapping[str, Tensor], left: set[int]) -> None:
    """Give the statistics of ``result``, a copy of ``module``, their initial values where nothing is kept."""
    names = {id(p): name for name, p in reversed(list(module.named_parameters()))}
    for path, layer in module.named_modules():
        spared = any(id(buffer) in left for buffer in layer.buffers(recurse=False))
        if spared or not hasattr(layer, "reset_running_stats"):
            continue
        own = [names[id(p)] for p in layer.parameters(recurse=False)]
        if own:
            masks = [kept[name] for name in own if name in kept]
            gone = ~torch.stack(masks).any(0) if masks else None
        else:
            gone = _find_unwritten(module, path, layer, kept)
        if gone is None or not bool(gone.any()):
            continue
        copied: Any = result.get_submodule(path)
        copied.reset_running_stats()
        for name, buffer in layer.named_buffers(recurse=False):
            if buffer.shape == gone.shape:
                initial = copied.get_buffer(name)
                torch.where(gone, initial.clone(), buffer, out=initial)


def _find_unwritten(module: nn.Module, path: str, layer: nn.Module, kept: Mapping[str, Tensor]) -> Tensor | None:
    """For each channel of a layer without parameters, whether the masks keep nothing of what it is given."""
    analysis = analyse(module)
    for name, buffer in layer.named_buffers(recurse=False):
        units = analysis.axis_units.get((f"{path}.{name}", 0))
        if units is not None:
            return ~torch.from_numpy(kept_units(module, analysis, kept)[units]).to(buffer.device)
    return None
