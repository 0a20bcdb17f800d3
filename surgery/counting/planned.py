"""What a model would cost with other numbers of channels, from shapes alone: no weight is touched and nothing is run.

The size of each axis follows from how often each unit is kept, and the rule of an op says what it multiplies at those
sizes. The sum of all nodes must be what `cost` counts of the model as it is; where it is not, as in a model that runs
Python between its parts, nothing is said.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.axes.analysis import Analysis
from surgery.axes.groups import DimensionGroup
from surgery.axes.labels import Field, Ids, Labelled, Shape
from surgery.counting.cost import Cost, cost
from surgery.edit.layout import Layouts
from surgery.edit.step import MEAN
from surgery.errors import EditError
from surgery.graph.batches import batch_of
from surgery.graph.rule_table import rule_for
from surgery.graph.traced import TracedModule, example_inputs, info, named_tensors


@dataclass(frozen=True)
class _Axes:
    """A tensor's shape, and which of its axes follow an edit."""

    shape: Shape
    single: tuple[tuple[int, int], ...]
    """Dims that hold the units of one axis, by its number."""
    factored: tuple[Field, ...]
    """Fields of several dims that factor one axis."""


@dataclass(frozen=True)
class _Call:
    """A node that multiplies: the formula of its op, and the shapes that it takes."""

    macs: Any
    out: Any
    layer: nn.Module | None
    given: dict[str, Any]


