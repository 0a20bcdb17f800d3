"""From a model and a data set to a measured speed/accuracy curve."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from surgery import models as catalogue
from surgery.counting.cost import cost
from surgery.deploy.classifiers import classifier, data_for
from surgery.deploy.curve.candidate_training import CHECK, ONNX_FILE, CandidateTraining, Measured, also_seed
from surgery.deploy.curve.candidates import Budget, Candidate, plan_candidates
from surgery.deploy.curve.control import control_settings, from_scratch
from surgery.deploy.curve.points import DataSummary, Point, Tradeoff
from surgery.deploy.curve.report import write_report
from surgery.deploy.curve.run_progress import RunProgress
from surgery.deploy.curve.seeds import Repeat
from surgery.deploy.curve.store import Store, link_folder
from surgery.deploy.curve.teaching import Lesson
from surgery.deploy.measure.benchmark import Comparison, compare
from surgery.deploy.measure.environment import usable_cores
from surgery.errors import UsageError
from surgery.graph.traced import info
from surgery.operations.slim import Rate
from surgery.progress import Progress
from surgery.settings import TimingSettings, TradeoffSettings, accepts
from surgery.storage.folders import refuse_folder, staged_folder, unfinished_folder
from surgery.training.data.adapt import AnyData
from surgery.training.data.data import Data
from surgery.training.history_file import HISTORY
from surgery.training.modes import pick_device
from surgery.training.tracking import follow

MARKER = "tradeoff.json"
"""The file that marks a folder as a result of `tradeoff`."""

_MEASURED_SECONDS = 2.0
"""Least time to time each model."""


@accepts(TradeoffSettings, split_rates="rates", out="directory")
def tradeoff(
    source: str | nn.Module,
    *,
    dataset: str | AnyData,
    rates: Sequence[Rate] = (1.0, 0.75, 0.5, 0.25),
    directory: str | os.PathLike[str],
    candidates: Sequence[str] = (),
    settings: TradeoffSettings = TradeoffSettings(),
    reuse: Sequence[str | os.PathLike[str]] = (),
    trust: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Tradeoff:
    """Train a model, make smaller or larger candidates from it, train, export and measure each, and write a report.

    All candidates are treated alike: made from the trained dense model (at 1.0 unchanged), trained for
    ``finetune_epochs``, saved, and exported to ONNX. The ONNX file is scored on the test images and timed. Candidates
    are timed in one run, in turns, one image at a time.

    An interrupted run resumes when it is started again. Models that an earlier run in ``directory`` or ``reuse``
    trained with the same settings are reused; only the timing is repeated.

    Args:
        source: text for `surgery.models.build`, or a module, which is not changed. Its classifier must have an output
            for each class of the data; a torchvision model is built so.
        dataset: a name for `surgery.load_data`, or what `surgery.as_data` takes.
        rates: split rates in (0, 1], or a rate for each of some layers, containers or globs (``{"layer4": 0.5}``).
        directory: the folder to write: ``tradeoff.png``, ``.html``, ``.csv``, ``.json``, ``report.md``,
            ``history.csv``, and a folder for each candidate and for the dense model. It is written whole, at the end,
            or not at all.
        candidates: further candidates, as `surgery.deploy.curve.candidates.parse` reads them: ``"widen=1.5"``; or
            budgets for `surgery.slim_to_budget` of the dense model: ``"latency=5ms"``, ``"macs=300M"``.
        settings: see `surgery.TradeoffSettings`; its fields may be given as keywords. ``teach`` says what candidates
            learn from: ``labels``; ``kd`` or ``hints`` (`surgery.distill`, with the dense model as teacher); ``evolve``
            (`surgery.evolve` of the dense model). ``control="scratch"`` also trains each candidate's sizes from
            scratch, with the epochs of the dense model and the candidate together. ``seeds`` trains each candidate
            with several seeds, from the same dense model; accuracies are means then, with intervals over seeds. With a
            latency budget, ``round_to=1`` means the fastest multiple.
        reuse: folders of other runs whose trained models are reused.
        trust: allow ``source`` to import and run code.
        force: replace ``directory`` if it is the result of an earlier run.
        command: the command in the report; by default this call.
        progress: called with ``"all"`` for the whole run, in per mille, and with the name of each task.

    Returns:
        A point for each candidate, with the Pareto front.

    Raises:
        UsageError: an argument that cannot be satisfied; nothing is written then.
        EditError: a candidate that cannot be made, or a budget that cannot be kept. Up to 1.5 times a latency budget,
            this may be raised late; trained models are kept for a run with another budget.

    Example:
        >>> surgery.tradeoff("resnet18", dataset="mnist5k", rates=[1.0, 0.5], directory="runs/demo", epochs=2).front
    """
    started = time.perf_counter()
    directory = Path(directory)
    refuse_folder(directory, marker=MARKER, force=force)
    pick_device(settings.device)  # refuses one that is not there
    for folder in reuse:
        if not (Path(folder) / MARKER).is_file():
            raise UsageError(f"{folder} has no trained models to reuse: it holds no {MARKER}")
    plan = plan_candidates(rates, candidates)
    weights = settings.weights
    if not catalogue.is_weights_file(weights):
        weights = catalogue.parse(source, weights=weights).weights if isinstance(source, str) else "as given"
    shared = ("data_root", "image_size", "limit", "skip_bad", "strict")
    data = data_for({"the model": source}, dataset, **{name: getattr(settings, name) for name in shared})
    dense = classifier(source, data, weights=settings.weights, trust=trust, seed=settings.seed)
    plan = tuple(one.of(dense) if isinstance(one, Budget) else one for one in plan)
    settings = replace(settings, weights=weights, threads=settings.threads or usable_cores())
    weighted = _task_weights(dense, plan, data, settings, trust=trust)
    with (
        unfinished_folder(directory, {"command": "tradeoff"}) as folder,
        follow(settings, progress, history=folder / HISTORY) as told,
    ):
        run = RunProgress(weighted, told)
        store = Store(folder, [*([directory] if directory.is_dir() else []), *reuse])
        training = CandidateTraining(store, data, settings, run, trust=trust)
        training.refuse_unreachable(plan, dense)
        trained = training.dense(dense)
        measured = [training.candidate(candidate, trained.module) for candidate in plan]
        with run.task("measure"):
            files = {c.candidate.folder: c.folder / ONNX_FILE for c in measured}
            timing = TimingSettings(threads=settings.threads, min_seconds=_MEASURED_SECONDS, seed=settings.seed)
            comparison = compare(files, settings=timing)
        result = Tradeoff(
            source=info(dense).source or type(source).__name__,
            data=DataSummary.of(data),
            settings=settings,
            points=tuple(_point(one, comparison) for one in measured),
            history=trained.history,
            reused=tuple(training.reused),
            environment=next(iter(comparison.results.values())).environment,
            seconds=time.perf_counter() - started,
            command=command or _call(source, dataset, plan, directory),
            check=comparison.check,
        )
        with staged_folder(directory, marker=MARKER, force=force) as staging:
            if trained.folder is not None:
                link_folder(trained.folder, staging / "dense")
            for one in measured:
                for name, made in one.folders.items():
                    link_folder(made, staging / name)
            write_report(result, staging)
    return result


def _task_weights(
    dense: nn.Module, plan: Sequence[Candidate | Budget], data: Data, settings: TradeoffSettings, *, trust: bool
) -> dict[str, float]:
    """Guess the seconds of each task; only their proportions matter.

    Every candidate is made once, so that an impossible one is refused before the training; of the first channels, for
    others have the same cost.
    """
    lesson = Lesson(settings)
    macs_per_second, export, measurement, search = 3e10, 10.0, 5.0, 120.0
    common: dict[str, Any] = {"round_to": settings.round_to}
    epoch_of_one_mac = 3 * data.counts[0] / macs_per_second  # a forward pass, and a backward pass of twice its cost
    whole = cost(dense).macs
    timed = any(isinstance(candidate, Budget) and candidate.what == "latency" for candidate in plan)
    weights = {CHECK: export * timed, "train dense": settings.epochs * whole * epoch_of_one_mac}
    for candidate in plan:
        module = dense
        if isinstance(candidate, Budget):
            weights[f"{candidate.folder}: search"] = search if candidate.what == "latency" else export
        else:
            module = candidate.apply(dense, **common, seed=settings.seed)
        lesson.refuse(candidate, module, dense)
        macs = whole if settings.teach == "evolve" else cost(module).macs
        control = control_settings(settings)
        if control is not None:
            from_scratch(module, seed=control.seed, trust=trust)  # refuses weights that nothing initialises
        for also in (also_seed(settings, seed) for seed in settings.every_seed):
            weights[f"{candidate.folder}: fine-tune{also}"] = lesson.passes * macs * epoch_of_one_mac
            weights[f"{candidate.folder}: export and score{also}"] = export
            if control is not None:
                scratch = control.epochs * cost(module).macs * epoch_of_one_mac
                weights[f"{candidate.folder}: from scratch{also}"] = scratch
    return {**weights, "measure": measurement * len(plan)}


def _point(measured: Measured, comparison: Comparison) -> Point:
    candidate, (first, *others) = measured.candidate, measured.trials
    ratio = comparison.ratios.get(candidate.folder)
    return Point(
        name=candidate.name,
        rate=candidate.uniform_rate,
        folder=candidate.folder,
        params=measured.cost.params,
        macs=measured.cost.macs,
        score=first.score,
        latency=comparison.results[candidate.folder],
        speedup=ratio and ratio.inverse,
        training=first.model.training,
        budget=measured.budget,
        control=first.control_score,
        control_history=first.control_history,
        repeats=tuple(
            Repeat(
                one.seed,
                one.score,
                one.model.training,
                one.control_score,
                one.control_history,
            )
            for one in others
        ),
    )


def _call(source: str | nn.Module, dataset: object, plan: Sequence[Candidate | Budget], directory: Path) -> str:
    what, data = (repr(one) if isinstance(one, str) else type(one).__name__ for one in (source, dataset))
    names = tuple(candidate.name for candidate in plan)
    return f"surgery.tradeoff({what}, dataset={data}, candidates={names}, directory={str(directory)!r}, …)"
