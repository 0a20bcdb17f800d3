"""From a trained model, data and a budget to a student, in one go or in several steps."""

from __future__ import annotations

import copy
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from surgery.counting.cost import cost
from surgery.deploy.budget.budget import read_budget, refuse_unreachable
from surgery.deploy.budget.clock import Clock, Timer
from surgery.deploy.classifiers import classifier
from surgery.deploy.compress.recovery import hold_out
from surgery.deploy.compress.report import write_compressed
from surgery.deploy.compress.result import Compressed
from surgery.deploy.compress.steps import Steps
from surgery.deploy.curve.points import DataSummary
from surgery.deploy.curve.run_progress import RunProgress
from surgery.deploy.curve.store import Store
from surgery.deploy.measure.benchmark import Comparison, compare
from surgery.deploy.measure.environment import environment
from surgery.deploy.onnx.export import export_onnx
from surgery.errors import UsageError
from surgery.models.saving import save
from surgery.progress import Progress
from surgery.settings import CompressSettings, TimingSettings, accepts
from surgery.storage.folders import refuse_folder, staged_folder, unfinished_folder
from surgery.training.data.adapt import AnyData, as_data
from surgery.training.evaluation import evaluate
from surgery.training.history_file import HISTORY
from surgery.training.modes import plain_modes
from surgery.training.optimizers import check_data, check_scored
from surgery.training.tracking import follow

MARKER = "results.json"
"""The file that marks a folder as a result of `compress`."""

STUDENT = "student"
"""The folder of the student in it."""

FILES = ("dense.onnx", "student.onnx")
"""The ONNX files of both models in it."""

_MEASURED_SECONDS = 2.0
"""Least time to time each file."""


