"""What an edit would give, before it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.axes.analysis import analyse
from surgery.axes.network_outputs import Outputs, parse_outputs
from surgery.counting.cost import Cost, cost
from surgery.counting.planned import planned_cost
from surgery.edit.apply import apply
from surgery.edit.checks import check_index, check_layouts
from surgery.edit.layout import Layouts
from surgery.edit.reindex import Reindex, reindex_step
from surgery.graph.traced import named_tensors
from surgery.operations.importance.registry import How, UnitScores
from surgery.operations.importance.scores import score_units
from surgery.operations.slim import Rate, slim_step
from surgery.units import mebibytes, quantity


@dataclass(frozen=True)
class Plan:
    """What an edit would give; ``surgery.apply(module, plan.step)`` makes it."""

    step: Reindex
    """The edit."""
    cost: Cost
    """What one sample would cost."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters and buffers, by qualified name; tied ones under the first."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return self.cost.macs

    @property
    def params(self) -> int:
        """Number of parameters."""
        return self.cost.params

    @property
    def bytes(self) -> int:
        """Bytes of parameters and buffers."""
        return self.cost.bytes

    def __str__(self) -> str:
        return (
            f"{self.step}; parameters {quantity(self.params)}, MACs an input {quantity(self.macs)}, "
            f"size {mebibytes(self.bytes)}"
        )


Wanted = Rate | Mapping[Any, Sequence[int]]
"""What `slim` takes as a rate, or `reindex` as indices."""


def plan(
    module: nn.Module,
    wanted: Wanted,
    *,
    round_to: int = 1,
    importance: How = "prefix",
    ranking: str = "local",
    outputs: Outputs = None,
) -> Plan:
    """Say what `slim` or `reindex` would give, without making it: thousands of candidates can be compared.

    MACs, parameters and bytes are those that `cost` counts of the result; where an op has to become a selection of
    positions, as a channel shuffle may, these take 8 bytes each on top. Where that cannot be told from shapes, as of a
    model that runs Python between its traced parts, or has a recurrent layer, the result is made and counted, which
    takes longer.

    Args:
        module: a traced module.
        wanted: as for `slim`, a split rate or one for each of some selectors; or as for `reindex`, an index for each.
        round_to, importance, ranking, outputs: as for `slim`; ``"prefix"`` looks at no weights.

    Returns:
        the step, its cost, and the shapes it gives.

    Raises:
        UsageError: as `slim`, `reindex` or `cost`.
        EditError: a unit that must stay is dropped, nothing would be left of a layer, or copies cannot be made exactly.
            (What an op of the graph cannot follow is noticed when the step is applied.)

    Example:
        >>> affordable = [rate for rate in (0.75, 0.5, 0.25) if surgery.plan(traced, rate).macs < 1e9]
    """
    options: dict[str, Any] = {"importance": importance, "ranking": ranking, "outputs": outputs}
    return next(plans(module, [wanted], round_to=round_to, **options))


def plans(
    module: nn.Module,
    wanted: Iterable[Wanted],
    *,
    round_to: int = 1,
    importance: How = "prefix",
    ranking: str = "local",
    outputs: Outputs = None,
) -> Iterator[Plan]:
    """Say what each of many edits of one model would give, one after another; `plan` is of one.

    The module is looked at once, when the first is asked for: do not change it before the last.

    Args:
        module: a traced module.
        wanted: for each edit, what `plan` takes.
        round_to, importance, ranking, outputs: as for `plan`. Channels are scored once.

    Returns:
        an iterator over the plans, in order.

    Raises:
        UsageError, EditError: as `plan`, when the plan is reached.

    Example:
        >>> rates = ({"layer3": a, "layer4": b} for a in (0.75, 0.5) for b in (0.5, 0.25))
        >>> best = min(surgery.plans(traced, rates), key=lambda plan: abs(plan.macs - 1e9))
    """
    free = parse_outputs(outputs)
    analysis = analyse(module, free)
    planned = planned_cost(module, analysis)
    scores: UnitScores | None = None
    for one in wanted:
        indexed = isinstance(one, Mapping) and any(isinstance(value, Sequence) for value in one.values())
        if indexed:
            step = reindex_step(analysis, module, one, free=free)  # type: ignore[arg-type]  # all of one kind
        else:
            if scores is None:
                scores = score_units(module, analysis, importance, [g for g in analysis.groups if g.editable])
            step = slim_step(analysis, module, one, round_to, scores, ranking, free=free)  # type: ignore[arg-type]
        indices = {analysis.find(name): index for name, index in step.indices.items()}
        if indexed:  # what `slim` keeps can be kept
            for group, index in indices.items():
                check_index(group, index, None)
            check_layouts(analysis, Layouts(analysis, indices, {}))
        if planned.known:
            shapes, found = planned.under(indices)
            yield Plan(step, found, shapes)
        else:
            result = apply(module, step)
            shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(result, once=True).items()}
            yield Plan(step, cost(result), shapes)
