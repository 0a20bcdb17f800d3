"""What an importance criterion is told of a dimension group: its weights, gradients, and what its readers are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup, Member
from surgery.operations.importance.observed import Observed, Reading
from surgery.operations.importance.registry import Scores, find_entry


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of a parameter that goes with a group: the positions along a member's axis that hold its units.

    Attributes:
        member: the parameter's name, the axis and its role.
        units: for each position the unit that it holds, (positions,). A unit may be at several: the channels of a
            head, the places of a channel behind a flatten; and at none, behind a concatenation.
        count: how many units the group has.
    """

    member: Member
    units: NDArray[np.int64]
    count: int
    tensor: Tensor
    held: NDArray[np.bool_]
    gradients: Tensor | None = None

    @cached_property
    def weight(self) -> NDArray[np.float64]:
        """The weights at each position, (positions, numbers), a copy in float64."""
        return self._rows(self.tensor)

    @property
    def gradient(self) -> NDArray[np.float64]:
        """The gradient of the loss, a mean over the batches, (positions, numbers)."""
        assert self.gradients is not None
        return self._rows(self.gradients)

    @property
    def squares(self) -> NDArray[np.float64]:
        """The sum of the squared weights at each position, (positions,)."""
        weight = self.tensor.detach().double().square().movedim(self.member.axis, 0)
        along: NDArray[np.float64] = weight.reshape(len(weight), -1).sum(1).cpu().numpy()
        return along[self.held]

    def sum(self, values: NDArray[np.float64]) -> Scores:
        """Add up what is given for each position, (positions,), by unit, (units,)."""
        found: Scores = np.bincount(self.units, weights=values, minlength=self.count)  # type: ignore[assignment]
        return found

    def _rows(self, tensor: Tensor) -> NDArray[np.float64]:
        rows = tensor.detach().movedim(self.member.axis, 0)[torch.from_numpy(self.held).to(tensor.device)]
        found: NDArray[np.float64] = rows.reshape(len(rows), -1).double().cpu().numpy()
        return found


class Scored:
    """A group whose units are to be scored, as `surgery.importance` hands it to a criterion.

    Attributes:
        module: the traced module. It is not to be changed.
        group: the group.
        seed: of what is random.

    Example:
        >>> @surgery.importance("l1", words="those with the largest sums of absolute weights")
        ... def l1(scored):
        ...     return sum(one.sum(abs(one.weight).sum(1)) for one in scored.slices)
    """

    def __init__(self, module: nn.Module, analysis: Analysis, group: DimensionGroup, observed: Observed) -> None:
        self.module, self.group = module, group
        self.seed = observed.importance.seed
        self.replaced = ""
        """Which criterion scores the group instead, and why; empty where none does."""
        self._analysis, self._observed = analysis, observed

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The parts of parameters that go with the group, in the order of its members. Buffers have none."""
        return tuple(self._slice(member) for member in self.group.members if member.name in self._observed.parameters)

    @property
    def filters(self) -> tuple[Slice, ...]:
        """Those of `slices` that are rows of weights which write the group's channels: of parameters with at least two
        axes, by the axis that produces."""
        return tuple(one for one in self.slices if one.member.role in ("producer", "both") and one.tensor.ndim > 1)

    @property
    def products(self) -> NDArray[np.float64]:
        """For each batch of the data and each unit the sum of ``weight * gradient`` over all `slices`, (batches,
        units): to first order, by how much the loss falls if the unit's weights become 0.

        Raises:
            UsageError: there are no data, no labels, or the network does not run on them.
        """
        return self._observed.products[self.group.name]

    @property
    def gradients(self) -> tuple[Slice, ...]:
        """As `slices`, with `Slice.gradient`.

        Raises:
            UsageError: as `products`.
        """
        found = self._observed.gradients
        return tuple(
            Slice(one.member, one.units, one.count, one.tensor, one.held, found[one.member.name]) for one in self.slices
        )

    @property
    def readings(self) -> Sequence[Reading]:
        """What the layers that read the group are given on the data: means and variances.

        Raises:
            UsageError: there are no data, or the network does not run on them.
        """
        return self._observed.readings(self.group, joint=False)

    @property
    def joint_readings(self) -> Sequence[Reading]:
        """As `readings`, with covariances, from up to 16 rows for each channel (at least 8192 in all).

        Raises:
            UsageError: as `readings`.
        """
        return self._observed.readings(self.group, joint=True)

    def layer(self, member: Member) -> nn.Module | None:
        """The layer that a member's parameter belongs to; None where it is not a layer's."""
        return self._observed.layers.get(member.layer)

    def instead(self, name: str, why: str) -> Scores:
        """Score the group by another criterion, where this one cannot. The caller is warned, with the reason.

        Args:
            name: of the other criterion.
            why: the reason, as the end of a sentence: ``"it has no norm"``.

        Returns:
            the other criterion's scores. Such a group keeps its own rate where groups are ranked together.
        """
        scores: Scores = find_entry(name).function(self)
        self.replaced = f"by {name}: {why}"
        return scores

    def _slice(self, member: Member) -> Slice:
        units = self._analysis.axis_units[member.name, member.axis] - self.group.start
        held = (units >= 0) & (units < self.group.units)
        return Slice(member, units[held], self.group.units, self._observed.parameters[member.name], held)
