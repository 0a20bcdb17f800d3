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
squares of OSSCAR (Meng et al., ICML 2024) and of SparseGPT (Frantar and Alistarh, ICML 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.axes.analysis import Analysis
from surgery.edit.apply import apply
from surgery.edit.calibration import Calibration, Inputs
from surgery.edit.readers import Book, Done, Follower, Layer, Read, Trail, Watch, batch_norm, gather_rows, tensors
from surgery.edit.ridge import DAMPINGS, Fit, Sums, solve
from surgery.edit.step import MEAN, Origin, Step
from surgery.errors import EditError, UsageError
from surgery.graph.traced import named_tensors
from surgery.layers.attention import HeadAttention

_ROWS = 16
"""Rows for each weight of an output that are looked at, at most."""
_LEAST_ROWS = 8192
"""Rows that are looked at in any case, if there are so many."""
_NUMBERS = 2**22
"""The most numbers of the rows that are added up at once."""
_LEAST_SCALE = 1e-2
"""A BatchNorm's smallest factor, relative to the mean, through which a sum is corrected."""
_CHOICES = {"topk", "sort", "argsort", "argmax", "argmin", "nonzero", "nms", "unique"}
"""Functions that choose values by their size: behind them, rows of two networks need not correspond."""
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
            if layer is None or not _takes_bias(layer):
                raise EditError(f"{name!r} is no layer that lacks a bias")
            weight = layer.weight
            size = layer.out_channels if hasattr(layer, "out_channels") else weight.shape[0]
            layer.bias = nn.Parameter(weight.new_zeros(size), requires_grad=weight.requires_grad)
        return module

    def describe(self) -> str:
        """See `Step.describe`."""
        left = "".join(f"; {name} as carved: {why}" for name, why in self.left.items())
        return f"Compensate: {len(self.layers)} weights fitted, {len(self.biases)} biases added{left}"


def _takes_bias(layer: nn.Module) -> bool:
    held = layer._parameters
    return held.get("bias", layer) is None and isinstance(held.get("weight"), nn.Parameter)


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
    with _evaluating():
        teacher = _Run(dense)
        first = next(inputs.batches())[1]
        plan = _plan(analysis, origins, teacher.survey(first), _Run(slim).survey(first), slim)
        result = apply(slim, plan.step)
        student = _Run(result)
        for reader in plan.readers:
            _fit(reader, teacher, student, inputs)
    return result


@contextmanager
def _evaluating() -> Iterator[None]:
    with torch.random.fork_rng(), torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True, eq=False)
class _Seen:
    """A call of a layer that is fitted: which of all calls of its weight, and what it is given and gives."""

    number: int
    layer: Layer
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    y: Tensor
    partner: Tensor | None = None
    """What is added to the output."""
    scale: Tensor | None = None
    """What a BatchNorm in between multiplies the output by, (channels,)."""


