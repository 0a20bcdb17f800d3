"""Slimming to a budget: widths for which a model takes so much time, and no more, chosen by what they cost and spare.

What a slim model takes is predicted (`surgery.deploy.budget.predict`) and then measured, on the whole of it: tables of
layers' latencies do not add up. What was measured corrects the next prediction, until a model keeps to the budget and
nearly uses it. Latency is measured next to the dense model's, in turns: a machine that is slower for a while would look
like a slower model otherwise, and too much would be cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from surgery.axes.analysis import analyse
from surgery.axes.groups import DimensionGroup
from surgery.counting.cost import cost
from surgery.deploy.budget.clock import Clock, Timer
from surgery.deploy.budget.judge import judge
from surgery.deploy.budget.parts import find_parts, slim_each_alone
from surgery.deploy.budget.predict import Array, Latency, Layers, Linear
from surgery.deploy.budget.widths import Levels, Widths
from surgery.deploy.measure.jobs import Runner
from surgery.errors import EditError, UsageError, whole_number
from surgery.operations.slim import fit_units, slim
from surgery.progress import Progress
from surgery.settings import BudgetSettings, accepts
from surgery.training.data.data import Data

KINDS: Mapping[str, str] = {"latency_ms": "ms", "macs": "MACs", "params": "parameters", "bytes": "bytes"}
"""What a budget can be of, and its unit."""

_SLACK = 1.5
"""Times a budget of latency that the smallest model may take before all else is measured: noise can be as much."""
_JUDGED = 512
"""Training images on which the damage of slimming is measured, at the most."""
_RATES = (0.75, 0.5, 0.25)
"""Rates at which each part is slimmed alone, to see what that damages."""
_ROUND = (8, 16, 32)
"""Multiples that widths may be rounded up to where that is faster."""
_FASTER = 0.03
"""By how much it must be faster than a smaller multiple."""


@dataclass(frozen=True)
class Trial:
    """A model that was made and measured: what was predicted for it, and what it took."""

    predicted: float
    measured: float


@dataclass(frozen=True)
class Budgeted:
    """A model that keeps to a budget.

    Attributes:
        module: the model.
        kind: what the budget is of, one of `KINDS`.
        limit: the budget.
        before: what the dense model takes; of latency, the least of two measurements.
        predicted: what was predicted for ``module``, before it was measured.
        measured: what it takes; never above ``limit``. Of latency, the larger of two measurements, each being its ratio
            to the dense model in that run times ``before``.
        rates: the rate at which each group was slimmed; those that were left as they are have none.
        round_to: what widths are multiples of.
        importance: which channels were kept.
        damage: of each part the increase of the loss when it was slimmed alone, by rate; without data, the share of its
            weights' squares that went.
        trials: all models that were measured on the way, in order.
    """

    module: nn.Module = field(repr=False, compare=False)
    kind: str
    limit: float
    before: float
    predicted: float
    measured: float
    rates: Mapping[str, float]
    round_to: int
    importance: str
    damage: Mapping[str, Mapping[float, float]]
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the model."""
        damage = {name: {f"{rate:g}": value for rate, value in found.items()} for name, found in self.damage.items()}
        fields = ("kind", "limit", "before", "predicted", "measured", "round_to", "importance")
        plain = {name: getattr(self, name) for name in fields}
        return {**plain, "rates": dict(self.rates), "damage": damage, "trials": [asdict(t) for t in self.trials]}


