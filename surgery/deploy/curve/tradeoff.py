"""The main job: from a model and a data set to a measured speed/accuracy curve."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery import models as catalogue
from surgery.counting.cost import cost
from surgery.deploy.classifiers import classifier, data_for
from surgery.deploy.curve.candidates import Budget, Candidate, chosen
from surgery.deploy.curve.points import DataSummary, Point, Settings, Tradeoff
from surgery.deploy.curve.report import write_report
from surgery.deploy.curve.store import Store, linked
from surgery.deploy.curve.teaching import Lesson
from surgery.deploy.curve.workbench import CHECK, ONNX_FILE, Measured, Stages, Workbench
from surgery.deploy.measure.benchmark import Comparison, compare
from surgery.deploy.measure.environment import usable_cores
from surgery.errors import UsageError, unknown_name, whole_number
from surgery.folders import refuse_folder, staged_folder, unfinished_folder
from surgery.graph.traced import info
from surgery.operations.masks import IMPORTANCE
from surgery.operations.slim import Rate
from surgery.progress import Progress
from surgery.training.data.data import Data

MARKER = "tradeoff.json"
"""The file by which a folder is known as a result of `tradeoff`."""

_MEASURED_SECONDS = 2.0
"""Spent on timing each model, at the least."""


def tradeoff(
    source: str | nn.Module,
    *,
    dataset: str,
    split_rates: Sequence[Rate] = (1.0, 0.75, 0.5, 0.25),
    out: str | os.PathLike[str],
    candidates: Sequence[str] = (),
    round_to: int = 1,
    epochs: int = 5,
    finetune_epochs: int = 3,
    importance: str = "prefix",
    teach: str = "labels",
    hint_epochs: int = 1,
    generations: int = 3,
    lr: float = 0.02,
    batch_size: int = 64,
    image_size: int | None = None,
    weights: str | None = None,
    data_root: str | Path | None = None,
    limit: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    reuse: Sequence[str | os.PathLike[str]] = (),
    trust: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Tradeoff:
    """Train a model, make smaller or larger ones of it, train these on, export and measure each, and write it all up.

    Every candidate is treated alike: carved from the trained dense model (at 1.0 nothing is cut off), trained
    ``finetune_epochs`` more, saved, and exported to ONNX. What is then scored on the test images, and timed, is the
    ONNX file. Candidates are timed in one run, taking turns, one image at a time.

    A run that was cut off goes on where it was when it is started again, and nothing is trained twice: what an earlier
    run made with the same settings, in ``out`` or in ``reuse``, is taken over, and only timed anew.

    Args:
        source: what `surgery.models.build` takes, or a module, such as a loaded one; it is not modified. Its
            classifier must have as many outputs as the data has classes; a torchvision model is built so.
        dataset: what `surgery.training.data.data.load_data` takes; so are ``data_root`` and ``limit``.
        split_rates: each in (0, 1], or one for each of some layers, containers or globs (``{"layer4": 0.5}``).
        out: the folder to write: ``tradeoff.png``, ``.html``, ``.csv``, ``.json``, ``report.md``, and a folder for each
            candidate and for the dense model. It appears whole, at the end, or not at all.
        candidates: further ones, as `surgery.deploy.curve.candidates.parse` reads them: ``"widen=1.5"``; or budgets, to
            which `surgery.slim_to_budget` slims the trained dense model: ``"latency=5ms"``, ``"macs=300M"``.
        round_to: widths are rounded up to multiples of it; for budgets of latency, 1 is whatever is fastest.
        importance: which channels are kept, as in `surgery.slim`.
        epochs: passes over the training images for the dense model; 0 takes it as it is.
        finetune_epochs: the same for each candidate.
        teach: what candidates learn from, one of `surgery.deploy.curve.teaching.TEACHERS`: ``labels``, ``kd`` or
            ``hints`` (`surgery.distill`, the dense model being the teacher), or ``evolve`` (`surgery.evolve` of it).
        hint_epochs: for ``hints``, passes over the training images before the others.
        generations: for ``evolve``, of ``finetune_epochs`` each.
        lr: peak learning rate of both.
        image_size: side in pixels; by default the data's own, or the least the model takes where that is more.
        threads: of ONNX Runtime; by default, all the cores this process may use.
        reuse: folders of other runs, of which trained models are taken over.
        force: replace ``out`` where it is the result of an earlier run.
        command: what the report says it was made by; by default this call.
        progress: called with ``"all"`` for the whole run, in per mille, and with the name of each stage for itself.

    Raises:
        UsageError: anything that was asked for cannot be; nothing is written then.
        EditError: the same for a model that cannot be made so, or be slimmed to a budget; only a latency of up to 1.5
            times the budget may come out later, with what was trained kept for a run with another budget.
    """
    started = time.perf_counter()
    out = Path(out)
    refuse_folder(out, marker=MARKER, force=force)
    for folder in reuse:
        if not (Path(folder) / MARKER).is_file():
            raise UsageError(f"{folder} has no trained models to reuse: it holds no {MARKER}")
    _at_least(0, epochs=epochs, finetune_epochs=finetune_epochs, seed=seed)
    _at_least(1, image_size=image_size, limit=limit, threads=threads, hint_epochs=hint_epochs, generations=generations)
    if importance not in IMPORTANCE:
        raise unknown_name("importance", importance, IMPORTANCE)
    plan = _planned(split_rates, candidates)
    settings = Settings(
        candidates=tuple(candidate.name for candidate in plan),
        round_to=whole_number("round_to", round_to, 1),
        importance=importance,
        epochs=epochs,
        teach=teach,
        finetune_epochs=finetune_epochs,
        hint_epochs=hint_epochs,
        generations=generations,
        lr=lr,
        batch_size=batch_size,
        weights=catalogue.parse(source, weights=weights).weights if isinstance(source, str) else "as given",
        limit=limit,
        threads=threads or usable_cores(),
        seed=seed,
    )
    lesson = Lesson(teach, finetune_epochs, lr, batch_size, seed, hint_epochs, generations)
    data = data_for({"the model": source}, dataset, data_root=data_root, image_size=image_size, limit=limit)
    dense = classifier(source, data, weights=weights, trust=trust, seed=seed)
    stages = Stages(_stage_weights(dense, plan, lesson, data, settings), progress)
    with unfinished_folder(out, {"command": "tradeoff"}) as folder:
        bench = Workbench(Store(folder, [*([out] if out.is_dir() else []), *reuse]), data, settings, lesson, stages)
        bench.refuse_unreachable(plan, dense)
        trained = bench.dense(dense)
        measured = [bench.candidate(candidate, trained.module) for candidate in plan]
        with stages.stage("measure"):
            files = {c.candidate.folder: c.folder / ONNX_FILE for c in measured}
            comparison = compare(files, threads=settings.threads, min_seconds=_MEASURED_SECONDS, seed=seed)
        result = Tradeoff(
            source=info(dense).source or type(source).__name__,
            data=DataSummary.of(data),
            settings=settings,
            points=tuple(_point(one, comparison) for one in measured),
            history=trained.history,
            reused=tuple(bench.reused),
            environment=next(iter(comparison.results.values())).environment,
            seconds=time.perf_counter() - started,
            command=command or _call(source, dataset, settings, out),
            check=comparison.check,
        )
        with staged_folder(out, marker=MARKER, force=force) as staging:
            if trained.folder is not None:
                linked(trained.folder, staging / "dense")
            for one in measured:
                linked(one.folder, staging / one.candidate.folder)
            write_report(result, staging)
    return result


def _planned(split_rates: Sequence[Rate], candidates: Sequence[str]) -> tuple[Candidate | Budget, ...]:
    plan = chosen(split_rates, candidates)
    if not plan:
        raise UsageError("no split rates were given: pass at least one in (0, 1]")
    folders = [candidate.folder for candidate in plan]
    for candidate in plan:
        if folders.count(candidate.folder) > 1:
            raise UsageError(f"two candidates would be written to {candidate.folder!r}: leave out {candidate.name!r}")
    return plan


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}: it must be at least {least}")


def _stage_weights(
    dense: nn.Module, plan: Sequence[Candidate | Budget], lesson: Lesson, data: Data, settings: Settings
) -> dict[str, float]:
    """A guess, in seconds, at how long each stage takes: only their proportions matter.

    It makes every candidate once, so that one that cannot be is refused before the training and not after it.
    """
    macs_per_second, export, measurement, search = 3e10, 10.0, 5.0, 120.0
    common: dict[str, Any] = {"round_to": settings.round_to, "importance": settings.importance}
    epoch_of_one_mac = 3 * data.counts[0] / macs_per_second  # a forward pass, and a backward pass of twice its cost
    whole = cost(dense).macs
    timed = any(isinstance(candidate, Budget) and candidate.what == "latency" for candidate in plan)
    weights = {CHECK: export * timed, "train dense": settings.epochs * whole * epoch_of_one_mac}
    for candidate in plan:
        module = dense
        if isinstance(candidate, Budget):
            weights[f"{candidate.folder}: search"] = search if candidate.what == "latency" else export
        else:
            module = candidate.made(dense, **common, seed=settings.seed)
        lesson.refuse(candidate, module, dense, **common)
        macs = whole if lesson.teach == "evolve" else cost(module).macs
        weights[f"{candidate.folder}: fine-tune"] = lesson.passes * macs * epoch_of_one_mac
        weights[f"{candidate.folder}: export and score"] = export
    return {**weights, "measure": measurement * len(plan)}


def _point(measured: Measured, comparison: Comparison) -> Point:
    candidate = measured.candidate
    ratio = comparison.ratios.get(candidate.folder)
    return Point(
        name=candidate.name,
        rate=candidate.uniform_rate,
        folder=candidate.folder,
        params=measured.cost.params,
        macs=measured.cost.macs,
        score=measured.score,
        latency=comparison.results[candidate.folder],
        speedup=ratio and ratio.inverse,
        training=measured.training,
        budget=measured.budget,
    )


def _call(source: str | nn.Module, dataset: str, settings: Settings, out: Path) -> str:
    what = repr(source) if isinstance(source, str) else type(source).__name__
    return f"surgery.tradeoff({what}, dataset={dataset!r}, candidates={settings.candidates}, out={str(out)!r}, …)"