class PlannedCost:
    """The cost of a traced module under any index, if it can be told.

    Attributes:
        known: whether it can.
    """

    def __init__(self, module: nn.Module, analysis: Analysis) -> None:
        self._analysis = weakref.ref(analysis)  # that of which this is remembered (`planned_cost`)
        self._numbers: dict[bytes, int] = {}
        self._units: list[Ids] = []
        self._samples = 2 if info(module).batched else batch_of(*example_inputs(module)) or 1
        tensors = named_tensors(module, once=True)
        self._tensors = {
            name: self._axes_of_tensor(analysis, name, tuple(tensor.shape)) for name, tensor in tensors.items()
        }
        self._parameters = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
        self._bytes = {name: tensor.element_size() for name, tensor in tensors.items()}
        self._calls = list(self._find_calls(analysis, module, "")) if isinstance(module, TracedModule) else []
        self._starts = np.cumsum([0, *map(len, self._units)])[:-1]
        self._all = np.concatenate([*self._units, np.zeros(0, dtype=np.int64)])
        self.known = isinstance(module, TracedModule) and all(map(_takes, self._calls))
        self.known = self.known and self.under({})[1] == cost(module)

    def under(self, indices: Mapping[DimensionGroup, Sequence[int]]) -> tuple[dict[str, Shape], Cost]:
        """The shapes of all parameters and buffers, and the cost, with groups gathered by ``indices``."""
        analysis = self._analysis()
        assert analysis is not None
        counts = np.ones(analysis.count, dtype=np.int64)
        for group, index in indices.items():
            places = np.asarray(index, dtype=np.int64)
            places = np.where(places == MEAN, group.units - 1, places)  # where `Layouts` puts what a mean adds
            counts[group.start : group.start + group.units] = np.bincount(places, minlength=group.units)
        lengths = np.add.reduceat(counts[self._all], self._starts).tolist() if len(self._starts) else []
        layouts = functools.cache(lambda: Layouts(analysis, indices, {}))

        def size(axes: Any) -> Any:
            return self._size(axes, lengths, layouts) if isinstance(axes, _Axes) else axes

        shapes = {name: size(axes) for name, axes in self._tensors.items()}
        counted = {name: math.prod(shape) for name, shape in shapes.items()}
        macs = 0
        for call in self._calls:
            given = {name: _map(size, value) for name, value in call.given.items()}
            macs += call.macs(_map(size, call.out), layer=call.layer, **given) or 0
        return shapes, Cost(
            macs=macs // self._samples,
            params=sum(n for name, n in counted.items() if name in self._parameters),
            bytes=sum(n * self._bytes[name] for name, n in counted.items()),
        )

    def _size(self, axes: _Axes, lengths: Sequence[int], layouts: Any) -> Shape:
        if not (axes.single or axes.factored):
            return axes.shape
        shape = list(axes.shape)
        for dim, axis in axes.single:
            shape[dim] = lengths[axis]
        for f in axes.factored:
            layout = layouts().along(f)
            if layout is not None:
                if layout.shape is None:
                    raise EditError("what would be left of an axis does not fill its factors: keep whole heads")
                for dim, length in zip(f.dims, layout.shape, strict=True):
                    shape[dim] = length
        return tuple(shape)

    def _number(self, units: Ids) -> int:
        """The number of an axis that holds these units."""
        number = self._numbers.setdefault(units.tobytes(), len(self._units))
        if number == len(self._units):
            self._units.append(units)
        return number

    def _axes_of_tensor(self, analysis: Analysis, name: str, shape: Shape) -> _Axes:
        held = ((dim, analysis.axis_units.get((name, dim))) for dim in range(len(shape)))
        return _Axes(
            shape, tuple((d, self._number(units)) for d, units in held if units is not None and len(units)), ()
        )

    def _axes_of_value(self, analysis: Analysis, value: Any) -> Any:
        if not isinstance(value, Labelled):
            return value
        single = [(f.dims[0], self._number(analysis.unit_of[f.ids])) for f in value.fields
                  if len(f.dims) == 1 and f.ids.size]  # fmt: skip
        return _Axes(value.shape, tuple(single), tuple(f for f in value.fields if len(f.dims) > 1))

    def _find_calls(self, analysis: Analysis, module: TracedModule, path: str) -> Iterator[_Call]:
        """The nodes that multiply in an evaluation, those of a part as often as it is called."""
        for node in module.graph.nodes:
            callee = module.get_submodule(str(node.target)) if node.op == "call_module" else None
            place = f"{path}.{node.target}".lstrip(".")
            if isinstance(callee, TracedModule):
                yield from self._find_calls(analysis, callee, place)
            elif node.op.startswith("call_") and (rule := rule_for(node, callee)).macs is not None:
                given = {
                    name: self._of_nodes(analysis, f"{path}:", value) for name, value in rule.arguments(node).items()
                }
                own = {} if callee is None else {n: f"{place}.{n}" for n, _ in callee.named_parameters()}
                given |= {n: self._tensors[name] for n, name in own.items() if name in self._tensors}
                yield _Call(rule.macs, self._of_nodes(analysis, f"{path}:", node), callee, given)

    def _of_nodes(self, analysis: Analysis, scope: str, tree: Any) -> Any:
        def find(node: fx.Node) -> Any:
            values = analysis.values.get((scope, node.name))
            return pytree.tree_map(functools.partial(self._axes_of_value, analysis), values)

        return fx.map_arg(tree, find)


def _takes(call: _Call) -> bool:
    """Whether a formula has all that it asks for: a layer may compute its weight from others."""
    parameters = inspect.signature(call.macs).parameters.values()
    asked = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    return asked <= {"layer", *call.given}


def _map(size: Any, tree: Any) -> Any:
    """``size`` of each tensor in what an op is given."""
    if isinstance(tree, (tuple, list)):
        return [_map(size, part) for part in tree]
    return size(tree)


_KNOWN: weakref.WeakKeyDictionary[Analysis, PlannedCost] = weakref.WeakKeyDictionary()


def planned_cost(module: nn.Module, analysis: Analysis) -> PlannedCost:
    """What can be told of the cost of ``module`` under indices, worked out once for each analysis."""
    if analysis not in _KNOWN:
        _KNOWN[analysis] = PlannedCost(module, analysis)
    return _KNOWN[analysis]
