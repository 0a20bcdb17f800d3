"""Whether the rule of an op says the truth: what it claims about axes is tried on numbers.

A rule ties positions of an op's tensors together and labels those of its output. Both are statements about what the op
computes, so they can be tested without a network: change one position and see what moves, exchange positions that the
rule calls interchangeable and see the output follow, edit a network of nothing but the op and compare.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.labels import Field, Ids, Labelled
from surgery.edit.apply import apply
from surgery.edit.layout import Layouts
from surgery.edit.reindex import Reindex, reindex
from surgery.errors import EditError, UsageError, VerificationError
from surgery.graph.rule_table import UNKNOWN, Rule, rule_for
from surgery.graph.traced import named_tensors
from surgery.graph.tracing import TracedModule, trace
from surgery.operations.rule_samples import Axis, Ref, Sample, SampleNetwork, Variant, axis_name
from surgery.operations.slim import slim_plan
from surgery.operations.widen import widen_plan

EXACT = 1e-9
"""Bound on differences, relative to the largest number of the output."""


@dataclass(frozen=True)
class RuleCheck:
    """What a rule allows, after `check_rule` has found it true."""

    free: frozenset[Axis]
    """Axes whose channels can be dropped, copied and moved."""
    frozen: Mapping[Axis, str]
    """The other axes that hold channels, and why they are left alone."""


def check_rule(op: Any, *args: Any, **kwargs: Any) -> RuleCheck:
    """Try what the rule of ``op`` claims about the axes of its tensors, in float64.

    1. Dependence: one position of one axis is changed at a time. Only those positions of the output may change that
       the rule labels with the same channel; any, where the rule says that the axis is contracted or normalised over.
    2. Equivariance: channels that the rule calls interchangeable are permuted in all arguments and parameters. The
       output must be permuted as its labels say. For an op that only moves data, each number must be where they say.
    3. Edits: in a network made of the op, whose arguments come from parameters and whose every result is read, channels
       are permuted, doubled and dropped with `surgery.reindex`, `surgery.widen` and `surgery.slim`. This runs the
       rule's ``rewrite``.

    Each is tried with every axis holding channels, with neighbouring axes as factors of one (heads x head_dim), with
    one of several tensors holding none, and for axes that are not free then with that axis alone holding channels.

    Args:
        op: a function, the name of a tensor's method, or a layer, in evaluation mode if it is one.
        args: the op's arguments. Tensors, also in lists, stand for activations, and an `nn.Parameter` for a weight;
            their values are used up to a little noise, so that equal numbers do not hide a difference. Give axes that
            the op does not relate different lengths.
        kwargs: the op's named arguments, likewise.

    Returns:
        which axes the rule leaves free, and why not the others.

    Raises:
        VerificationError: a claim is false; the message says which axis and which position.
        UsageError: ``op`` has no rule.

    Example:
        >>> sorted(surgery.check_rule(torch.relu, torch.randn(2, 3)).free)
        [('0', 0), ('0', 1)]
    """
    sample = Sample(op, args, kwargs)
    result = _check(sample, Variant())
    activations = [path for path in sample.tensors if path not in sample.weights]
    for path in activations if len(activations) > 1 else ():
        _check(sample, Variant(bare=path))
    for axis in sample.neighbours():
        _check(sample, Variant(joined=axis))
    free, frozen = set(result.free), dict(result.frozen)
    for axis in sample.axes():
        if axis not in free:
            found = _check(sample, Variant(alone=axis))
            free |= found.free & {axis}
    return RuleCheck(frozenset(free), {axis: why for axis, why in frozen.items() if axis not in free})


def _check(sample: Sample, variant: Variant) -> RuleCheck:
    claims = _Claims(sample, variant)
    claims.check_dependence()
    if claims.rule.movement:
        claims.check_movement()
    else:
        claims.check_equivariance()
    if claims.rule.movement or variant == Variant():
        claims.check_edits()
    return claims.result()


class _Claims:
    """The labels that a rule gives to a sample's tensors, and the tests of what they say."""

    def __init__(self, sample: Sample, variant: Variant) -> None:
        self.sample, self.variant = sample, variant
        self.net = _trace(sample, variant, {})
        if self.rule is UNKNOWN:
            raise UsageError(f"{sample.name} has no rule: register one with surgery.oprule")
        factored = {
            k: [f.dims for f in value.fields if len(f.dims) > 1] for k, value in enumerate(self.results())
        }  # fmt: skip
        if any(factored.values()):
            self.net = _trace(sample, variant, factored)
        self.analysis: Analysis = analyse(self.net)
        self.state = sample.state()
        self.inputs = self.label_inputs()
        self.labels = [self.units(value.fields) for value in self.results()]
        self.before = sample.run(self.state)
        self.scale = max((_magnitude(t) for t in self.before), default=0.0) or 1.0

    # ---- labels

    @property
    def node(self) -> fx.Node:
        """The op in the network's graph."""
        made = [n for n in self.net.graph.nodes if n.op.startswith("call")]
        found: fx.Node = next(n for n in made if n.target == "op" or n.meta.get("path") == "")
        return found

    @property
    def rule(self) -> Rule:
        leaf = self.sample.op if isinstance(self.sample.op, nn.Module) else None
        return rule_for(self.node, leaf)

    def record(self, node: fx.Node) -> Any:
        return analyse(self.net).values[":", node.name]

    def results(self) -> list[Labelled]:
        found = pytree.tree_leaves(self.record(self.node))
        return [leaf for leaf in found if isinstance(leaf, Labelled)]

    def units(self, fields: Iterable[Field]) -> list[_Axes]:
        return [_Axes(f.dims, self.analysis.unit_of[f.ids]) for f in fields]

    def label_inputs(self) -> dict[str, list[_Axes]]:
        """For each tensor that the op reads the labelled axes."""
        given: Any = fx.map_arg((self.node.args, self.node.kwargs), self.record)
        refs = pytree.tree_leaves((self.sample.args, self.sample.kwargs))
        found = {
            ref.path: self.units(value.fields)
            for ref, value in zip(refs, pytree.tree_leaves(given), strict=True)
            if isinstance(ref, Ref)
        }
        for (name, axis), units in self.analysis.axis_units.items():
            if name.startswith("op."):
                found.setdefault(name.removeprefix("op."), []).append(_Axes((axis,), units))
        return found

    def find_contracted(self) -> NDArray[np.bool_]:
        """Units that every number of the output may depend on: what the op contracts, or normalises over."""
        result = np.zeros(self.analysis.count, dtype=bool)
        for units, _ in (*self.analysis.mixed, *self.analysis.single):
            result[units] = True
        for (name, axis), units in self.analysis.axis_units.items():
            if "consumer" in self.analysis.roles[name, axis] and not name.startswith("readers."):
                result[units] = True
        return result

    def result(self) -> RuleCheck:
        free: set[Axis] = set()
        frozen: dict[Axis, str] = {}
        for path, axes in self.inputs.items():
            for axis in axes:
                for dim in axis.dims:
                    if not self.analysis.frozen[axis.units].any():
                        free.add((path, dim))
                        continue
                    why = dict.fromkeys(why for units, why in self.analysis.reasons if np.isin(units, axis.units).any())
                    frozen[path, dim] = "; ".join(why) or "not all of its positions can be told apart"
        return RuleCheck(frozenset(free), frozen)

    # ---- tests

    def check_dependence(self) -> None:
        """Change one position at a time."""
        anywhere = self.find_contracted()
        for path, axes in self.inputs.items():
            for axis in axes:
                for place in np.ndindex(axis.units.shape):
                    unit = int(axis.units[place])
                    if self.analysis.frozen[unit] or anywhere[unit]:
                        continue
                    after = self.sample.run({**self.state, path: self.change(path, axis.dims, place)})
                    for k, (a, b) in enumerate(zip(self.before, after, strict=True)):
                        wrong = self.differs(a, b) & ~self.find_unit(k, unit)
                        if wrong.any():
                            self.fail(
                                f"changing {_position(path, axis.dims, place)} changes its result "
                                f"{self.where(k, wrong)}, which the rule does not label with that channel"
                            )

    def check_movement(self) -> None:
        """An op that only moves data moves the labels as it moves numbers."""
        for k, axes in enumerate(self.labels):
            for axis in axes:
                state = dict(self.state)
                for path, given in self.inputs.items():
                    if path in self.sample.tensors and self.state[path].is_floating_point():
                        own = next((a for a in given if np.isin(a.units, axis.units).any()), None)
                        shape = self.state[path].shape
                        state[path] = torch.full(shape, -1.0).double() if own is None else own.spread(shape).double()
                got = self.sample.run(state)[k]
                claimed = axis.spread(got.shape)
                wrong = (got != claimed) & torch.from_numpy(~self.analysis.frozen)[claimed]
                if wrong.any():
                    self.fail(
                        f"its result {self.where(k, wrong)} does not hold the channel that the rule labels it with"
                    )

    def check_equivariance(self) -> None:
        """Permute the channels of everything that the op reads."""
        for seed in range(3):
            groups = [g for g in self.analysis.groups if g.editable]
            layouts = Layouts(self.analysis, {g: g.permutation(seed) for g in groups}, {})
            state = {path: _permute(value, self.inputs.get(path, []), layouts) for path, value in self.state.items()}
            try:
                after = self.sample.run(state)
            except (RuntimeError, ValueError, IndexError) as error:
                self.fail(f"it cannot be run on permuted channels: {error}")
            for k, (a, b) in enumerate(zip(self.before, after, strict=True)):
                wrong = self.differs(_permute(a, self.labels[k], layouts), b)
                if wrong.any():
                    moved = [axis_name(p, x.dims) for p, xs in self.inputs.items() for x in xs if layouts.of(x.units)]
                    self.fail(
                        f"with channels permuted along {', '.join(moved)} its result {self.where(k, wrong)} is not "
                        "what the rule's labels say"
                    )

    def check_edits(self) -> None:
        """Edit the network around the op: all groups at once and, where that is refused, each on its own."""
        names = [g.name for g in self.analysis.groups if g.editable]
        if not self.edit(names, strict=False) and self.variant.joined is None:
            for name in names:
                self.edit([name], strict=True)

    def edit(self, names: list[str], strict: bool) -> bool:
        """Permute, double and halve some groups; whether nothing was refused."""
        expected = _outputs(self.net)
        step = _restrict(slim_plan(self.net, 0.5), names)
        reference = None if self.analysis.mixed else _outputs(self.switch_off(step))
        wide = self.compare_edit("widened with surgery.widen", lambda: _widen(self.net, names), expected, strict)
        slim = self.compare_edit("slimmed with surgery.slim", lambda: apply(self.net, step), reference, strict)
        edited = [wide, slim]
        if self.rule.movement:
            same = self.compare_edit(
                "permuted with surgery.reindex", lambda: _shuffle(self.net, names), expected, strict
            )
            edited.append(same)
        if slim is not None and self.rule.rewrite is not None:
            result = _outputs(slim)
            self.compare_edit("slimmed, then widened", lambda: _widen(slim, names), result, strict=False)
        return None not in edited

    def switch_off(self, step: Reindex) -> nn.Module:
        """The network whose layers do not read the channels that a step drops."""
        kept = np.ones(self.analysis.count, dtype=bool)
        for name, index in step.indices.items():
            group = self.analysis.find(name)
            kept[group.start : group.start + group.units] = np.isin(np.arange(group.units), index)
        net = copy.deepcopy(self.net)
        tensors = named_tensors(net, once=True)
        single = np.zeros(self.analysis.count, dtype=bool)
        for units, _ in self.analysis.single:
            single[units] = True
        for (name, axis), units in self.analysis.axis_units.items():
            off = ~kept[units] & (("consumer" in self.analysis.roles[name, axis]) | single[units])
            where = tuple(torch.from_numpy(off) if d == axis else slice(None) for d in range(axis + 1))
            with torch.no_grad():
                if off.any():
                    tensors[name][where] = 0
        return net

    # ---- numbers

    def change(self, path: str, dims: tuple[int, ...], place: tuple[int, ...]) -> torch.Tensor:
        """The tensor with other numbers at one position of an axis."""
        value = self.state[path].clone()
        where = tuple(place[dims.index(d)] if d in dims else slice(None) for d in range(value.ndim))
        part = value[where]
        if value.dtype == torch.bool:
            value[where] = ~part
        elif value.is_floating_point():
            noise = torch.rand(part.shape, generator=self.sample.generator, dtype=value.dtype)
            value[where] = part + 0.1 + noise
        else:
            value[where] = torch.where(part > value.min(), value.min(), value.max())
        return value

    def find_unit(self, k: int, unit: int) -> torch.Tensor:
        """Where an output holds a unit."""
        result = torch.zeros(self.before[k].shape, dtype=torch.bool)
        for axis in self.labels[k]:
            result |= axis.spread(result.shape) == unit
        return result

    def differs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ~torch.isclose(a, b, rtol=0.0, atol=EXACT * self.scale, equal_nan=True)

    def compare_edit(
        self, what: str, make: Callable[[], nn.Module], expected: list[torch.Tensor] | None, strict: bool
    ) -> nn.Module | None:
        """The network after an edit, which must give what is expected; None where it is refused.

        An edit may be refused, unless it is strict, where a node would have to be replaced by selections along several
        axes, and where channels that are spread over two axes would fill no rectangle.
        """
        try:
            module = make()
        except EditError as error:
            if strict:
                self.fail(f"a network around it cannot be {what}, though the rule leaves its axes free: {error}")
            return None
        try:
            got = _outputs(module)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            self.fail(f"a network around it cannot be run when {what}: {error}")
        for a, b in zip(expected or got, got, strict=True):
            bound = EXACT * (_magnitude(a) or 1.0)
            if a.shape != b.shape or not torch.allclose(a, b, rtol=0.0, atol=bound, equal_nan=True):
                self.fail(f"a network around it computes something else when {what}")
        return module

    def where(self, k: int, wrong: torch.Tensor) -> str:
        """The first wrong position."""
        first = tuple(int(i) for i in wrong.nonzero()[0])
        return f"at {first}" if len(self.before) == 1 else f"{k} at {first}"

    def fail(self, what: str) -> NoReturn:
        raise VerificationError(f"the rule of {self.sample.name} is wrong: {what}{self.variant}")


