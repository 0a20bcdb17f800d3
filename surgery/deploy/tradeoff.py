"""The main job: from a model and a data set to a measured speed/accuracy curve."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from surgery import catalogue
from surgery.deploy.benchmark import Comparison, Ratio, compare
from surgery.deploy.checkpoint import save
from surgery.deploy.classifiers import classifier, data_for
from surgery.deploy.cost import Cost, cost
from surgery.deploy.curve import DataSummary, Point, Settings, Tradeoff
from surgery.deploy.environment import usable_cores
from surgery.deploy.export import export_onnx
from surgery.deploy.outputs import refuse_folder, staged_folder
from surgery.deploy.report import write_report
from surgery.errors import UsageError
from surgery.graph.traced import info
from surgery.passes.slim import slim
from surgery.training.data import Data
from surgery.training.evaluation import Progress, evaluate
from surgery.training.history import History, Score
from surgery.training.loop import train

ONNX_FILE = "model.onnx"
MARKER = "tradeoff.json"
"""The file by which a folder is known as a result of `tradeoff`."""

_MEASURED_SECONDS = 2.0
"""Spent on timing each model, at the least."""


def tradeoff(
    source: str | nn.Module,
    *,
    dataset: str,
    split_rates: Sequence[float],
    out: str | os.PathLike[str],
    epochs: int = 5,
    finetune_epochs: int = 3,
    lr: float = 0.02,
    batch_size: int = 64,
    image_size: int | None = None,
    weights: str | None = None,
    data_root: str | Path | None = None,
    limit: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    trust: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Tradeoff:
    """Train a model, carve and fine-tune a slim one at each split rate, export and measure each, and write it all up.

    Every rate is treated alike: carved from the trained dense model (at 1.0 nothing is cut off), trained
    ``finetune_epochs`` more, saved, and exported to ONNX. What is then scored on the test images, and timed, is the
    ONNX file. Candidates are timed in one run, taking turns, one image at a time.

    Args:
        source: what `surgery.catalogue.build` takes, or a module, such as a loaded one; it is not modified. Its
            classifier must have as many outputs as the data has classes; a torchvision model is built so.
        dataset: what `surgery.training.data.load_data` takes; so are ``data_root`` and ``limit``.
        split_rates: each in (0, 1].
        out: the folder to write: ``tradeoff.png``, ``.csv``, ``.json``, ``report.md``, and a folder for each rate.
            It appears whole, at the end, or not at all.
        epochs: passes over the training images for the dense model; 0 takes it as it is.
        finetune_epochs: the same for each carved model.
        lr: peak learning rate of both.
        image_size: side in pixels; by default the data's own, or the least the model takes where that is more.
        threads: of ONNX Runtime; by default, all the cores this process may use.
        force: replace ``out`` where it is the result of an earlier run.
        command: what the report says it was made by; by default this call.
        progress: called with ``"all"`` for the whole run, in per mille, and with the name of each stage for itself.

    Raises:
        UsageError: anything that was asked for cannot be; nothing is written then.
    """
    started = time.perf_counter()
    out = Path(out)
    refuse_folder(out, marker=MARKER, force=force)
    _at_least(0, epochs=epochs, finetune_epochs=finetune_epochs)
    _at_least(1, image_size=image_size, limit=limit, threads=threads)
    settings = Settings(
        split_rates=_checked_rates(split_rates),
        epochs=epochs,
        finetune_epochs=finetune_epochs,
        lr=lr,
        batch_size=batch_size,
        weights=catalogue.parse(source, weights=weights).weights if isinstance(source, str) else "as given",
        limit=limit,
        threads=threads or usable_cores(),
        seed=seed,
    )
    data = data_for({"the model": source}, dataset, data_root=data_root, image_size=image_size, limit=limit)
    dense = classifier(source, data, weights=weights, trust=trust, seed=seed)
    stages = _Stages(_stage_weights(dense, data, settings), progress)
    with staged_folder(out, marker=MARKER, force=force) as folder:
        history = _fit(dense, data, settings, epochs, stages, "train dense")
        candidates = [_candidate(dense, rate, data, settings, stages, folder) for rate in settings.split_rates]
        with stages.stage("measure"):
            files = {c.folder: folder / c.folder / ONNX_FILE for c in candidates}
            comparison = compare(files, threads=settings.threads, min_seconds=_MEASURED_SECONDS, seed=seed)
        result = Tradeoff(
            source=info(dense).source or type(source).__name__,
            data=DataSummary.of(data),
            settings=settings,
            points=tuple(_point(candidate, comparison) for candidate in candidates),
            history=history,
            environment=next(iter(comparison.results.values())).environment,
            seconds=time.perf_counter() - started,
            command=command or _call(source, dataset, settings, out),
        )
        write_report(result, folder)
    return result


def _checked_rates(rates: Sequence[float]) -> tuple[float, ...]:
    if not rates:
        raise UsageError("no split rates were given: pass at least one in (0, 1]")
    for rate in rates:
        if not 0 < rate <= 1:
            raise UsageError(f"split rate {rate:g} is outside (0, 1]")
        if rates.count(rate) > 1:
            raise UsageError(f"split rate {rate:g} is given more than once")
    return tuple(sorted(rates, reverse=True))


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}: it must be at least {least}")


class _Stages:
    """Tells how far the run is as a whole, from how far its stages are and how long each is likely to take."""

    def __init__(self, weights: Mapping[str, float], progress: Progress | None) -> None:
        self._weights = weights
        self._total = sum(weights.values())
        self._finished = 0.0
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """A stage, from its begin to its end; what it yields can be told of its steps."""
        self(name, 0, 1)
        yield self
        self(name, 1, 1)
        self._finished += self._weights[name]

    def __call__(self, task: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(task, done, total)
            whole = self._finished + self._weights[task] * done / total
            self._progress("all", round(1000 * whole / self._total), 1000)


def _stage_weights(dense: nn.Module, data: Data, settings: Settings) -> dict[str, float]:
    """A guess, in seconds, at how long each stage takes: only their proportions matter.

    It carves every rate once, so that one that cannot be carved is refused before the training and not after it.
    """
    macs_per_second, export, measurement = 3e10, 10.0, 5.0
    epoch_of_one_mac = 3 * data.counts[0] / macs_per_second  # a forward pass, and a backward pass of twice its cost
    weights = {"train dense": settings.epochs * cost(dense).macs * epoch_of_one_mac}
    for rate in settings.split_rates:
        macs = cost(slim(dense, rate)).macs
        weights[f"{_name(rate)}: fine-tune"] = settings.finetune_epochs * macs * epoch_of_one_mac
        weights[f"{_name(rate)}: export and score"] = export
    return {**weights, "measure": measurement * len(settings.split_rates)}


def _name(rate: float) -> str:
    return f"rate-{rate:g}"


def _fit(module: nn.Module, data: Data, settings: Settings, epochs: int, stages: _Stages, stage: str) -> History | None:
    with stages.stage(stage) as progress:
        if epochs == 0:
            return None
        return train(
            module,
            data,
            epochs=epochs,
            lr=settings.lr,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=progress,
            task=stage,
        )


@dataclass(frozen=True)
class _Candidate:
    """A model of the curve, trained, saved, exported and scored, but not yet timed."""

    rate: float
    folder: str
    cost: Cost
    score: Score
    history: History | None


def _candidate(
    dense: nn.Module, rate: float, data: Data, settings: Settings, stages: _Stages, folder: Path
) -> _Candidate:
    name = _name(rate)
    module = slim(dense, rate)
    history = _fit(module, data, settings, settings.finetune_epochs, stages, f"{name}: fine-tune")
    with stages.stage(f"{name}: export and score"):
        save(module, folder / name)
        export_onnx(module, folder / name / ONNX_FILE)
        score = evaluate(_onnx_classifier(folder / name / ONNX_FILE, settings.threads), data.test)
    return _Candidate(rate, name, cost(module), score, history)


def _onnx_classifier(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The ONNX file as a function from images to logits, run by ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def classify(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return classify


def _point(candidate: _Candidate, comparison: Comparison) -> Point:
    ratio = comparison.ratios.get(candidate.folder)
    return Point(
        rate=candidate.rate,
        folder=candidate.folder,
        params=candidate.cost.params,
        macs=candidate.cost.macs,
        score=candidate.score,
        latency=comparison.results[candidate.folder],
        speedup=ratio and Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, ratio.confidence),
        history=candidate.history,
    )


def _call(source: str | nn.Module, dataset: str, settings: Settings, out: Path) -> str:
    what = repr(source) if isinstance(source, str) else type(source).__name__
    return f"surgery.tradeoff({what}, dataset={dataset!r}, split_rates={settings.split_rates}, out={str(out)!r}, …)"
