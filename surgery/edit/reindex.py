"""`Reindex`: gather dimension groups by an index. The one primitive for slimming, pruning, widening and permuting.

Each parameter axis is gathered once, straight into the result. The graph's constants and the layers' attributes follow
by the rule table. An op that moves data and can no longer express what is asked of it becomes a selection.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.edit.apply import apply
from surgery.edit.checks import check_index, check_layouts
from surgery.edit.compensate import compensate
from surgery.edit.copies import Noise
from surgery.edit.gather import changed_tensors, gather_tensors
from surgery.edit.kept_outputs import follow_outputs
from surgery.edit.layout import Layout, Layouts
from surgery.edit.means import Expansion
from surgery.edit.names import resolve
from surgery.edit.rewire import rewire
from surgery.edit.step import MEAN, AxisOrigin, Origin, Step
from surgery.edit.untraced_calls import follow_untraced_calls
from surgery.graph.traced import info, with_info


@dataclass(frozen=True)
class Reindex(Step):
    """Gather dimension groups by an index.

    Attributes:
        indices: for each group, by name, the old unit that each new unit copies, or `MEAN`.
        shares: for each group that is named, and each new unit, the factor of the layers that contract over it; the
            factors of one old unit's copies sum to 1, that of a mean is 0. By default copies share evenly
            (Net2WiderNet, section 3.1 of Chen et al. 2016).
        noise: on the weights of the copies.
        outputs: the outputs of the network that may change, as patterns of their names; ``"*"`` for all.
    """

    indices: Mapping[str, tuple[int, ...]]
    shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    noise: Noise | None = None
    outputs: tuple[str, ...] = ()

    def apply(self, module: nn.Module) -> nn.Module:
        """See `Step.apply`."""
        return gather(module, analyse(module, self.outputs), self)

    def origins(self, module: nn.Module) -> dict[str, Origin]:
        """See `Step.origins`."""
        return gathered_origins(module, analyse(module, self.outputs), self)

    def describe(self) -> str:
        """See `Step.describe`."""
        named = [f"{name} to {len(index)}" for name, index in self.indices.items()]
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        what = [text for text in (bool(self.shares) * "uneven shares", self.noise and str(self.noise)) if text]
        return f"Reindex: {', '.join(named[:4]) or 'no group'}{more}{bool(what) * ', with '}{' and '.join(what)}"


def reindex(
    module: nn.Module,
    indices: Mapping[Any, Sequence[int]],
    shares: Mapping[Any, Sequence[float]] | None = None,
    *,
    outputs: Outputs = None,
    calibration: Any = None,
) -> nn.Module:
    """Gather dimension groups by an index.

    Args:
        module: a traced module.
        indices: for the groups that layers write (`surgery.selectors` says which), the old unit for each new one.
            Dropping, copying and moving units are all indices: ``[0, 1]`` keeps two, ``[0, 1, 1]`` copies the second.
        shares: for a group with copies, the factor with which consumers weigh each new unit, 0 for a mean; by default
            even.
        outputs: the outputs of the network that may change: ``"free"`` for all, or their names (`surgery.outputs`).
            Channels alone do, positions and the batch never. `surgery.verify` compares what is left.
        calibration: inputs on which the layers that read an edited axis take over what was removed, as in
            `surgery.slim`.

    Returns:
        a new module.

    Raises:
        UsageError: an unknown name of a layer or output, an index out of range or empty, shares of a unit's copies that
            do not sum to 1; calibration inputs as for `surgery.slim`.
        EditError: a unit that must stay is dropped, or copies cannot be made exactly.

    Example:
        >>> surgery.reindex(traced, {"conv1": [0, 1, 1]})
        >>> surgery.reindex(traced, {"fc": [0, 2, 5]}, outputs="free")  # a classifier of three of its classes
    """
    free = parse_outputs(outputs)
    return carve(module, reindex_step(analyse(module, free), module, indices, shares, free), calibration)


def carve(module: nn.Module, step: Reindex, calibration: Any = None) -> nn.Module:
    """Carry ``step`` out and, where there are inputs for it, compensate for what it removes."""
    result = apply(module, step)
    if calibration is None:
        return result
    return compensate(module, result, analyse(module, step.outputs), step.origins(module), calibration)


def reindex_step(
    analysis: Analysis,
    module: nn.Module,
    indices: Mapping[Any, Sequence[int]],
    shares: Mapping[Any, Sequence[float]] | None = None,
    free: tuple[str, ...] = (),
) -> Reindex:
    """The step that `reindex` takes; ``analysis`` is of ``module``, with these outputs ``free``."""
    wished = {where: tuple(int(i) for i in index) for where, index in indices.items()}
    weighed = {where: tuple(float(v) for v in values) for where, values in (shares or {}).items()}
    by_group = {group.name: index for group, index in resolve(analysis, module, wished, frozen=True).items()}
    by_share = {group.name: values for group, values in resolve(analysis, module, weighed).items()}
    return Reindex(by_group, by_share, outputs=free)


def gathered_origins(module: nn.Module, analysis: Analysis, step: Reindex) -> dict[str, Origin]:
    """Where the tensors come from that ``step`` changes in ``module``."""
    layouts = Layouts(analysis, {analysis.find(name): index for name, index in step.indices.items()}, {})

    def axis(layout: Layout | None) -> AxisOrigin | None:
        if layout is None:
            return None
        old, mean = torch.from_numpy(layout.old), torch.from_numpy(layouts.is_mean[layout.unit])
        return AxisOrigin(old.masked_fill(mean, MEAN), torch.from_numpy(layouts.further[layout.unit]))

    return {
        name: Origin(name, tuple(axis(axes.get(k)) for k in range(tensor.ndim)))
        for name, tensor, axes in changed_tensors(module, analysis, layouts)
    }


def gather(module: nn.Module, analysis: Analysis, step: Reindex) -> nn.Module:
    """A new module with ``step`` done to it; ``analysis`` is of ``module``."""
    indices = {analysis.find(name): index for name, index in step.indices.items()}
    shares = {analysis.find(name): values for name, values in step.shares.items()}
    for group, index in indices.items():
        check_index(group, index, shares.get(group))
    expansion = Expansion(module, analysis, {g: index for g, index in indices.items() if MEAN in index})
    layouts = Layouts(analysis, indices, shares)
    check_layouts(analysis, layouts)
    result = copy.deepcopy(module, gather_tensors(module, analysis, layouts, expansion, step.noise))
    rewire(module, result, analysis, layouts)
    with_info(result, kept=follow_outputs(analysis, layouts, info(module).kept))
    expansion.adjust(result)
    follow_untraced_calls(result, analysis, layouts)
    return result
