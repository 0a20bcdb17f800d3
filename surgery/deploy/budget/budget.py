"""Slimming to a budget: choose widths by damage and saving such that the model keeps to a budget.

The cost of a slim model is predicted (`surgery.deploy.budget.predict`), then measured on the whole model: tables of
layers' latencies do not add up. Each measurement corrects the next prediction, until a model keeps to the budget and
nearly uses it. Latency is measured in turns with the dense model: a slow phase of the machine would look like a slower
model otherwise, and too much would be removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from surgery.deploy.budget.search import KINDS, Figure, Search, Told, Trial, unreachable
from surgery.deploy.budget.widths import Widths
from surgery.deploy.measure.jobs import Runner
from surgery.errors import UsageError
from surgery.operations.importance.registry import How, importance_name, rank_on
from surgery.operations.slim import fit_units, slim
from surgery.progress import Progress
from surgery.settings import BudgetSettings, accepts
from surgery.training.data.data import Data
from surgery.units import Amount, parse_amount

_SLACK = 1.5
"""Factor over a latency budget up to which the smallest model is not refused at once, because of noise."""
_JUDGED = 512
"""Largest number of training images on which damage is measured."""
_RATES = (0.75, 0.5, 0.25)
"""Rates at which each part is slimmed alone to measure its damage."""
_ROUND = (8, 16, 32)
"""Multiples that widths may be rounded up to if that is faster."""
_FASTER = 0.03
"""Least relative gain of a larger multiple."""


@dataclass(frozen=True)
class Budgeted:
    """A model that keeps to a budget.

    Attributes:
        module: the slim model.
        kind: one of `KINDS`.
        limit: the budget.
        before: cost of the dense model; for latency, the smaller of two measurements.
        predicted: prediction for ``module`` before it was measured.
        measured: cost of ``module``, never above ``limit``. For latency, the larger of two measurements, each the ratio
            to the dense model in that run times ``before``.
        rates: rate of each group that was slimmed.
        round_to: the multiple of widths.
        importance: the name of the criterion by which channels were kept.
        damage: increase of the loss when each part was slimmed alone, by rate; without data, the share of its squared
            weights that was removed.
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
    latency_ms: float | str | None = None,
    macs: float | str | None = None,
    params: float | str | None = None,
    bytes: float | str | None = None,
    data: Data | None = None,
    importance: How = "prefix",
    calibration: Any = None,
    settings: BudgetSettings = BudgetSettings(),
    timer: Timer | None = None,
    progress: Progress | None = None,
    on_figure: Told | None = None,
) -> Budgeted:
    """Slim a model to a budget, with a separate rate for each part. Fine-tune the result afterwards.

    Channels are removed where the predicted saving is largest for the damage.

    Args:
        module: a traced, trained module. It is not changed.
        latency_ms, macs, params, bytes: the budget, one of them: median latency of one query in ms, or a count of
            `surgery.cost` (``bytes`` of parameters and buffers). A count of at most 1 is a share of what the module
            takes; text is read by `surgery.units.parse_amount`: ``"5ms"``, ``"300M"``, ``"40%"``, the last one of
            latency too: a share of the dense model's, as it is measured first.
        data: damage is the increase of the loss on up to 512 *training* images when a part is slimmed alone; without
            data, the share of the part's squared weights that is removed.
        importance: which channels are kept, as in `surgery.slim`; ``"magnitude"`` suits a trained model. A criterion on
            data that has none of its own looks at the training images of ``data``. Channels are scored once.
        calibration: inputs on which the layers of the result are fitted to what the dense network gave, as in
            `surgery.slim`. The biases that some layers get by it are within a budget of parameters or bytes; latency is
            measured without them.
        settings: how models are timed and searched, see `surgery.BudgetSettings`; its fields may be given as keywords.
            Of them ``round_to`` is a multiple that widths are rounded up to: by default 1; for latency 8, 16 or 32 if
            models of such widths are measured to be faster for their size.
        timer: from modules by name to ms by name; replaces the measurement, for example by one on another machine.
        progress: called with ``"probe"`` (for latency), ``"damage"`` and ``"search"``, in this order.
        on_figure: called with each figure (`surgery.deploy.budget.search.Figure`) as soon as it is known.

    Returns:
        The slim model as ``.module``, with predictions and measurements.

    Warns:
        BudgetWarning: of all models that were measured, the smallest that is allowed alone kept to a latency. A machine
            with other work on it, or a model whose latency is not in its channels, is the usual cause.

    Raises:
        UsageError: no budget or several, or a setting out of range; calibration inputs as for `surgery.slim`.
        EditError: no model with rates of at least ``least`` keeps to the budget; says what the smallest takes.

    Example:
        >>> slim = surgery.slim_to_budget(traced, latency_ms=5.0, data=data, importance="magnitude").module
    """
    kind, amount = read_budget(latency_ms=latency_ms, macs=macs, params=params, bytes=bytes)
    tell = progress or (lambda task, done, total: None)
    told = on_figure or (lambda figure: None)
    found = find_parts(module, settings.by)
    clock = Clock(settings.timing(), timer)
    least, round_to = settings.least, settings.round_to
    space = Widths(module, found, least, round_to or 1, rank_on(importance, data))

    before = measure_cost(module, kind, clock)
    limit = amount.of(before)
    told(Figure("dense", kind, limit, before))
    common: dict[str, Any] = {"kind": kind, "limit": limit, "importance": importance_name(importance)}
    if before <= limit:
        common |= dict.fromkeys(("before", "predicted", "measured"), before)
        return Budgeted(slim(module, {}), rates={}, round_to=space.round_to, damage={}, trials=(), **common)
    refuse_unreachable(module, [(kind, limit)], least=least, round_to=space.round_to, clock=clock, told=told)
    with ExitStack() as stack:
        predict: Latency | Linear
        if kind == "latency_ms":
            dense = stack.enter_context(clock.ready(module))
            predict, before, space.round_to = _probe(module, dense, space, clock, before, limit, round_to, tell, told)
            measure = partial(_measure_latency, dense, before=before, limit=limit, clock=clock)
        else:
            predict, measure = _predict_count(space.layers, module, kind), partial(_count, kind=kind)
        damage = _measure_damage(module, found, data, space, tell)
        space.prepare(damage)
        trials: list[Trial] = []
        further = 0.0  # what the biases take that a fit adds
        while True:
            search = Search(space, predict, measure, limit - further, settings.tolerance, kind, told)
            levels, trial = search.run(settings.rounds, tell)
            trials += search.trials
            result = space.make(levels, calibration)
            added = _count(result, kind) - trial.measured if calibration is not None and kind != "latency_ms" else 0.0
            if trial.measured + added <= limit:
                break
            further = added
    return Budgeted(
        module=result,
        before=before,
        predicted=trial.predicted,
        measured=trial.measured + added,
        rates=space.rates(levels),
        round_to=space.round_to,
        damage=damage,
        trials=tuple(trials),
        **common,
    )