class _Run:
    """A network that shares its tensors with ``module``, in ``eval()``, to watch."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = named_tensors(module)
        self.module = copy.deepcopy(module, {id(t): t for t in self.tensors.values()}).eval()
        for part in self.module.modules():
            if type(part) is nn.MultiheadAttention:
                part.__class__ = HeadAttention  # the same numbers, by layers that can be watched
        self.book = Book(self.module)

    def run(self, inputs: Inputs, watch: Watch) -> None:
        """Run the network on a batch, while ``watch`` looks on."""
        torch.manual_seed(0)
        args, kwargs = inputs
        try:
            with watch:
                self.module(*args, **kwargs)
        except Done:
            pass

    def survey(self, inputs: Inputs) -> _Survey:
        """What is read in the course of a run."""
        found = _Survey(self.book)
        try:
            self.run(inputs, Watch(self.book, found.read, other=found.other))
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise UsageError(f"the network does not run on the calibration inputs: {said}") from error
        return found

    def watch(self, reader: _Reader, inputs: Inputs) -> list[_Seen]:
        """Run the network up to the last call of ``reader``, and to the sum that it goes into: its calls."""
        number = -1
        seen: list[_Seen] = []
        follower = Follower()

        def read(found: Read) -> None:
            nonlocal number
            follower.see([found.x], found.y)
            number += found.part.name == reader.name
            if found.part.name == reader.name and number in reader.calls:
                several = len(reader.calls) > 1
                x, y = (found.x.clone(), found.y.clone()) if several else (found.x, found.y)  # others may write to them
                seen.append(_Seen(number, found.layer, found.weight, found.bias, x, y))
                if not several:
                    follower.follow(found.y)
                elif number == reader.calls[-1]:
                    raise Done

        self.run(inputs, Watch(self.book, read, before=follower.before, other=follower.other))
        if follower.partner is not None:
            seen = [replace(seen[0], partner=follower.partner, scale=follower.scale)]
        return seen


@dataclass(eq=False)
class _Calls:
    """The calls of one weight, or of the same rows of one."""

    name: str
    first: int
    layer: Layer
    shape: torch.Size
    outputs: int
    numbers: list[int] = field(default_factory=list)
    """Which of all calls of the weight they are."""
    biases: set[tuple[str, int] | str | None] = field(default_factory=set)
    """Where the biases lie, ``"computed"`` for one that is no parameter, None for none."""
    last: int = 0
    """How many calls of any weight there were up to its last one."""
    users: list[str] = field(default_factory=list)
    """For each use of what it gives: the running mean of the BatchNorm that does, or an empty text."""


class _Survey:
    """The layers that a run reads by, in order."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.calls: dict[tuple[str, int, int], _Calls] = {}
        self.number: dict[str, int] = {}
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        """For each weight, the first row and the number of outputs of each call."""
        self.otherwise: dict[str, str] = {}
        """Weights that something else uses, and what."""
        self.normalised: dict[str, int] = {}
        """How often each running mean is used."""
        self.choices: list[tuple[int, Tensor]] = []
        """What was chosen by the values of tensors, and how many calls there were before that."""
        self._trail = Trail()
        self._calls = 0

    def read(self, found: Read) -> None:
        self._calls += 1
        self._use([found.x], "")
        name, first = found.part.name, found.part.first
        outputs = found.layer.channels_last(found.y).shape[-1]
        calls = self.calls.setdefault(
            (name, first, outputs), _Calls(name, first, found.layer, found.weight.shape, outputs)
        )
        number = self.number.get(name, 0)
        self.number[name] = number + 1
        calls.numbers.append(number)
        calls.last = self._calls
        self.ranges.setdefault(name, []).append((first, outputs))
        calls.biases.add(self._bias(found.bias))
        if calls.layer != found.layer:
            self.otherwise[name] = "calls in different ways"
        self._trail.mark(found.y, calls)

    def _bias(self, bias: Tensor | None) -> tuple[str, int] | str | None:
        part = None if bias is None else self.book.find(bias)
        return "computed" if bias is not None and part is None else part and (part.name, part.first)

    def other(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given, made = tensors((args, kwargs)), tensors(result)
        if not made:
            return
        mean = ""
        if func is F.batch_norm:
            held = batch_norm(args, kwargs)["running_mean"]
            part = None if held is None else self.book.find(held)
            mean = "" if part is None else part.name
            self.normalised[mean] = self.normalised.get(mean, 0) + 1
        self._use(given, mean)
        if getattr(func, "__name__", "") in _CHOICES:
            self.choices += [(self._calls, t) for t in made if not t.is_floating_point()]
        for tensor in given:
            holder = self.book.holder(tensor)
            if holder is not None and any(self.book.holder(t) != holder for t in made):
                self.otherwise[holder[0]] = getattr(func, "__name__", str(func))

    def common(self, other: _Survey) -> float:
        """Up to how many calls both networks have chosen alike."""
        pairs = zip(self.choices, other.choices, strict=False)
        differ = [n for (n, mine), (_, theirs) in pairs if not torch.equal(mine, theirs)]
        return min(differ, default=float("inf"))

    def _use(self, given: Sequence[Tensor], mean: str) -> None:
        for tensor in given:
            calls = self._trail.find(tensor)
            if calls is not None:
                calls.users.append(mean)


# ---------------------------------------------------------------------------------------------------------------------
# What is fitted


@dataclass(frozen=True, eq=False)
class _Reader:
    """A layer that is fitted: its weight, or rows of it."""

    name: str
    first: int
    shape: torch.Size
    layer: Layer
    calls: tuple[int, ...]
    outputs: Tensor
    """For each output the one of the dense network, or `MEAN`."""
    constant: tuple[str, int, float] | None
    """The tensor that takes the constant, from which row, and with which sign; None where there is none."""


@dataclass(frozen=True, eq=False)
class _Plan:
    readers: tuple[_Reader, ...]
    step: Compensate


def _plan(analysis: Analysis, origins: Mapping[str, Origin], dense: _Survey, slim: _Survey, module: nn.Module) -> _Plan:
    """Which layers are fitted, in the order in which they run."""
    readers: list[_Reader] = []
    biases: dict[str, None] = {}
    left = {
        name: f"used by {slim.otherwise[name]}"
        if name in slim.otherwise
        else "does not run in eval() on the calibration inputs"
        for name, axis in analysis.roles
        if name in origins and "consumer" in analysis.roles[name, axis] and origins[name].axes[axis] is not None
    }
    parts, common = dict(module.named_modules()), slim.common(dense)
    for calls in slim.calls.values():
        origin = origins.get(calls.name)
        if origin is None or not _reads_edited(calls, origin) or calls.name in slim.otherwise:
            continue
        left.pop(calls.name, None)
        outputs = _outputs(calls, origin, dense)
        if calls.last > common:
            left[calls.name] = "before it, the slim network chooses other values than the dense one (topk, nms)"
        elif outputs is None:
            left[calls.name] = "its calls are others than in the dense network"
        else:
            constant, bias = _find_constant(calls, slim, parts)
            biases |= {bias: None} if bias else {}
            numbers = tuple(calls.numbers)
            readers.append(_Reader(calls.name, calls.first, calls.shape, calls.layer, numbers, outputs, constant))
    layers = tuple(dict.fromkeys(reader.name for reader in readers))
    return _Plan(tuple(readers), Compensate(layers, tuple(biases), left))


def _reads_edited(calls: _Calls, origin: Origin) -> bool:
    """Whether the axis that is contracted over changed; of a depthwise convolution, its channels."""
    depthwise = calls.layer.groups > 1 and calls.shape[1] == 1
    return origin.axes[0 if calls.layer.transposed or depthwise else 1] is not None


def _outputs(calls: _Calls, origin: Origin, dense: _Survey) -> Tensor | None:
    """For each output of a slim layer the one of the dense layer; None where it has none."""
    ranges = dense.ranges.get(calls.name, [])
    if calls.numbers[-1] >= len(ranges) or len({ranges[k] for k in calls.numbers}) > 1:
        return None
    first, count = ranges[calls.numbers[0]]
    rows, groups = origin.axes[1 if calls.layer.transposed else 0], calls.layer.groups
    if calls.layer.transposed and groups > 1:
        columns = calls.outputs // groups
        own = torch.arange(columns) if rows is None else rows.old
        depthwise = origin.axes[0] is not None and calls.shape[0] == groups
        which = origin.axes[0].old if depthwise and origin.axes[0] is not None else torch.arange(groups)
        per_group = columns if rows is None else count // groups
        found = (which.unsqueeze(1) * per_group + own).flatten()
    elif rows is None:
        found = torch.arange(calls.first, calls.first + calls.outputs)
    else:
        found = rows.old[calls.first : calls.first + calls.outputs]
    mean = found == MEAN
    found = torch.where(mean, MEAN, found - first)
    return found if len(found) == calls.outputs and bool((mean | ((found >= 0) & (found < count))).all()) else None


def _find_constant(
    calls: _Calls, survey: _Survey, parts: Mapping[str, nn.Module]
) -> tuple[tuple[str, int, float] | None, str]:
    """Where the constant goes: to the bias, to the mean of the BatchNorm behind, to a new bias; and the layer that
    gets one."""
    bias = next(iter(calls.biases)) if len(calls.biases) == 1 else "computed"
    if isinstance(bias, tuple):
        return (*bias, 1.0), ""
    means = set(calls.users)
    if bias is None and len(means) == 1 and len(calls.users) == len(calls.numbers):
        (mean,) = means
        if mean and survey.normalised[mean] == len(calls.users):
            return (mean, 0, -1.0), ""
    layer, _, own = calls.name.rpartition(".")
    if bias is None and own == "weight" and layer in parts and _takes_bias(parts[layer]):
        return (f"{layer}.bias", 0, 1.0), layer
    return None, ""


# ---------------------------------------------------------------------------------------------------------------------
# The fit


def _fit(reader: _Reader, teacher: _Run, student: _Run, inputs: Calibration) -> None:
    """Fit one layer of the student, in place."""
    weight = student.tensors[reader.name].narrow(0, reader.first, reader.shape[0])
    carved = reader.layer.matrix(weight.double())
    groups, p, o = carved.shape
    sums = Sums.zeros(groups, p, o, carved.device)
    limit = max(_LEAST_ROWS, _ROWS * p) // (inputs.count * len(reader.calls)) + 1
    for number, batch in inputs.batches(held_out=False):
        for x, y in _rows(reader, teacher, student, batch, number, limit):
            sums.add(x, y)
    if not sums.finite():
        raise UsageError(f"the calibration inputs give {reader.name} values that are not finite")
    if not sums.count:
        return
    held = torch.zeros(groups, o, dtype=torch.float64, device=carved.device)
    if reader.constant is not None and reader.constant[2] > 0:
        name, first, _ = reader.constant
        held = student.tensors[name][first : first + groups * o].double().view(groups, o)
    own = Fit(carved, held)
    dampings = [*DAMPINGS, float("inf")] if reader.constant is not None else list(DAMPINGS)
    fits = [own, *(solve(sums, carved, _full(sums, d), constant=reader.constant is not None) for d in dampings)]
    spread = (sums.yy / sums.count - (sums.y / sums.count).square()).clamp(min=0)
    scale = spread.clamp(min=1e-6 * float(spread.max())) + torch.finfo(torch.float64).tiny
    errors = torch.zeros(len(fits), groups, dtype=torch.float64, device=carved.device)
    seen = sums.count
    for number, batch in inputs.batches(held_out=True):
        for x, y in _rows(reader, teacher, student, batch, number, limit):
            for k, fit in enumerate(fits):
                errors[k] += (fit.errors(x, y) / scale).sum(1)
            sums.add(x, y)
    if sums.count == seen:
        chosen = torch.full((groups,), 1 + dampings.index(_DEFAULT), device=carved.device)
    else:
        chosen = errors.nan_to_num(nan=float("inf")).argmin(0)
    del fits
    damping = torch.tensor([float("inf"), *dampings], dtype=torch.float64, device=carved.device)[chosen]
    best = solve(sums, carved, damping, constant=reader.constant is not None)
    keep = (chosen == 0) | ~(best.weight.isfinite().flatten(1).all(1) & best.constant.isfinite().all(1))
    matrix = own.weight.where(keep.view(-1, 1, 1), best.weight)
    constant = own.constant.where(keep.view(-1, 1), best.constant)
    weight.copy_(reader.layer.weight(matrix, reader.shape))
    if reader.constant is not None:
        name, first, sign = reader.constant
        target = student.tensors[name][first : first + groups * o]
        target.copy_(constant.flatten() if sign > 0 else target - constant.flatten())


def _full(sums: Sums, damping: float) -> Tensor:
    return torch.full((len(sums.x),), damping, dtype=torch.float64, device=sums.x.device)


def _rows(
    reader: _Reader, teacher: _Run, student: _Run, batch: Inputs, number: int, limit: int
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
        for part in at.to(target.device).split(max(1, _NUMBERS // width)):
            x, y = gather_rows(layer, found.x, target, tuple(found.weight.shape[2:]), part)
            yield x, y.unflatten(1, (layer.groups, -1)).transpose(0, 1)


def _target(reader: _Reader, dense: _Seen, slim: _Seen) -> Tensor:
    """What the student's layer is to give: what the teacher's gave, so that a sum that it goes into is the teacher's.

    Shape as of `Layer.channels_last`.
    """
    layer = slim.layer
    target = _pick(reader, layer.channels_last(dense.y))
    if dense.partner is not None and slim.partner is not None:
        missing = _pick(reader, layer.channels_last(dense.partner)) - layer.channels_last(slim.partner)
        if slim.scale is not None:
            least = slim.scale.abs().mean() * _LEAST_SCALE
            missing = torch.where(slim.scale.abs() < least, 0.0, missing / slim.scale)
        target = target + missing
    if slim.bias is not None and reader.constant is None:
        target = target - slim.bias
    return target


def _pick(reader: _Reader, y: Tensor) -> Tensor:
    """The teacher's channels (last) in the places of the student's."""
    picked = y[..., reader.outputs.clamp(min=0).to(y.device)]
    mean = reader.outputs == MEAN
    if bool(mean.any()):
        picked[..., mean.to(y.device)] = y.mean(-1, keepdim=True)
    return picked