@accepts(CompressSettings)
@plain_modes()
def compress(
    model: nn.Module,
    data: AnyData,
    settings: CompressSettings = CompressSettings(),
    *,
    macs: float | str | None = None,
    params: float | str | None = None,
    bytes: float | str | None = None,
    latency: float | str | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    command: str | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Make a student that keeps to a budget out of a trained model.

    Each of ``steps`` steps chooses widths and carves (`surgery.slim_to_budget`), fits what reads removed channels to
    what the model before gave (``calibration=`` there), and recovers by distillation from the dense model
    (`surgery.distill`): labels, softened outputs and, with ``hint_weight``, the values of its stages. Budgets shrink
    geometrically from step to step. The learning rate follows from the damage that is left
    (`surgery.deploy.compress.recovery.recovery_rate`).

    A part of the training images is held out and decides: the rate, when a recovery ends, and which epoch is kept
    (`surgery.EarlyStopping`). The test images are scored once, at the end.

    Args:
        model: a trained classifier, traced or not. It is not changed. It trains on its device.
        data: images (N, C, H, W) and labels, as of `surgery.load_data`, or what `surgery.as_data` takes, with images to
            test on.
        settings: see `surgery.CompressSettings`; its fields may be given as keywords.
        macs, params, bytes, latency: the budget, one of them, as of `surgery.slim_to_budget`: a count, a share of the
            model's own (at most 1), a latency in ms, or text: ``"300M"``, ``"40%"``, ``"5ms"``.
        out: a folder to write: ``student/`` (`surgery.load`), ``results.json``, ``history.csv`` and ``report.md``; with
            ``onnx``, both models as ``.onnx``. It is written whole, at the end, or not at all. An interrupted run
            resumes when it is started again, to the same weights on a CPU: what is finished is taken over, and an
            unfinished recovery goes on after its last epoch.
        force: replace ``out`` if it is the result of an earlier run.
        command: the command in the report; by default this call.
        timer: from modules by name to ms by name; replaces the measurement of latencies.
        progress: called with ``"all"`` for the whole run, in per mille, and with the name of each task.

    Returns:
        The student as ``.module``, with the figures of each step. Its recipe has each step's carving and compensation.

    Raises:
        UsageError: no budget or several, a setting out of range, data without images to test on, or that do not fit the
            model; nothing is written then.
        EditError: a budget that no model can keep to.
        FloatingPointError: a loss stops being a number.

    Example:
        >>> found = surgery.compress(model, data, macs=0.5, steps=2, epochs=10, out="runs/half")
        >>> found.score.accuracy, surgery.cost(found.module).macs
    """
    started = time.perf_counter()
    budgets = {"macs": macs, "params": params, "bytes": bytes, "latency": latency}
    given = {what: amount for what, amount in budgets.items() if amount is not None}
    if len(given) != 1:
        raise UsageError(f"give one budget, of {', '.join(budgets)}, not {len(given)}")
    data = as_data(data)
    check_data(data)
    check_scored(data, None)
    if out is not None:
        refuse_folder(out, marker=MARKER, force=force)
    elif settings.onnx:
        raise UsageError("onnx is for files: pass a folder to write, out=")
    dense = classifier(model, data)
    split = hold_out(data, settings)
    kind, amount = read_budget(latency_ms=latency, macs=macs, params=params, bytes=bytes)
    timed_share = kind == "latency_ms" and amount.share
    if not timed_share:
        limit = amount.of(float(getattr(cost(dense), kind))) if amount.share else amount.number
        _refuse_unreachable(dense, kind, limit, settings, timer)
    with ExitStack() as stack:
        folder = None
        if out is not None:
            folder = stack.enter_context(unfinished_folder(out, {"command": "compress"}, force=force))
        told = stack.enter_context(follow(settings, progress, history=folder and folder / HISTORY))
        run = RunProgress(_weights(settings), told)
        store = None if folder is None else Store(folder)
        steps = Steps(dense, split, settings, kind, store=store, progress=run, timer=timer)
        if timed_share:
            limit = amount.of(steps.before())
            _refuse_unreachable(dense, kind, limit, settings, timer)
        limits = steps.limits(limit)
        student, entries = dense, []
        for number, part in enumerate(limits, 1):
            student, entry = steps.take(number, student, part)
            entries.append(entry)
        with run.task("score"):
            dense_score, score = (evaluate(one, data.test, **settings.scoring) for one in (dense, student))
        timing = None
        if settings.onnx and folder is not None:
            with run.task("export and time"):
                timing = _time(dense, student, folder, settings)
        result = Compressed(
            module=student,
            dense=dense,
            kind=kind,
            limit=limit,
            measured=entries[-1].measured,
            steps=tuple(entries),
            validation=steps.score,
            dense_score=dense_score,
            score=score,
            dense_cost=cost(dense),
            cost=cost(student),
            data=DataSummary.of(data),
            settings=settings,
            environment=environment(),
            seconds=time.perf_counter() - started,
            command=command or f"surgery.compress({type(model).__name__}, {data.source!r}, {kind}={limit:g}, …)",
            timing=timing,
        )
        if out is not None and folder is not None:
            with staged_folder(out, marker=MARKER, force=force) as staging:
                save(student, staging / STUDENT)
                for name in FILES if timing is not None else ():
                    shutil.copy2(folder / name, staging / name)
                write_compressed(result, staging, MARKER)
    return result


def _refuse_unreachable(
    dense: nn.Module, kind: str, limit: float, settings: CompressSettings, timer: Timer | None
) -> None:
    """Before several steps; a search for one step refuses by itself what is out of reach."""
    if settings.steps > 1:
        clock = Clock(settings.budget().timing(), timer)
        refuse_unreachable(dense, [(kind, limit)], least=settings.least, round_to=settings.round_to or 1, clock=clock)


def _weights(settings: CompressSettings) -> dict[str, float]:
    """Guess the share of the time that each task takes; only their proportions matter."""
    weights: dict[str, float] = {}
    for number in range(1, settings.steps + 1):
        weights |= {f"step {number}: carve": 3.0, f"step {number}: recover": 3.0 * settings.epochs_of(number)}
    return {**weights, "score": 1.0, "export and time": 3.0 * settings.onnx}


def _time(dense: nn.Module, student: nn.Module, folder: Path, settings: CompressSettings) -> Comparison:
    """Export both models into the folder, and time the files in turns."""
    for name, module in zip(FILES, (dense, student), strict=True):
        export_onnx(copy.deepcopy(module).cpu(), folder / name, force=True)
    files = {name.removesuffix(".onnx"): folder / name for name in FILES}
    timing = TimingSettings(threads=settings.threads, min_seconds=_MEASURED_SECONDS, memory=False, seed=settings.seed)
    return compare(files, settings=timing)
