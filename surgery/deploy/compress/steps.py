"""The steps of a compression, each taken over from an interrupted run where it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from surgery.deploy.budget.budget import measure_cost, slim_to_budget
from surgery.deploy.budget.clock import Clock, Timer
from surgery.deploy.compress.hints import Kept, all_channels, keep_channels
from surgery.deploy.compress.recovery import Recovered, recover, recovery_rate
from surgery.deploy.curve.run_progress import PartProgress, RunProgress
from surgery.deploy.curve.store import Store, data_identity, key_of
from surgery.deploy.measure.environment import environment
from surgery.edit.apply import carry_out
from surgery.edit.recipe import Recipe, recipe
from surgery.models.saving import save
from surgery.operations.importance.registry import rank_on
from surgery.operations.slim import slim
from surgery.settings import CompressSettings
from surgery.training.data.data import Data
from surgery.training.data.fingerprint import module_digest
from surgery.training.evaluation import evaluate
from surgery.training.history import History, Score
from surgery.training.modes import device_of


@dataclass(frozen=True)
class CompressStep:
    """One carving, and what followed. Scores are on the validation images.

    Attributes:
        limit: the budget of this step, in the unit of the whole budget.
        measured: what the student takes.
        rates: rate of each group that was slimmed, of what the step before left; ``round_to`` the multiple of widths.
        carved: score of the student as it was carved.
        compensated: score after the layers that read removed channels were fitted.
        recovered: score after the training; ``compensated`` where there was none.
        lr: the peak learning rate; None where nothing was trained.
        kept: number of the epoch that was kept, from 1; 0: none.
        hints: the stages whose ends were hints.
        history: the record of the training; None where there was none.
    """

    limit: float
    measured: float
    rates: Mapping[str, float]
    round_to: int
    carved: Score
    compensated: Score
    recovered: Score
    lr: float | None
    kept: int
    hints: tuple[str, ...]
    history: History | None

    @property
    def epochs(self) -> int:
        """Number of epochs that were trained."""
        return 0 if self.history is None else len(self.history.epochs)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        scores = {name: asdict(getattr(self, name)) for name in ("carved", "compensated", "recovered")}
        return {
            "limit": self.limit,
            "measured": self.measured,
            "rates": dict(self.rates),
            "round_to": self.round_to,
            **scores,
            "lr": self.lr,
            "epochs": self.epochs,
            "kept": self.kept,
            "hints": list(self.hints),
            "history": self.history and self.history.to_dict(),
        }


@dataclass(frozen=True)
class Carved:
    """A student before its recovery. ``search`` says how its widths were found (`surgery.Budgeted`)."""

    module: nn.Module
    search: Mapping[str, Any]
    carved: Score
    compensated: Score


class Steps:
    """Carves and recovers, or takes over what is in ``store``.

    Args:
        dense: the traced model, which teaches.
        data: to train on; its part to test on are the validation images.
        kind, limit: the whole budget, one of `surgery.deploy.budget.search.KINDS`.
        store: where finished parts are kept; None: nowhere.
        timer: replaces the measurement of latencies.
    """

    def __init__(
        self,
        dense: nn.Module,
        data: Data,
        settings: CompressSettings,
        kind: str,
        *,
        store: Store | None,
        progress: RunProgress,
        timer: Timer | None,
    ) -> None:
        self.dense, self.data, self.settings, self.kind = dense, data, settings, kind
        self.store, self.progress, self.timer = store, progress, timer
        self.score = self._score(dense)
        self._kept: Kept = all_channels(dense) if settings.hint_weight else {}
        self._given = {"dense": module_digest(dense), "data": data_identity(data)}

    def limits(self, limit: float) -> list[float]:
        """The budget of each step: a geometric sequence from what the dense model takes to ``limit``."""
        steps = self.settings.steps
        if steps == 1:
            return [limit]
        before = self.before()
        return [before * (min(limit, before) / before) ** (k / steps) for k in range(1, steps)] + [limit]

    def take(self, number: int, student: nn.Module, limit: float) -> tuple[nn.Module, CompressStep]:
        """Carve ``student``, which the step before left, to ``limit``, and recover it."""
        settings = self.settings
        with self.progress.task(f"step {number}: carve"):
            carved = self._carve(number, student, limit)
        with self.progress.task(f"step {number}: recover"):
            found, lr = None, None
            self._kept = keep_channels(self._kept, student, _further(student, carved.module).steps)
            if settings.epochs_of(number):
                lr = recovery_rate(self.score, carved.compensated, settings)
                found = self._recover(number, carved, lr)
        entry = CompressStep(
            limit=limit,
            measured=carved.search["measured"],
            rates=carved.search["rates"],
            round_to=carved.search["round_to"],
            carved=carved.carved,
            compensated=carved.compensated,
            recovered=carved.compensated if found is None else found.score,
            lr=lr,
            kept=0 if found is None else found.kept,
            hints=() if found is None else tuple(self._kept),
            history=None if found is None else found.history,
        )
        return (carved.module if found is None else found.module), entry

    def _carve(self, number: int, student: nn.Module, limit: float) -> Carved:
        settings = self.settings
        budget = settings.budget()
        made_by = {
            "part": "carved",
            "student": module_digest(student),
            **self._given,
            "budget": [self.kind, limit],
            "importance": settings.importance,
            "search": [budget.by, budget.least, budget.round_to, budget.seed],
            "machine": self._machine(),
        }
        key = key_of(made_by)
        taken = self._find(key, student)
        if taken is not None:
            module, note, _ = taken
            return Carved(module, note["search"], *(Score(**note[name]) for name in ("carved", "compensated")))
        limits: dict[str, Any] = {self.kind: limit}
        found = slim_to_budget(
            student,
            **limits,
            data=self.data,
            importance=settings.importance,
            calibration=self.data,
            settings=budget,
            timer=self.timer,
            progress=PartProgress(self.progress, f"step {number}: carve", ["probe", "damage", "search"]),
        )
        kept = rank_on(settings.importance, self.data)
        plain = slim(student, found.rates, round_to=found.round_to, importance=kept)
        carved = Carved(found.module, found.to_dict(), self._score(plain), self._score(found.module))
        scores = {"carved": asdict(carved.carved), "compensated": asdict(carved.compensated)}
        self._keep(key, made_by, student, carved.module, {"search": carved.search, **scores}, {})
        return carved

    def _recover(self, number: int, carved: Carved, lr: float) -> Recovered:
        settings = self.settings
        made_by = {
            "part": "recovered",
            "student": module_digest(carved.module),
            **self._given,
            "settings": settings.recovery(number, lr).identity(),
            "patience": settings.patience,
            "hints": [list(self._kept), settings.hint_weight],
        }
        key = key_of(made_by)
        taken = self._find(key, carved.module)
        if taken is not None:
            module, note, training = taken
            return Recovered(module, Score(**note["score"]), note["kept"], training["recover"])
        task = f"step {number}: recover"
        found = recover(
            carved.module,
            self.dense,
            self.data,
            settings,
            step=number,
            lr=lr,
            before=carved.compensated,
            hints=self._kept,
            checkpoint=None if self.store is None else self.store.unfinished(key),
            progress=PartProgress(self.progress, task, ["distill: cache", "distill"]),
        )
        note = {"score": asdict(found.score), "kept": found.kept}
        self._keep(key, made_by, carved.module, found.module, note, {"recover": found.history})
        return found

    def before(self) -> float:
        """What the dense model takes: counted, or measured once."""
        key = key_of({"part": "before", "kind": self.kind, **self._given, "machine": self._machine()})
        note = None if self.store is None else self.store.find_note(key)
        if note is not None:
            return float(note["before"])
        before = measure_cost(self.dense, self.kind, Clock(self.settings.budget().timing(), self.timer))
        if self.store is not None:
            self.store.note(key, {"before": before})
        return before

    def _machine(self) -> list[Any]:
        """What a latency depends on."""
        timed = self.kind == "latency_ms"
        return [environment().cpu, self.settings.threads, self.settings.runtime] if timed else []

    def _find(self, key: str, base: nn.Module) -> tuple[nn.Module, Mapping[str, Any], Mapping[str, History]] | None:
        """What was kept under the key: the module, made from ``base``, its note, and the records of its training."""
        kept = None if self.store is None else self.store.find(key)
        note = None if self.store is None else self.store.find_note(key)
        if kept is None or note is None:
            return None
        made = carry_out(base, Recipe.from_dict(note["recipe"]).steps)
        return kept.into(made).to(device_of(base)), note, kept.training

    def _keep(
        self,
        key: str,
        made_by: Mapping[str, Any],
        base: nn.Module,
        module: nn.Module,
        note: Mapping[str, Any],
        training: Mapping[str, History],
    ) -> None:
        """Keep a module that was made from ``base``."""
        if self.store is None:
            return
        self.store.note(key, {**note, "recipe": _further(base, module).to_dict()})
        save(module, self.store.place(key), force=True)
        self.store.keep(key, training, None, made_by)

    def _score(self, module: nn.Module) -> Score:
        return evaluate(module, self.data.test, **self.settings.scoring)


def _further(base: nn.Module, module: nn.Module) -> Recipe:
    """What was done to ``base`` to make ``module``."""
    whole = recipe(module)
    return replace(whole, steps=whole.steps[len(recipe(base).steps) :])
