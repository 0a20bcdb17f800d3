"""The layers of a slim network that read an edited axis, and what they correspond to in the dense one.

Both networks run once on a few inputs. A layer is known by its weight, and its calls by their order.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.axes.analysis import Analysis
from surgery.edit.calibration import Inputs
from surgery.edit.read_rows import Layer
from surgery.edit.step import MEAN, Origin
from surgery.edit.watch import Book, Read, Trail, Watch, batch_norm, tensors
from surgery.errors import UsageError
from surgery.graph.traced import named_tensors
from surgery.layers.attention import HeadAttention


@dataclass(frozen=True, eq=False)
class Reader:
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
class Plan:
    """What is fitted: the readers in the order in which they run, the layers that get a bias, and the weights that
    read an edited axis and stay as they are, with the reason."""

    readers: tuple[Reader, ...]
    biases: tuple[str, ...]
    left: Mapping[str, str]


def find_readers(
    analysis: Analysis, origins: Mapping[str, Origin], dense: Survey, slim: Survey, module: nn.Module
) -> Plan:
    """Which layers of a slim network are fitted.

    Args:
        analysis: of the dense network.
        origins: where the tensors of the slim one come from.
        dense, slim: what the two read by.
        module: the slim network.
    """
    readers: list[Reader] = []
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
            readers.append(Reader(calls.name, calls.first, calls.shape, calls.layer, numbers, outputs, constant))
    return Plan(tuple(readers), tuple(biases), left)


def _reads_edited(calls: Calls, origin: Origin) -> bool:
    """Whether the axis that is contracted over changed; of a depthwise convolution, its channels."""
    depthwise = calls.layer.groups > 1 and calls.shape[1] == 1
    return origin.axes[0 if calls.layer.transposed or depthwise else 1] is not None


def _outputs(calls: Calls, origin: Origin, dense: Survey) -> Tensor | None:
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
    calls: Calls, survey: Survey, parts: Mapping[str, nn.Module]
) -> tuple[tuple[str, int, float] | None, str]:
    """Where the constant goes: to the bias, to the mean of the BatchNorm behind, to a new bias; and the layer that
    gets one."""
    bias = next(iter(calls.biases)) if len(calls.biases) == 1 else "computed"
    if isinstance(bias, tuple):
        own = bias[0] not in survey.otherwise and sum(bias in other.biases for other in survey.calls.values()) == 1
        return ((*bias, 1.0) if own else None), ""
    means = set(calls.users)
    if bias is None and len(means) == 1 and len(calls.users) == len(calls.numbers):
        (mean,) = means
        if mean and survey.normalised[mean] == len(calls.users):
            return (mean, 0, -1.0), ""
    layer, _, tensor = calls.name.rpartition(".")
    if bias is None and tensor == "weight" and layer in parts and takes_bias(parts[layer]):
        return (f"{layer}.bias", 0, 1.0), layer
    return None, ""


def takes_bias(layer: nn.Module) -> bool:
    """Whether a layer could have a bias, and has none."""
    held = layer._parameters
    return held.get("bias", layer) is None and isinstance(held.get("weight"), nn.Parameter)


class Network:
    """A copy of ``module`` in ``eval()``, to watch. It shares the parameters and the buffers that are ``written``, by
    name, and no others: some models write to theirs when they run."""

    def __init__(self, module: nn.Module, written: Collection[str] = ()) -> None:
        self.tensors = named_tensors(module)
        shared = (t for name, t in self.tensors.items() if isinstance(t, nn.Parameter) or name in written)
        self.module = copy.deepcopy(module, {id(t): t for t in shared}).eval()
        for part in self.module.modules():
            if type(part) is nn.MultiheadAttention:
                part.__class__ = HeadAttention  # the same numbers, by layers that can be watched
        self.book = Book(self.module)

    def survey(self, inputs: Inputs) -> Survey:
        """What is read in the course of a run on these inputs."""
        found = Survey(self.book)
        torch.manual_seed(0)
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, inputs)  # a model may write to what it is given
        try:
            with Watch(self.book, found.read, found.other):
                self.module(*args, **kwargs)
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise UsageError(f"the network does not run on the calibration inputs: {said}") from error
        return found


@dataclass(eq=False)
class Calls:
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


class Survey:
    """The layers that a run reads by, in order."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.calls: dict[tuple[str, int, int], Calls] = {}
        self.number: dict[str, int] = {}
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        """For each weight, the first row and the number of outputs of each call."""
        self.otherwise: dict[str, str] = {}
        """Weights that something else uses, and what."""
        self.normalised: dict[str, int] = {}
        """How often each running mean is used."""
        self.choices: list[tuple[int, Tensor]] = []
        """Whole numbers that were made of others (`topk`, `argmax`, `nonzero`, `nms`), and how many calls there were
    before that. Where two networks differ in them, rows behind them need not correspond."""
        self.most = 0
        """The most bytes that one call was given and gave."""
        self._trail = Trail()
        self._calls = 0

    def read(self, found: Read, y: Tensor) -> None:
        self._calls += 1
        self._use([found.x], "")
        self.most = max(self.most, found.x.nbytes + y.nbytes)
        name, first = found.part.name, found.part.first
        outputs = found.layer.channels_last(y).shape[-1]
        calls = self.calls.setdefault(
            (name, first, outputs), Calls(name, first, found.layer, found.weight.shape, outputs)
        )
        number = self.number.get(name, 0)
        self.number[name] = number + 1
        calls.numbers.append(number)
        calls.last = self._calls
        self.ranges.setdefault(name, []).append((first, outputs))
        calls.biases.add(self._bias(found.bias))
        if calls.layer != found.layer:
            self.otherwise[name] = "calls with different settings"
        self._trail.mark(y, calls)

    def _bias(self, bias: Tensor | None) -> tuple[str, int] | str | None:
        if bias is None:
            return None
        part = self.book.find(bias)
        return "computed" if part is None else (part.name, part.first)

    def other(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given, made = tensors((args, kwargs)), tensors(result)
        if not made:
            return
        self.most = max(self.most, sum(t.nbytes for t in (*given, *made)))
        mean = ""
        if func is F.batch_norm:
            held = batch_norm(args, kwargs)["running_mean"]
            part = None if held is None else self.book.find(held)
            mean = "" if part is None else part.name
            self.normalised[mean] = self.normalised.get(mean, 0) + 1
        self._use(given, mean)
        if any(t.is_floating_point() or t.dtype == torch.bool for t in given):
            self.choices += [(self._calls, t) for t in made if not t.dtype.is_floating_point and t.dtype != torch.bool]
        for tensor in given:
            holder = self.book.holder(tensor)
            if holder is not None and any(self.book.holder(t) != holder for t in made):
                self.otherwise[holder[0]] = getattr(func, "__name__", str(func))

    def common(self, other: Survey) -> float:
        """Up to how many calls both networks have chosen alike."""
        pairs = zip(self.choices, other.choices, strict=False)
        differ = [n for (n, mine), (_, theirs) in pairs if not torch.equal(mine, theirs)]
        return min(differ, default=float("inf"))

    def _use(self, given: Sequence[Tensor], mean: str) -> None:
        for tensor in given:
            calls = self._trail.find(tensor)
            if calls is not None:
                calls.users.append(mean)
