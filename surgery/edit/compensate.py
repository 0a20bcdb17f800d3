"""Compensation: the layers of a slim network take over what the removed channels gave.

Carving a network drops the columns of every layer that read a removed channel. What these channels said is in part said
by the kept ones too, and a layer that reads them can learn to listen to those: by least squares, without a gradient.
Layer by layer, in the order in which they run, its weights become those for which it gives, on what the *slim* network
gives it, what it gave in the dense network (its kept outputs):

    min over W, c of  sum |y_dense - W x_slim - c|^2 + damping * d * |W - W_carved|^2

with ``d`` the mean variance of its inputs (for a convolution, of the patches that it reads, padding included). As the
layers before it are fitted already, errors do not add up. The damping is the one of a few with the smallest error on
every fourth batch, which is held out; the carved layer as it was is one of the choices.

The layers that read an edited axis are fitted, one after the other: both networks run again for each, so that no
activation is stored, and there is one matrix of sums (`surgery.edit.ridge`) at a time. Of the same kind are the least
squares of channel pruning (He, Zhang and Sun, ICCV 2017, section 3.1) and of OSSCAR (Meng et al., ICML 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.axes.analysis import Analysis
from surgery.edit.apply import apply
from surgery.edit.calibration import Calibration, Inputs
from surgery.edit.read_rows import gather_rows
from surgery.edit.readers import Network, Reader, Seen, find_readers, takes_bias
from surgery.edit.ridge import DAMPINGS, Fit, Sums, solve
from surgery.edit.step import MEAN, Origin, Step
from surgery.errors import EditError, UsageError

_ROWS = 16
"""Rows for each weight of an output that are looked at, at most."""
_LEAST_ROWS = 8192
"""Rows that are looked at in any case, if there are so many."""
_NUMBERS = 2**22
"""The most numbers of the rows that are added up at once."""
_DEFAULT = 1e-3
"""The damping where there are too few inputs to hold some out."""


@dataclass(frozen=True)
class Compensate(Step):
    """Give layers the biases that a compensation needs. Their values, and the fitted weights, are among the weights of
    the module: carrying the step out again gives the same structure, with biases of 0.

    Attributes:
        layers: the weights that were fitted, by qualified name.
        biases: the layers that have a bias only since then.
        left: weights that read an edited axis and stayed as they were carved, and why.

    Example:
        >>> surgery.recipe(surgery.slim(traced, 0.5, calibration=images)).steps[-1].left
        {}
    """

    layers: tuple[str, ...]
    biases: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def apply(self, module: nn.Module) -> nn.Module:
        """See `Step.apply`."""
        return self.apply_in_place(copy.deepcopy(module))

    def apply_in_place(self, module: nn.Module) -> nn.Module:
        """See `Step.apply_in_place`."""
        parts = dict(module.named_modules())
        for name in self.biases:
            layer: Any = parts.get(name)
            if layer is None or not takes_bias(layer):
                raise EditError(f"{name!r} is no layer that lacks a bias")
            weight = layer.weight
            size = layer.out_channels if hasattr(layer, "out_channels") else weight.shape[0]
            layer.bias = nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)
        return module

    def describe(self) -> str:
        """See `Step.describe`."""
        left = "".join(f"; {name} as carved: {why}" for name, why in self.left.items())
        return f"Compensate: {len(self.layers)} weights fitted, {len(self.biases)} biases added{left}"


def compensate(
    dense: nn.Module,
    slim: nn.Module,
    analysis: Analysis,
    origins: Mapping[str, Origin],
    calibration: Any,
) -> nn.Module:
    """Fit the layers of ``slim``, which was carved out of ``dense``.

    Args:
        dense, slim: traced modules.
        analysis: of ``dense``.
        origins: where the tensors of ``slim`` come from (`Step.origins`).
        calibration: as for `surgery.slim`.

    Returns:
        a new module.

    Raises:
        UsageError: no inputs, inputs that the network does not take, or activations that are not finite.
    """
    inputs = Calibration(dense, calibration)
    with torch.random.fork_rng(), torch.no_grad():
        teacher = Network(dense)
        _, first = next(inputs.batches())
        plan = find_readers(analysis, origins, teacher.survey(first), Network(slim).survey(first), slim)
        fitted = tuple(dict.fromkeys(reader.name for reader in plan.readers))
        result = apply(slim, Compensate(fitted, plan.biases, plan.left))
        student = Network(result, {reader.constant[0] for reader in plan.readers if reader.constant is not None})
        for reader in plan.readers:
            _fit(reader, teacher, student, inputs)
    return result


def _fit(reader: Reader, teacher: Network, student: Network, inputs: Calibration) -> None:
    """Fit one layer of the student, in place."""
    weight = student.tensors[reader.name].narrow(0, reader.first, reader.shape[0])
    carved = reader.layer.matrix(weight.double())
    groups, p, o = carved.shape
    target = None
    if reader.constant is not None:
        name, first, sign = reader.constant
        target = student.tensors[name].narrow(0, first, groups * o)
    own = Fit(carved, carved.new_zeros(groups, o))
    if target is not None and sign > 0:
        own = Fit(carved, target.double().view(groups, o))
    sums = Sums.zeros(groups, p, o, carved.device)
    limit = max(_LEAST_ROWS, _ROWS * p) // (inputs.count * len(reader.calls)) + 1
    for number, batch in inputs.batches(held_out=False):
        for x, y in _rows(reader, teacher, student, batch, number, limit):
            sums.add(x, y)
    if not sums.finite():
        raise UsageError(f"the calibration inputs give {reader.name} values that are not finite")
    if not sums.count:
        return
    dampings = [*DAMPINGS, math.inf] if target is not None else [*DAMPINGS]
    fits = [own, *(solve(sums, carved, _each(sums, d), constant=target is not None) for d in dampings)]
    errors = carved.new_zeros(len(fits), groups)
    spread = sums.spread()
    held_out = ((number, batch) for number, batch in inputs.batches(held_out=True))
    for x, y in (rows for number, batch in held_out for rows in _rows(reader, teacher, student, batch, number, limit)):
        errors += torch.stack([(fit.errors(x, y) / spread).sum(1) for fit in fits])
        sums.add(x, y)
    chosen = errors.nan_to_num(nan=math.inf).argmin(0)
    if not errors.any():  # nothing was held out
        chosen.fill_(1 + dampings.index(_DEFAULT))
    del fits
    damping = errors.new_tensor([math.inf, *dampings])[chosen]
    best = solve(sums, carved, damping, constant=target is not None)
    keep = (chosen == 0) | ~best.finite()
    matrix = carved.where(keep.view(-1, 1, 1), best.weight)
    weight.copy_(reader.layer.weight(matrix, reader.shape))
    if target is not None:
        constant = own.constant.where(keep.view(-1, 1), best.constant).flatten()
        target.copy_(constant if sign > 0 else target - constant)


def _each(sums: Sums, damping: float) -> Tensor:
    return sums.x.new_full((len(sums.x),), damping)


def _rows(
    reader: Reader, teacher: Network, student: Network, batch: Inputs, number: int, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the student's layer is given and what the teacher's gave, in rows, at most ``limit`` of a call."""
    given = {found.number: found for found in teacher.watch(reader, batch)}
    for found in student.watch(reader, batch):
        layer, other = found.layer, given.get(found.number)
        sizes = layer.channels_last(found.y).shape[:-1]
        if other is None or layer.channels_last(other.y).shape[:-1] != sizes:
            continue
        target = _target(reader, other, found)
        at = torch.randperm(sizes.numel(), generator=torch.Generator().manual_seed(number))[:limit]
        width = layer.groups * layer.matrix(found.weight).shape[1]
        for part in torch.split(at.to(target.device), max(1, _NUMBERS // width)):
            x, y = gather_rows(layer, found.x, target, tuple(found.weight.shape[2:]), part)
            yield x, y.reshape(len(y), layer.groups, -1).transpose(0, 1)


def _target(reader: Reader, dense: Seen, slim: Seen) -> Tensor:
    """What the student's layer is to give, apart from a bias that stays: what the teacher's gave, channels last."""
    target = _pick(reader, dense.layer.channels_last(dense.y))
    return target - slim.bias if slim.bias is not None and reader.constant is None else target


def _pick(reader: Reader, y: Tensor) -> Tensor:
    """The teacher's channels (last) in the places of the student's."""
    picked = y[..., reader.outputs.clamp(min=0).to(y.device)]
    mean = reader.outputs == MEAN
    if bool(mean.any()):
        picked[..., mean.to(y.device)] = y.mean(-1, keepdim=True)
    return picked
