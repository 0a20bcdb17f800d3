"""What a network shows on data: gradients of a loss, and means and covariances of what its layers read.

Nothing is computed before a criterion asks for it, and everything is computed once, for all groups. The network runs in
``eval()``, as a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.edit.calibration import Calibration
from surgery.edit.read_rows import Layer
from surgery.edit.readers import Network
from surgery.edit.watch import Read, Watch
from surgery.errors import SurgeryError, UsageError
from surgery.graph.outputs import tensors_in
from surgery.operations.importance.registry import Importance

_ROWS = 16
"""Rows for each channel that covariances are of, at most."""
_LEAST_ROWS = 8192
"""Rows that they are of in any case, if there are so many."""
_FOLDED = 4096
"""With more channels at a layer, the places of a channel behind a flatten are rows of one channel."""
_MOST = 8192
"""The most channels of which there is a covariance."""


@dataclass(eq=False)
class Reading:
    """What a layer that reads a group is given; of a grouped convolution, what one of its conv groups is.

    Attributes:
        name: of the weight.
        units: for each channel the unit of the group that it is of, or -1, (channels,).
        weight: how the layer reads the channels, (channels, numbers), float64.
        count: the number of rows: a row is what is read for one image at one place (or token).
        mean: of each channel, (channels,).
        squares: the sum of squared differences from the mean, (channels,).
        products: the sums of products of differences from the mean, (channels, channels), or None.
    """

    name: str
    units: NDArray[np.int64]
    weight: Tensor
    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0))
    products: Tensor | None = None

    @property
    def variance(self) -> NDArray[np.float64]:
        """Of each channel, over all rows, (channels,)."""
        found: NDArray[np.float64] = (self.squares / max(self.count, 1)).cpu().numpy()
        return found

    def add(self, rows: Tensor, *, joint: bool) -> None:
        """Add rows, (n, channels), float64. Sums of different batches are joined by Chan's formula."""
        n = len(rows)
        if not n:
            return
        if not self.count:
            self.mean, self.squares = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1])
            self.products = rows.new_zeros(rows.shape[1], rows.shape[1]) if joint else None
        mean = rows.mean(0)
        apart, centred = mean - self.mean, rows - mean
        factor = self.count * n / (self.count + n)
        self.squares += centred.square().sum(0) + apart.square() * factor
        if self.products is not None:
            self.products.addmm_(centred.T, centred).addr_(apart, apart, alpha=factor)
        self.mean += apart * (n / (self.count + n))
        self.count += n