@accepts(BudgetSettings)
def slim_to_budget(
    module: nn.Module,
    *,
    latency_ms: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    data: Data | None = None,
    by: str = "group",
    importance: str = "prefix",
    round_to: int | None = None,
    settings: BudgetSettings = BudgetSettings(),
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> Budgeted:
    """Slim a model to a budget, each part of it at a rate of its own; it is to be fine-tuned afterwards.

    Parts lose channels in the order of what that saves, by prediction, over the damage it does.

    Args:
        module: a traced, trained module. It is not changed.
        latency_ms, macs, params, bytes: the budget, one of them: the median latency of one query, or what
            `surgery.cost` counts (``bytes`` are those of parameters and buffers).
        data: damage is the increase of the loss on up to 512 of its *training* images when a part is slimmed alone;
            without data it is the share of the part's weights that goes, by their squares.
        by: what has a rate of its own: each ``"group"``, or ``"stage"`` (`surgery.deploy.budget.parts.find_parts`).
        importance: which channels are kept, as in `surgery.slim`; ``"magnitude"`` suits a trained model.
        round_to: widths are rounded up to a multiple of it. By default, for latency, 8, 16 or 32 if models of such
            widths were measured to be faster for their size, and 1 elsewhere.
        settings: how models are timed and searched, see `surgery.BudgetSettings`; its fields may be given as keywords.
        timer: times the models instead: from modules by name to ms by name, on the machine they are meant for, say.
        progress: told of ``"probe"`` (for latency), ``"damage"`` and ``"search"``, in this order.

    Returns:
        The slim model as ``.module``, with what was predicted and measured on the way.

    Raises:
        UsageError: no budget or several, or a setting out of range.
        EditError: no rates of at least ``least`` were found that keep to the budget; says what the smallest takes.

    Example:
        >>> slim = surgery.slim_to_budget(traced, latency_ms=5.0, data=data, importance="magnitude").module
    """
    kind, limit = _read_budget(latency_ms=latency_ms, macs=macs, params=params, bytes=bytes)
    tell = progress or (lambda task, done, total: None)
    found = find_parts(module, by)
    clock = Clock(settings.timing(), timer)
    least, multiple = settings.least, 1 if round_to is None else whole_number("round_to", round_to, 1)
    space = Widths(module, found, least, multiple, importance)

    before = _measure(module, kind, clock)
    common: dict[str, Any] = {"kind": kind, "limit": limit, "importance": importance}
    if before <= limit:
        common |= dict.fromkeys(("before", "predicted", "measured"), before)
        return Budgeted(slim(module, {}), rates={}, round_to=space.round_to, damage={}, trials=(), **common)
    refuse_unreachable(
        module, [(kind, limit)], least=least, round_to=space.round_to, importance=importance, clock=clock
    )
    with ExitStack() as stack:
        predict: Latency | Linear
        if kind == "latency_ms":
            dense = stack.enter_context(clock.ready(module))
            predict, before, space.round_to = _probe(module, dense, space, clock, before, round_to, tell)
            measure = partial(_measure_latency, dense, before=before, limit=limit, clock=clock)
        else:
            predict, measure = _predict_count(space.layers, module, kind), partial(_count, kind=kind)
        damage = _measure_damage(module, found, data, space, tell)
        space.prepare(damage)
        search = _Search(space, predict, measure, limit, settings.tolerance, KINDS[kind])
        levels, trial = search.run(settings.rounds, tell)
    return Budgeted(
        module=space.make(levels),
        before=before,
        predicted=trial.predicted,
        measured=trial.measured,
        rates=space.rates(levels),
        round_to=space.round_to,
        damage=damage,
        trials=tuple(search.trials),
        **common,
    )


def _read_budget(**given: float | None) -> tuple[str, float]:
    """The kind of the one budget that is given, and its limit."""
    budgets = {kind: value for kind, value in given.items() if value is not None}
    if len(budgets) != 1:
        raise UsageError(f"give one budget, of {', '.join(KINDS)}, not {len(budgets)}")
    ((kind, limit),) = budgets.items()
    if not 0 < limit <= math.inf:
        raise UsageError(f"{kind} is {limit}: it must be above 0")
    return kind, limit


def refuse_unreachable(
    module: nn.Module,
    limits: Sequence[tuple[str, float]],
    *,
    least: float = BudgetSettings.least,
    round_to: int = 1,
    importance: str = "prefix",
    clock: Clock,
) -> None:
    """Raise `EditError` for a limit, of one of `KINDS`, that the model does not keep to even at the least widths.

    Models are what `slim_to_budget` makes of ``module`` with the same settings, whatever its weights. What is counted
    is exact; a latency is refused where two measurements of it are above 1.5 times its limit.
    """
    rates = {group.name: least for groups in find_parts(module, "group").values() for group in groups}
    smallest = slim(module, rates, round_to=round_to, importance=importance)
    taken: dict[str, float] = {}
    for kind, limit in limits:
        most = limit * (_SLACK if kind == "latency_ms" else 1)
        if kind not in taken:
            taken[kind] = _measure(smallest, kind, clock)
        if kind == "latency_ms" and taken[kind] > most:
            taken[kind] = min(taken[kind], _measure(smallest, kind, clock))
        if taken[kind] > most:
            raise _unreachable(limit, taken[kind], KINDS[kind], least)


def _unreachable(limit: float, taken: float, unit: str, least: float) -> EditError:
    return EditError(
        f"no model of these widths keeps to {limit:.10g} {unit}: the smallest, {least:g} of every width, takes "
        f"{taken:.10g} {unit}; allow more, or begin with a smaller model"
    )


def _measure(module: nn.Module, kind: str, clock: Clock) -> float:
    """What the model takes of what a budget is of."""
    return clock.times({"": module})[""].ms if kind == "latency_ms" else _count(module, kind)


def _measure_latency(
    dense: nn.Module | Runner, module: nn.Module, *, before: float, limit: float, clock: Clock
) -> float:
    """The latency of a module next to the dense model's, which is ``before``; the larger of two where it keeps to the
    limit."""
    with clock.ready(module) as slimmed:
        taken = 0.0
        for _ in range(2):
            taken = max(taken, before * clock.times({"dense": dense, "slim": slimmed})["slim"].over_first)
            if taken > limit:
                break
    return taken


def _count(module: nn.Module, kind: str) -> float:
    return float(getattr(cost(module), kind))


def _predict_count(layers: Layers, module: nn.Module, kind: str) -> Linear:
    amounts = {"macs": layers.macs, "params": layers.params, "bytes": layers.bytes}[kind]
    return Linear(layers, amounts, _count(module, kind) - float(amounts.sum()))


def _probe(
    module: nn.Module,
    dense: nn.Module | Runner,
    space: Widths,
    clock: Clock,
    before: float,
    round_to: int | None,
    tell: Progress,
) -> tuple[Latency, float, int]:
    """A prediction of latency, fitted to the model with each stage slimmed alone and all of them together; what the
    dense model takes, the less of ``before`` and what it took now; and the multiple that widths are best rounded to."""
    stages, analysis = find_parts(module, "stage"), analyse(module)
    probes: dict[str, nn.Module | Runner] = {"dense": dense}
    kept: dict[str, Array] = {"dense": np.ones(len(space.groups))}

    def add(name: str, rates: Mapping[str, float] | float, multiple: int) -> None:
        options: dict[str, Any] = {"round_to": multiple, "importance": space.importance}
        probes[name] = slim(module, rates, **options)
        kept[name] = space.kept_shares(fit_units(analysis, module, rates, multiple))

    for name, groups in stages.items():
        add(f"stage {name}", {g.name: 0.5 for g in groups}, space.round_to)
    for rate in (0.75, 0.5, 0.25):
        add(f"rate {rate}", rate, space.round_to)
    odd = 0.55  # for powers of 2, a width that is a multiple of no power of 2 from 4 upwards
    if round_to is None:
        for multiple in (1, *_ROUND):
            add(f"round {multiple}", odd, multiple)
    timed = clock.times(probes, lambda _, d, t: tell("probe", d, t))
    before = min(before, timed["dense"].ms)
    times = {name: before * found.over_first for name, found in timed.items()}
    predict = Latency(space.layers, stages)
    for name, ms in times.items():
        if not name.startswith("round "):
            predict.learn(kept[name], ms)
    if round_to is not None:
        return predict, before, round_to
    paid = {m: times[f"round {m}"] / float(predict(kept[f"round {m}"][:, None])[0]) for m in (1, *_ROUND)}
    fast = min(paid.values()) / (1 - _FASTER)
    return predict, before, next(multiple for multiple, ms in paid.items() if ms <= fast)


def _measure_damage(
    module: nn.Module,
    found: Mapping[str, Sequence[DimensionGroup]],
    data: Data | None,
    space: Widths,
    tell: Progress,
) -> dict[str, dict[float, float]]:
    """Of each part, by rate, what is worse when it is slimmed alone."""
    if data is None:
        return space.weights_lost(_RATES)
    damage: dict[str, dict[float, float]] = {name: {} for name in found}
    before = judge(module, data.train, most=_JUDGED).loss
    for number, rate in enumerate(_RATES):
        alone = slim_each_alone(module, found, rate, importance=space.importance)
        for done, (name, candidate) in enumerate(alone, 1):
            damage[name][rate] = judge(candidate, data.train, most=_JUDGED).loss - before
            tell("damage", number * len(found) + done, len(_RATES) * len(found))
    return damage


class _Search:
    """Makes and measures models until one keeps to the limit and nearly uses it."""

    def __init__(
        self,
        space: Widths,
        predict: Latency | Linear,
        measure: Callable[[nn.Module], float],
        limit: float,
        tolerance: float,
        unit: str,
    ) -> None:
        self._space, self._predict, self._measure = space, predict, measure
        self._limit, self._tolerance, self._unit = limit, tolerance, unit
        self._scale = 1.0
        self.trials: list[Trial] = []

    def run(self, rounds: int, tell: Progress) -> tuple[Levels, Trial]:
        """The levels of parts that do least damage of those that were measured and keep to the limit.

        Raises `EditError` where the smallest model does not.
        """
        timed = isinstance(self._predict, Latency)
        aim = self._limit * (1 - self._tolerance / 2 if timed else 1)
        fitting: list[tuple[float, Levels, Trial]] = []
        seen: set[tuple[int, ...]] = set()
        for number in range(rounds):
            levels = self._space.fit(lambda kept: self._predict(kept) * self._scale, aim)
            if tuple(levels) in seen:
                if fitting:
                    break
                aim *= 1 - self._tolerance
                continue
            seen.add(tuple(levels))
            trial = self._try(levels)
            tell("search", number + 1, rounds)
            if trial.measured <= self._limit:
                fitting.append((self._space.harm(levels), levels, trial))
                if trial.measured >= self._limit * (1 - self._tolerance):
                    break
        if not fitting:
            levels = self._space.smallest
            trial = self._try(levels)
            if trial.measured > self._limit:
                raise _unreachable(self._limit, trial.measured, self._unit, self._space.levels[-1])
            fitting.append((self._space.harm(levels), levels, trial))
        tell("search", rounds, rounds)
        _, levels, trial = min(fitting, key=lambda item: item[0])
        return levels, trial

    def _try(self, levels: Levels) -> Trial:
        """What a model takes, which corrects the prediction."""
        kept = self._space.shares(levels[:, None])
        predicted = float(self._predict(kept)[0]) * self._scale
        module = self._space.make(levels)
        measured = self._measure(module)
        if isinstance(self._predict, Latency):
            self._predict.learn(kept[:, 0], measured)
        self._scale = measured / float(self._predict(kept)[0])
        self.trials.append(Trial(predicted, measured))
        return self.trials[-1]