def read_budget(**given: float | str | None) -> tuple[str, Amount]:
    """Return the kind and the amount of the one budget that is given."""
    budgets = {kind: value for kind, value in given.items() if value is not None}
    if len(budgets) != 1:
        raise UsageError(f"give one budget, of {', '.join(KINDS)}, not {len(budgets)}")
    ((kind, value),) = budgets.items()
    timed = kind == "latency_ms"
    if isinstance(value, str):
        amount = parse_amount("latency" if timed else kind, value)
    else:
        amount = Amount(kind, value, share=not timed and value <= 1)
    if not 0 < amount.number <= math.inf:
        raise UsageError(f"{kind} is {value}: it must be above 0")
    return kind, amount


def refuse_unreachable(
    module: nn.Module,
    limits: Sequence[tuple[str, float]],
    *,
    least: float = BudgetSettings.least,
    round_to: int = 1,
    clock: Clock,
    told: Told | None = None,
) -> None:
    """Raise `EditError` for a limit, of one of `KINDS`, that even the smallest model exceeds.

    The smallest model is as wide as that of `slim_to_budget` with the same settings; weights do not matter. Counts are
    exact; a latency limit is refused if two measurements exceed 1.5 times the limit.
    """
    rates = {group.name: least for groups in find_parts(module, "group").values() for group in groups}
    smallest = slim(module, rates, round_to=round_to)
    taken: dict[str, float] = {}
    for kind, limit in limits:
        most = limit * (_SLACK if kind == "latency_ms" else 1)
        if kind not in taken:
            taken[kind] = measure_cost(smallest, kind, clock)
        if kind == "latency_ms" and taken[kind] > most:
            taken[kind] = min(taken[kind], measure_cost(smallest, kind, clock))
        if told is not None:
            told(Figure("smallest", kind, limit, taken[kind]))
        if taken[kind] > most:
            raise unreachable(limit, taken[kind], kind, least)


def measure_cost(module: nn.Module, kind: str, clock: Clock) -> float:
    """Measure the cost of the model in the unit of the budget."""
    return clock.times({"": module})[""].ms if kind == "latency_ms" else _count(module, kind)


def _measure_latency(
    dense: nn.Module | Runner, module: nn.Module, *, before: float, limit: float, clock: Clock
) -> float:
    """Measure the latency of a module in turns with the dense model, which takes ``before``; twice if it is within the
    limit, and then return the larger one."""
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
    limit: float,
    round_to: int | None,
    tell: Progress,
    told: Told,
) -> tuple[Latency, float, int]:
    """Fit a prediction of latency to models with each stage slimmed alone and all of them together. Return it, the
    smaller of ``before`` and the dense model's latency in this run, and the best multiple to round widths to."""
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
    odd = 0.55  # of a power of 2, a width that 4 does not divide
    if round_to is None:
        for multiple in (1, *_ROUND):
            add(f"round {multiple}", odd, multiple)
    timed = clock.times(
        probes,
        lambda _, done, total: tell("probe", done, total),
        lambda name, one: told(Figure("probe", "latency_ms", limit, before * one.over_first, name=name)),
    )
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
    """Measure the damage of slimming each part alone, by rate."""
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