class Observed:
    """What a module shows on the data of an importance; ``looked`` says whether they were looked at."""

    def __init__(self, module: nn.Module, analysis: Analysis, importance: Importance) -> None:
        self.module, self.analysis, self.importance = module, analysis, importance
        self.looked = False
        self._readings: dict[bool, Mapping[str, Sequence[Reading]]] = {}

    @cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Of the module, by name; tied ones once."""
        return dict(self.module.named_parameters())

    @cached_property
    def layers(self) -> Mapping[str, nn.Module]:
        """Of the module, by name."""
        return dict(self.module.named_modules())

    @property
    def products(self) -> Mapping[str, NDArray[np.float64]]:
        """By group, the sums of weights times gradients of each batch and unit."""
        return self._backward[0]

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """By parameter, the mean gradient of the batches."""
        return self._backward[1]

    def readings(self, group: DimensionGroup, *, joint: bool) -> Sequence[Reading]:
        """What the readers of a group are given; with covariances if ``joint``."""
        if joint not in self._readings:
            self._readings[joint] = self._forward(joint=joint)
        return self._readings[joint].get(group.name, ())

    def _data(self) -> Calibration:
        if self.importance.data is None:
            raise UsageError(
                f"importance {str(self.importance)!r} looks at data: pass surgery.Importance({str(self.importance)!r}, "
                "data), or --rank-on DATA on the command line"
            )
        self.looked = True
        return Calibration(self.module, self.importance.data, what=f"importance {str(self.importance)!r}")

    @cached_property
    def _backward(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, Tensor]]:
        data = self._data()
        network = copy.deepcopy(self.module).eval()
        parameters = {name: p for name, p in network.named_parameters() if p.is_floating_point()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        products: list[dict[str, Tensor]] = []
        mean: dict[str, Tensor] = {}
        for args, kwargs, batch in data.whole_batches():
            with _running(f"importance {str(self.importance)!r}"), torch.enable_grad():
                args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
                loss = self._loss(network(*args, **kwargs), batch)
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            gradients = {
                name: torch.zeros_like(parameter) if gradient is None else gradient
                for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
            }
            products.append(
                self._by_axis({name: parameters[name].detach().double() * g.double() for name, g in gradients.items()})
            )
            for name, gradient in gradients.items():
                mean[name] = mean[name] + gradient / data.given if name in mean else gradient / data.given
        return {group.name: self._by_unit(group, products) for group in self.analysis.groups}, mean

    def _by_axis(self, products: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each axis of a parameter that is a member, the sum at each of its positions."""
        members = {(m.name, m.axis): m for group in self.analysis.groups for m in group.members if m.name in products}
        rows = ((m, products[m.name].movedim(m.axis, 0)) for m in members.values())
        return {str(m): found.reshape(len(found), -1).sum(1) for m, found in rows}

    def _by_unit(self, group: DimensionGroup, batches: Sequence[Mapping[str, Tensor]]) -> NDArray[np.float64]:
        found = np.zeros((len(batches), group.units))
        for member in group.members:
            units = self.analysis.axis_units[member.name, member.axis] - group.start
            held = (units >= 0) & (units < group.units)
            for row, batch in zip(found, batches, strict=True):
                if str(member) in batch:
                    values = batch[str(member)].cpu().numpy()
                    row += np.bincount(units[held], weights=values[held], minlength=group.units)
        return found

    def _loss(self, result: Any, batch: Any) -> Tensor:
        if self.importance.loss is not None:
            loss = self.importance.loss(result, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise UsageError(f"the loss of importance {str(self.importance)!r} must return a scalar tensor")
            return loss
        first = next((tensor for path, tensor in tensors_in(result) if path in _LOGITS), None)
        labels = _labels(batch)
        if first is None or labels is None or first.ndim < 2:
            raise UsageError(
                f"importance {str(self.importance)!r} takes the cross-entropy of logits and labels, so its data are "
                "batches of (inputs, labels). For another loss pass surgery.Importance(..., loss=)"
            )
        return F.cross_entropy(first, labels)

    def _forward(self, *, joint: bool) -> Mapping[str, Sequence[Reading]]:
        data = self._data()
        found: dict[tuple[str, int, int, str], Reading] = {}
        with _running(f"importance {str(self.importance)!r}"), torch.no_grad():
            network = Network(self.module)
            data.split_if_alike(network.module)
            for number, inputs in data.batches():
                args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)

                def read(one: Read, y: Tensor, number: int = number) -> None:
                    self._read(found, one, joint, number, data.count)

                torch.manual_seed(0)
                with Watch(network.book, read, lambda *_: None):
                    network.module(*args, **kwargs)
        by_group: dict[str, list[Reading]] = {}
        for (*_, name), reading in found.items():
            by_group.setdefault(name, []).append(reading)
        return by_group

    def _read(
        self, found: dict[tuple[str, int, int, str], Reading], one: Read, joint: bool, number: int, batches: int
    ) -> None:
        """Add what a layer is given to the readings of the groups that it reads."""
        layer, weight = one.layer, one.weight
        key = one.part.name, 0 if layer.transposed else 1
        if "consumer" not in self.analysis.roles.get(key, ()):  # as the channels of a depthwise convolution are not
            return
        units = self.analysis.axis_units[key]
        groups = [g for g in self.analysis.groups if ((units >= g.start) & (units < g.start + g.units)).any()]
        rows = _rows(layer.spatial, one.x)
        width = rows.shape[1] // layer.groups
        if joint:
            most = max(_LEAST_ROWS, _ROWS * width) // batches + 1
            if len(rows) > most:
                at = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))[:most]
                rows = rows[at.to(rows.device)]
        own = units.reshape(layer.groups, -1) if layer.transposed else np.tile(units, (layer.groups, 1))
        for k, part in enumerate(rows.reshape(len(rows), layer.groups, width).unbind(1)):
            for group in groups:
                mine = own[k] - group.start
                mine = np.where((mine >= 0) & (mine < group.units), mine, -1)
                which = (one.part.name, one.part.first, k, group.name)
                if which not in found:
                    found[which] = Reading(one.part.name, mine, _columns(layer, weight, k))
                held: Tensor | None = part.double()
                if joint:
                    held = _fold(found[which], mine, part.double())
                if held is not None:
                    found[which].add(held, joint=joint)


_LOGITS = ("", "['logits']", ".logits", "[0]")
"""Where logits stand in what a network returns."""


def _labels(batch: Any) -> Tensor | None:
    """The labels of a batch, (images,): the last of what it holds."""
    found = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def _rows(spatial: int, x: Tensor) -> Tensor:
    """What a layer reads, (rows, channels)."""
    if not spatial:
        return x.reshape(-1, x.shape[-1])
    if x.ndim == spatial + 1:
        x = x.unsqueeze(0)
    return x.movedim(1, -1).flatten(0, -2)


def _columns(layer: Layer, weight: Tensor, group: int) -> Tensor:
    """How the channels of a conv group are read, (channels, numbers)."""
    rows = weight.detach().double().chunk(layer.groups)[group]
    return rows.flatten(1) if layer.transposed else rows.transpose(0, 1).flatten(1)


def _fold(reading: Reading, units: NDArray[np.int64], rows: Tensor) -> Tensor | None:
    """Rows with as many channels as a covariance may be of; None where there are too many."""
    if rows.shape[1] <= _FOLDED:
        return rows
    inside = np.flatnonzero(units >= 0)
    order = inside[np.argsort(units[inside], kind="stable")]
    kinds, counts = np.unique(units[inside], return_counts=True)
    if len(set(counts.tolist())) > 1 or len(kinds) > _MOST:
        return None
    at = torch.from_numpy(order).to(rows.device)
    if not reading.count:
        reading.units = kinds
        reading.weight = reading.weight[at].reshape(len(kinds), -1)
    return rows[:, at].reshape(len(rows), len(kinds), -1).transpose(1, 2).flatten(0, 1)


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Keep the state of random numbers, and name what the network was run for where it fails."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    except SurgeryError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise UsageError(f"the network does not run on the data of {what}: {said}") from error
