"""Compensation: the layers of a slim network take over what the removed channels gave.

Carving a network drops the columns of every layer that read a removed channel. What these channels said is in part said
by the kept ones too, and a layer that reads them can learn to listen to those: by least squares, without a gradient.
Layer by layer, in the order in which they run, its weights become those for which it gives, on what the *slim* network
gives it, what it gave in the dense network (its kept outputs):

    min over W, c of  sum |y_dense - W x_slim - c|^2 + damping * d * |W - W_carved|^2

with ``d`` the mean variance of its inputs (for a convolution, of the patches that it reads, padding included). As the
layers before it are fitted already, errors do not add up. The damping is the one of a few with the smallest error on
every fourth batch, which is held out; the carved layer as it was is one of the choices.

The layers that read an edited axis are fitted, one after the other. Both networks run side by side on all inputs, up to
the layer, and wait there (`surgery.edit.streams`): each runs once in all. Of the values that wait, what does not fit
into a small part of the memory is in temporary files. There is one matrix of sums (`surgery.edit.ridge`) at a time. Of
the same kind are the least squares of channel pruning (He, Zhang and Sun, ICCV 2017, section 3.1) and of OSSCAR (Meng
et al., ICML 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.axes.analysis import Analysis
from surgery.edit.apply import apply
from surgery.edit.calibration import Calibration, Inputs
from surgery.edit.read_rows import Layer, gather_rows, split_groups
from surgery.edit.readers import Network, Reader, find_readers, takes_bias
from surgery.edit.ridge import DAMPINGS, Fit, Problems, Sums
from surgery.edit.shelf import Kept, Shelf
from surgery.edit.step import MEAN, Origin, Step
from surgery.edit.streams import Run, Runner, Seen
from surgery.errors import EditError, UsageError

_ROWS = 16
"""Rows for each weight of an output that are looked at, at most."""
_LEAST_ROWS = 8192
"""Rows that are looked at in any case, if there are so many."""
_NUMBERS = 2**20
"""The most numbers of the rows that are added up at once."""
_AT_ONCE = 2**24
"""The most bytes that a call is given and gives, where inputs can be split."""
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
    with torch.random.fork_rng(), torch.no_grad(), Shelf() as shelf:
        teacher = Network(dense)
        inputs.split_if_alike(teacher.module)
        few, number = inputs.few()
        read, reads = teacher.survey(few), Network(slim).survey(few)
        plan = find_readers(analysis, origins, read, reads, slim)
        if next(iter(teacher.tensors.values())).device.type == "cpu":
            inputs.limit(_AT_ONCE * number // max(read.most, reads.most))
        fitted = tuple(dict.fromkeys(reader.name for reader in plan.readers))
        result = apply(slim, Compensate(fitted, plan.biases, plan.left))
        student = Network(result, {reader.constant[0] for reader in plan.readers if reader.constant is not None})
        pairs = _Pairs(teacher, student, inputs, shelf)
        for reader in plan.readers:
            _fit(reader, student.tensors, pairs)
    return result


class _Pairs:
    """A run of the dense network and one of the slim one, for each batch."""

    def __init__(self, teacher: Network, student: Network, inputs: Calibration, shelf: Shelf) -> None:
        self.inputs, self.shelf = inputs, shelf
        self._runners = [Runner(network.module, network.book) for network in (teacher, student)]
        self._waiting: list[list[Run]] = []

    def rows(self, reader: Reader, most: int) -> Iterator[tuple[bool, Tensor, Tensor]]:
        """What the student's layer is given, and what it is to give, in some ``most`` rows.

        Yields:
            whether they are held out, (n, groups * inputs), (n, channels).
        """
        limit = most // (self.inputs.count * len(reader.calls)) + 1
        for number, runs in self._runs():
            again = partial(self.inputs.batch, number)
            dense, slim = (
                run.look(reader.name, reader.calls, again, after=after)
                for run, after in zip(runs, (True, False), strict=True)
            )
            for x, y in _rows(reader, dense, slim, number, limit):
                yield self.inputs.held_out(number), x, y

    def _runs(self) -> Iterator[tuple[int, list[Run]]]:
        """The runs of each batch in turn; those of the others are set aside."""
        if self._waiting:
            begun = ((number, self._waiting[number]) for number in range(len(self._waiting)))
        else:
            begun = ((number, self._begin(inputs)) for number, inputs in self.inputs.batches())
        for number, runs in begun:
            for run in runs:
                run.take_up()
            self.shelf.clear(f"runs {number}")
            yield number, runs
            for run in runs:
                run.set_aside(self.shelf, f"runs {number}")

    def _begin(self, inputs: Inputs) -> list[Run]:
        self._waiting.append([Run(runner, inputs) for runner in self._runners])
        return self._waiting[-1]


def _fit(reader: Reader, tensors: Mapping[str, Tensor], pairs: _Pairs) -> None:
    """Fit one layer of the student, in place."""
    weight = tensors[reader.name].narrow(0, reader.first, reader.shape[0])
    carved = reader.layer.matrix(weight.double())
    groups, p, o = carved.shape
    target = None
    if reader.constant is not None:
        name, first, sign = reader.constant
        target = tensors[name].narrow(0, first, groups * o)
    own = Fit(carved, carved.new_zeros(groups, o))
    if target is not None and sign > 0:
        own = Fit(carved, target.double().view(groups, o))
    sums, held = Sums.zeros(groups, p, o, carved.device), _Rows(reader.layer, pairs.shelf)
    for held_out, x, y in pairs.rows(reader, max(_LEAST_ROWS, _ROWS * p)):
        if held_out:
            held.add(x, y)
        else:
            sums.add(split_groups(reader.layer, x), split_groups(reader.layer, y))
    if not sums.finite():
        raise UsageError(f"the calibration inputs give {reader.name} values that are not finite")
    if not sums.count:
        return
    dampings = [*DAMPINGS, math.inf] if target is not None else [*DAMPINGS]
    spread = sums.spread()
    problems = Problems(sums, carved, constant=target is not None, shelf=pairs.shelf)
    errors = carved.new_zeros(1 + len(dampings), groups)
    if held.filled:
        for number in range(len(errors)):
            fit = problems.solve(carved.new_full((groups,), dampings[number - 1])) if number else own
            for x, y in held:
                errors[number] += (fit.errors(x, y) / spread).sum(1)
    chosen = errors.nan_to_num(nan=math.inf).argmin(0)
    if not errors.any():  # nothing was held out
        chosen.fill_(1 + dampings.index(_DEFAULT))
    damping = errors.new_tensor([math.inf, *dampings])[chosen]
    problems.put_back()
    for x, y in held:
        sums.add(x, y)
    held.clear()
    problems = Problems(sums, carved, constant=target is not None, shelf=pairs.shelf)
    best = problems.solve(damping, last=True)
    problems.close()
    keep = (chosen == 0) | ~best.finite()
    matrix = carved.where(keep.view(-1, 1, 1), best.weight)
    weight.copy_(reader.layer.weight(matrix, reader.shape))
    if target is not None:
        constant = own.constant.where(keep.view(-1, 1), best.constant).flatten()
        target.copy_(constant if sign > 0 else target - constant)


class _Rows:
    """Rows that are held out. They can be read again and again."""

    def __init__(self, layer: Layer, shelf: Shelf) -> None:
        self.layer, self.shelf = layer, shelf
        self.filled: list[tuple[Kept, Kept]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        self.filled.append((self.shelf.put("rows", x), self.shelf.put("rows", y)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((split_groups(self.layer, x()), split_groups(self.layer, y())) for x, y in self.filled)

    def clear(self) -> None:
        self.shelf.clear("rows")
        self.filled = []


def _rows(
    reader: Reader, dense: Sequence[Seen], slim: Sequence[Seen], number: int, limit: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the student's layer is given and what it is to give, in rows, at most ``limit`` of a call."""
    given = {found.number: found for found in dense}
    for found in slim:
        layer, other = found.layer, given.get(found.number)
        places = layer.places(found.x, tuple(found.weight.shape[2:]))
        sizes = layer.sizes(places)
        y = None if other is None else layer.channels_last(_given(other))
        if y is None or y.shape[:-1] != sizes:
            continue
        at = torch.randperm(sizes.numel(), generator=torch.Generator().manual_seed(number))[:limit]
        width = places.numel() // max(sizes.numel(), 1)
        for part in torch.split(at.to(y.device), max(1, _NUMBERS // width)):
            read, wanted = gather_rows(places, y, part)
            wanted = _pick(reader, wanted)
            if found.bias is not None and reader.constant is None:  # it stays
                wanted -= found.bias
            yield read, wanted


def _given(found: Seen) -> Tensor:
    assert found.y is not None
    return found.y


def _pick(reader: Reader, y: Tensor) -> Tensor:
    """The teacher's channels (last) in the places of the student's."""
    picked = y[..., reader.outputs.clamp(min=0).to(y.device)]
    mean = reader.outputs == MEAN
    if bool(mean.any()):
        picked[..., mean.to(y.device)] = y.mean(-1, keepdim=True)
    return picked
