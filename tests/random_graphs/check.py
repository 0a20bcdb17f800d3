"""What has to hold for a random network: every edit is exact, or refused with a reason.

Traced, permuted, widened and slimmed networks are compared with the network itself, in both modes, at the batch size
that was traced and at another one, outputs and gradients of inputs and parameters; slim ones with two implementations
of "switched off" (`surgery.masked` and `tests.switched_off`). One that was widened and slimmed goes through a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

import surgery
from surgery.errors import SurgeryError
from tests.random_graphs import Steps, build
from tests.switched_off import Run, Source, find_sources, narrowed, pulled_back, run, run_switched_off, worst_difference

Made = TypeVar("Made")
Runs = dict[tuple[bool, int], Run]
"""By whether it is in training, and the batch size."""
EXACT = 1e-10
ENDS = ("network", "no layer contracts", "holds no channels")
"""Reasons of groups that are not meant to be edited: inputs and outputs, and what nothing reads."""


@dataclass
class Outcome:
    """What came of one network."""

    traced: bool = False
    edits: int = 0
    """Edits that were made and compared."""
    refused: dict[str, str] = field(default_factory=dict)
    """By what was asked for, the reason."""
    worst: float = 0.0
    vacuous: list[str] = field(default_factory=list)
    """Slim networks whose removed channels do not show in the outputs, so that nothing is judged."""
    groups: int = 0
    editable: int = 0
    """Of the groups that are neither an end of the network nor unread, how many can be edited."""


class WrongError(AssertionError):
    """An edit that is neither exact nor refused."""


def check(steps: Steps, output: str = "tuple") -> Outcome:
    """Try every edit on one network.

    Raises:
        WrongError: a result differs, or an error that is not the package's.
    """
    return _Check(steps, output).run()


class _Check:
    def __init__(self, steps: Steps, output: str) -> None:
        self.steps, self.output, self.outcome = steps, output, Outcome()
        self.batch = 1 + len(steps) % 2
        self.net, self.inputs = build(steps, output, self.batch)
        _, more = build(steps, output, 3)
        self.batches = (self.inputs, more)

    def run(self) -> Outcome:
        traced = self.attempt("trace", lambda: surgery.trace(self.net, self.inputs))
        if traced is None:
            return self.outcome
        self.outcome.traced = True
        plain = self.runs("the network", self.net)
        self.compare("trace", self.runs("trace", traced), plain)
        groups = surgery.dimension_groups(traced)
        inner = [g for g in groups if not any(end in g.reason for end in ENDS)]
        self.outcome.groups, self.outcome.editable = len(inner), sum(g.editable for g in inner)
        order = {g.name: g.permutation(seed=1) for g in groups if g.editable}
        self.edit("reindex", traced, plain, lambda m: surgery.reindex(m, order), copies=False)
        factor = [1.6, 2.0][len(self.steps) % 2]
        wide = self.edit("widen", traced, plain, lambda m: surgery.widen(m, factor, seed=2))
        slim = self.slim("slim", traced, 0.5)
        if slim is not None:
            off = self.attempt("masked", lambda: surgery.masked(traced, surgery.split_masks(traced, 0.5)))
            if off is not None:
                self.compare("masked", self.narrowed("masked", off, slim[1]), self.runs("slim", slim[0]))
        again = None if wide is None else self.slim("slim of widen", wide, 0.4)
        for made in (again, slim)[len(self.steps) // 2 % 2 :]:
            if made is not None:
                self.through_file(made[0])
                break
        return self.outcome

    def edit(
        self, what: str, traced: nn.Module, plain: Runs, edit: Callable[[nn.Module], nn.Module], copies: bool = True
    ) -> nn.Module | None:
        """An edit that keeps the function."""
        made = self.attempt(what, lambda: find_sources(traced, edit, copies))
        if made is None:
            return None
        edited, sources = made
        runs = self.runs(what, edited)
        self.compare(what, {how: pulled_back(r, plain[how], sources) for how, r in runs.items()}, plain)
        return edited

    def slim(self, what: str, dense: nn.Module, rate: float) -> tuple[nn.Module, dict[str, Source]] | None:
        """A slim network, compared with what is switched off in the dense one."""
        made = self.attempt(what, lambda: find_sources(dense, lambda m: surgery.slim(m, rate), copies=False))
        if made is None:
            return None
        runs = self.runs(what, made[0])
        self.compare(what, runs, self.narrowed(f"switched off, {what}", dense, made[1], off=True))
        whole, how = _run(dense, self.inputs, False, None), (False, self.batch)
        fewer = any(made[1][name].positions.numel() < p.numel() for name, p in dense.named_parameters())
        if fewer and worst_difference(Run(runs[how].outputs, {}), Run(whole.outputs, {})) <= EXACT:
            self.outcome.vacuous.append(what)
        return made

    def narrowed(self, what: str, dense: nn.Module, kept: dict[str, Source], off: bool = False) -> Runs:
        """Of the dense network, its parts that the slim one has; the others are switched ``off`` here, or are so."""
        runs = self.runs(what, dense, kept if off else None)
        return {how: narrowed(found, kept) for how, found in runs.items()}

    def through_file(self, module: nn.Module) -> None:
        fresh, _ = build(self.steps, self.output)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "saved"
            if self.attempt("save", lambda: surgery.save(module, place)) is None:
                return
            loaded = self.attempt("load", lambda: surgery.load(place, model=fresh))
        if loaded is not None:
            self.compare("load", self.runs("load", loaded), self.runs("save", module))

    def attempt(self, what: str, make: Callable[[], Made]) -> Made | None:
        try:
            return make()
        except SurgeryError as error:
            self.outcome.refused[what] = str(error)
            return None
        except Exception as error:
            raise WrongError(f"{what}: {type(error).__name__}: {error}") from error

    def runs(self, what: str, module: nn.Module, kept: dict[str, Source] | None = None) -> Runs:
        """By mode and batch size; without those for which the module refuses to run, with a reason."""
        found = {}
        for train in (False, True):
            for inputs in self.batches:
                batch = len(inputs[0])
                try:
                    found[train, batch] = _run(module, inputs, train, kept)
                except SurgeryError as error:
                    if batch == self.batch:
                        raise WrongError(f"{what}: refuses the batch that was traced: {error}") from error
                    self.outcome.refused[f"batch {batch}, {what}"] = str(error)
                except Exception as error:
                    how = f"{_mode(train)} at batch {batch}"
                    raise WrongError(f"{what}: cannot run in {how}: {type(error).__name__}: {error}") from error
        return found

    def compare(self, what: str, runs: Runs, expected: Runs) -> None:
        for (train, batch), found in runs.items():
            how = f"{what}, in {_mode(train)} at batch {batch}"
            try:
                worst = worst_difference(found, expected[train, batch])
            except AssertionError as error:
                raise WrongError(f"{how}: {error}") from error
            if not worst <= EXACT:
                raise WrongError(f"{how}: off by {worst:.2g}")
            self.outcome.worst = max(self.outcome.worst, worst)
        self.outcome.edits += 1


def _mode(train: bool) -> str:
    return "training" if train else "evaluation"


def _run(module: nn.Module, inputs: tuple[Tensor, ...], train: bool, kept: dict[str, Source] | None) -> Run:
    with torch.random.fork_rng(devices=[]):
        return run(module, inputs, train) if kept is None else run_switched_off(module, kept, inputs, train)


def shrink(steps: Steps, output: str, limit: int = 60) -> tuple[Steps, str, str]:
    """A smaller network that is wrong too, and how: fewer steps, smaller numbers, a plain output."""

    def problem(tried: Steps, form: str) -> str:
        try:
            check(tried, form)
        except WrongError as error:
            return str(error)
        return ""

    found = problem(steps, output)
    tries, progress = 0, True
    while progress and tries < limit:
        progress = False
        smaller = [(steps[:k] + steps[k + 1 :], output) for k in range(len(steps))] if len(steps) > 1 else []
        smaller += [(steps, "tuple")] if output != "tuple" else []
        for k, (kind, a, b) in enumerate(steps):
            for numbers in ((0, b), (a, 0), (a // 7 * 7, b), (a, b // 7 * 7)):
                if numbers != (a, b):
                    smaller.append(([*steps[:k], (kind, *numbers), *steps[k + 1 :]], output))
        for tried, form in smaller:
            tries += 1
            said = problem(tried, form)
            if said:
                steps, output, found, progress = tried, form, said, True
                break
            if tries >= limit:
                break
    return steps, output, found