@dataclass(frozen=True, eq=False)
class _Axes:
    """The units along some dims of a tensor."""

    dims: tuple[int, ...]
    units: Ids

    def spread(self, shape: Sequence[int]) -> torch.Tensor:
        """The units at every position of a tensor of that shape."""
        sizes = [n if d in self.dims else 1 for d, n in enumerate(shape)]
        return torch.tensor(self.units.reshape(sizes)).expand(tuple(shape))


def _trace(sample: Sample, variant: Variant, factored: Mapping[int, list[tuple[int, ...]]]) -> TracedModule:
    net = trace(SampleNetwork(sample, variant, factored), (), check=False)  # it runs as a graph alone
    assert isinstance(net, TracedModule)
    return net


def _widen(module: nn.Module, names: list[str]) -> nn.Module:
    """Twice as wide wherever copies can be made."""
    return apply(module, _restrict(widen_plan(module, 2.0), names))


def _restrict(step: Reindex, names: list[str]) -> Reindex:
    return Reindex({name: index for name, index in step.indices.items() if name in names})


def _shuffle(module: nn.Module, names: list[str]) -> nn.Module:
    groups = [g for g in analyse(module).groups if g.editable and g.name in names]
    return reindex(module, {g.name: g.permutation(1) for g in groups})


def _permute(value: torch.Tensor, axes: list[_Axes], layouts: Layouts) -> torch.Tensor:
    for axis in axes:
        layout = layouts.of(axis.units)
        if layout is not None:
            front = value.movedim(axis.dims, tuple(range(len(axis.dims))))
            taken = front.flatten(0, len(axis.dims) - 1)[torch.from_numpy(layout.old)].reshape(front.shape)
            value = taken.movedim(tuple(range(len(axis.dims))), axis.dims).contiguous()
    return value


def _outputs(module: nn.Module) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        return list(module())


def _magnitude(value: torch.Tensor) -> float:
    finite = value[value.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _position(path: str, dims: tuple[int, ...], place: tuple[int, ...]) -> str:
    return f"position {place[0] if len(place) == 1 else place} on {axis_name(path, dims)}"
