"""Fewer blocks: the inverse of `surgery.deepen`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.axes.analysis import Analysis, analyse
from surgery.edit.apply import apply, carry_out
from surgery.edit.blocks import find_block
from surgery.edit.calibration import Calibration
from surgery.edit.flow import Flow
from surgery.edit.names import find_places
from surgery.edit.remove_block import RemoveBlock, removal_step
from surgery.edit.sites import local_name, output_sites
from surgery.errors import EditError, UsageError, whole_number
from surgery.graph.outputs import tensors_in
from surgery.graph.tracing import info
from surgery.selectors import Where


def shorten(module: nn.Module, places: Mapping[Any, int] | Where, *, calibration: Any = None) -> nn.Module:
    """Remove blocks: the result is the network in which the last layers of these blocks are 0, without the blocks.

    A block adds a branch to a skip connection: a ResNet's or an inverted residual block, a layer of a Transformer,
    whatever `deepen` finds. Where the skip has layers of its own, as at the start of a ResNet's stage, they stay, and
    the branch goes. Blocks that `deepen` has put in, and that were not trained since, are removed exactly:
    ``shorten(deepen(m))`` computes what ``m`` computes.

    Args:
        module: a traced module.
        places: blocks (`surgery.selectors`), or how many to remove from a container of several:
            ``{"layer3": 2}``.
        calibration: inputs, as for `surgery.slim`. Of a container's blocks those go that change the outputs least, one
            after the other, in ``eval()``; by default the last ones.

    Returns:
        a new module.

    Raises:
        UsageError: an unknown name, a count below 1, or calibration without inputs.
        EditError: a container that is no block, or has fewer blocks than are to be removed.

    Example:
        >>> short = surgery.shorten(traced, {"layer3": 2}, calibration=images)
        >>> surgery.shorten(surgery.deepen(traced, ["layer3"]), ["layer3.2"])
    """
    return apply(module, shorten_plan(module, places, calibration=calibration))


def shorten_plan(
    module: nn.Module, places: Mapping[Any, int] | Where, *, calibration: Any = None
) -> tuple[RemoveBlock, ...]:
    """The steps that `shorten` takes."""
    info(module)
    counted = isinstance(places, Mapping)
    wanted = find_places(module, places.items() if isinstance(places, Mapping) else [(places, 1)])
    steps: list[RemoveBlock] = []
    for name, count in wanted.items():
        if not counted:
            steps.append(removal_step(module, analyse(module), name))
            continue
        count = whole_number(f"the number of blocks to remove from {name!r}", count, 1)
        names = list(_blocks_in(module, analyse(module), name))
        if len(names) < count:
            raise EditError(f"{name!r} has {len(names)} blocks that can be removed, not {count}")
        blocks = [removal_step(module, analyse(module), block) for block in names]
        steps += blocks[-count:] if calibration is None else _least_damage(module, blocks, count, calibration)
    return tuple(steps)


def _blocks_in(module: nn.Module, analysis: Analysis, name: str) -> Iterator[str]:
    """The outermost containers in ``name`` that are blocks, and no row of blocks, in order."""
    for child, _ in module.get_submodule(name).named_children():
        inner = f"{name}.{child}".lstrip(".")
        if _is_block(module, analysis, inner):
            yield inner
        else:
            yield from _blocks_in(module, analysis, inner)


def _is_block(module: nn.Module, analysis: Analysis, name: str) -> bool:
    try:
        sites = list(output_sites(module, name))
    except (EditError, UsageError):  # several outputs, or it runs more than once
        return False
    found = [find_block(Flow(analysis, s), s.node, local_name(name, s.path)) for s in sites]
    return bool(found) and all(
        one is not None and one[0] == local_name(name, site.path) != "" for one, site in zip(found, sites, strict=True)
    )


def _least_damage(module: nn.Module, blocks: list[RemoveBlock], count: int, calibration: Any) -> list[RemoveBlock]:
    """The blocks whose removal, one after the other, changes the outputs least: by the sum of the squared changes."""
    inputs = Calibration(module, calibration)
    dense = copy.deepcopy(module)
    left, chosen = list(blocks), list[RemoveBlock]()
    for _ in range(count):
        best = min(left, key=lambda block: _damage(carry_out(module, (*chosen, block)), dense, inputs))
        chosen.append(best)
        left.remove(best)
    return sorted(chosen, key=blocks.index)


def _damage(short: nn.Module, dense: nn.Module, inputs: Calibration) -> float:
    """How far the outputs of copies are apart, which may stay in ``eval()``; infinity where that is no number."""
    total = 0.0
    with torch.random.fork_rng(), torch.no_grad():
        for _, batch in inputs.batches():
            outputs = []
            for network in (short, dense):
                torch.manual_seed(0)  # for networks that draw numbers in eval() too
                args, kwargs = pytree.tree_map_only(Tensor, torch.clone, batch)
                outputs.append([t for _, t in tensors_in(network.eval()(*args, **kwargs)) if t.is_floating_point()])
            total += sum(float((a.double() - b.double()).square().sum()) for a, b in zip(*outputs, strict=True))
    return math.inf if math.isnan(total) else total
