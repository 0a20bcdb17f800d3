"""The parts of gpu.py: each is a function that returns what it found as JSON data, and raises where it is wrong."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import surgery
from benchmarks.coverage.model import randomised
from surgery import models as catalogue
from surgery.graph.batches import each_tensor
from surgery.models.detectors import image_batch, is_detector, make_regions, raw_outputs
from surgery.settings import RUNTIMES
from surgery.training.data.data import Data, Normalisation

RATES = (1.0, 0.75, 0.5, 0.25)
BATCHES = (1, 32)
PRECISIONS = ("no", "fp16", "bf16")
MEASURED = "resnet50"
"""The model whose latency is measured; with ``--small``, `SMALL_MEASURED`."""
SMALL_MEASURED = "squeezenet1_1"
PROCESSES = 2
EXACT = 1e-10
"""Bound on relative errors in float64."""

_LIMITS = {"surgery": 45.0, "latency": 90.0, "memory": 90.0, "training": 60.0, "processes": 120.0}
"""Seconds that a part may take, by its kind."""
_SMALL_MODELS = ("squeezenet1_1", "mobilenet_v3_small", "fasterrcnn_mobilenet_v3_large_320_fpn")


def part_names(small: bool) -> list[str]:
    """The names of all parts, in the order in which they run."""
    first = {entry.family: name for name, entry in reversed(catalogue.CATALOGUE.items())}
    runtimes = sorted(RUNTIMES, key=lambda runtime: runtime == "torch-compile")  # compiling takes longest
    families = [name for name in catalogue.CATALOGUE if name in first.values()]
    return [
        *(f"surgery/{name}" for name in (_SMALL_MODELS if small else families)),
        *(f"training/{precision}" for precision in PRECISIONS),
        f"processes/{PROCESSES}",
        *(f"latency/{runtime}/{batch}" for runtime in runtimes for batch in BATCHES),
        *(f"memory/{runtime}" for runtime in ("torch", "onnxruntime")),
    ]


def limit_of(part: str) -> float:
    """Seconds that a part may take."""
    return _LIMITS[part.partition("/")[0]]


def run_part(part: str, device: str, small: bool) -> dict[str, Any]:
    """Run one part in this process.

    Raises:
        WrongError: what was computed is wrong; and whatever else fails in it.
    """
    kind, *rest = part.split("/")
    if kind == "surgery":
        return operate(rest[0], device)
    if kind == "latency":
        return measure_latency(rest[0], int(rest[1]), device, small)
    if kind == "memory":
        return measure_memory(rest[0], device, small)
    if kind == "training":
        return train_and_resume(rest[0], device, small)
    return train_at_once(int(rest[0]), device, small)


class WrongError(Exception):
    """A result that differs from what it should be."""


def operate(name: str, device: str) -> dict[str, Any]:
    """Trace, widen and slim a small model of a family on the device, in float64.

    Returns:
        relative errors: ``traced`` and ``widened`` against the model, ``slimmed`` against the model with the rest
        switched off, and ``moved`` of the result that was made on the device against that made on the CPU; and
        ``seconds`` of each operation.
    """
    source = catalogue.CATALOGUE[name].small_source
    given = catalogue.small_inputs(name)
    here = _place(given if isinstance(given, tuple) else (given,), "cpu")
    there = _place(here, device)
    double = catalogue.CATALOGUE[name].family != "RAFT"  # its coordinates are float32
    model = randomised(catalogue.build(source, seed=0)).eval()
    if double:
        model, here, there = model.double(), _double(here), _double(there)
    moved = copy.deepcopy(model).to(device)
    seconds: dict[str, float] = {}
    traced = _timed(seconds, "trace", lambda: surgery.trace(moved, there, source=source))
    wide = _timed(seconds, "widen", lambda: surgery.widen(traced, 1.5, seed=1))
    slim = _timed(seconds, "slim", lambda: surgery.slim(traced, 0.5))
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    strangers = [key for key, value in slim.state_dict().items() if value.device.type != torch.device(device).type]
    if strangers:
        raise WrongError(f"tensors of the slim model are not on {device}: {', '.join(strangers[:5])}")
    expected = _outputs(moved, there)
    errors = {
        "traced": _difference(_outputs(traced, there), expected),
        "widened": _difference(_outputs(wide, there), expected),
        "slimmed": _difference(_outputs(slim, there), _outputs(masked, there)),
    }
    on_cpu = surgery.slim(surgery.trace(model, here, source=source), 0.5)
    for key, value in slim.state_dict().items():
        if not torch.equal(value.cpu(), on_cpu.state_dict()[key]):
            raise WrongError(f"{key} of the slim model is not what it is on the CPU")
    found: dict[str, Any] = {"errors": errors, "operation_seconds": seconds}
    if not is_detector(moved):
        verified = surgery.verify(wide, traced, there if len(there) > 1 else there[0])
        found["verified"] = verified.max_rel
        if not verified.ok and double:
            raise WrongError(f"verify: {verified}")
    errors["moved"] = _difference([t.cpu() for t in _outputs(slim, there)], _outputs(on_cpu, here))
    bound = EXACT if double else 1e-3
    wrong = {key: error for key, error in errors.items() if not error <= bound}
    if wrong:
        raise WrongError(f"relative errors above {bound:g}: {wrong}")
    return found


def measure_latency(runtime: str, batch: int, device: str, small: bool) -> dict[str, Any]:
    """The latency of a model slimmed to each of `RATES`, measured in turns."""
    compared = surgery.compare(
        _slimmed(small),
        runtime=runtime,
        device=device,
        batch_size=batch,
        sessions=1,
        warmup=0.1 if small else 2.0,
        min_runs=5 if small else 50,
        min_seconds=0.05 if small else 0.5,
        memory=False,
        check=False,
    )
    kept = ("p50_ms", "p99_ms", "iqr_ms", "throughput", "macs", "params", "notes", "warmup_runs")
    results = {rate: result.to_dict() for rate, result in compared.results.items()}
    return {"rates": {rate: {key: result[key] for key in kept} for rate, result in results.items()}}


def measure_memory(runtime: str, device: str, small: bool) -> dict[str, Any]:
    """The peak of memory of a model slimmed to the first and the last of `RATES`, at the largest of `BATCHES`."""
    candidates = _slimmed(small, (RATES[0], RATES[-1]))
    compared = surgery.compare(
        candidates, runtime=runtime, device=device, batch_size=BATCHES[-1], sessions=1, min_runs=1, min_seconds=0.0,
        warmup=0.0, check=False,
    )  # fmt: skip
    found = {
        rate: {"device_bytes": result.device_peak_memory_bytes, "host_bytes": result.peak_memory_bytes}
        for rate, result in compared.results.items()
    }
    unmeasured = [result.notes for result in compared.results.values() if result.peak_memory_bytes is None]
    if unmeasured:
        raise WrongError("; ".join(unmeasured[0]))
    return {"rates": found}


def train_and_resume(precision: str, device: str, small: bool) -> dict[str, Any]:
    """Train in a precision; then again, stopped after some steps and resumed from the checkpoint.

    Returns:
        ``steps_per_second``, ``peak_bytes`` of the device's memory, the ``losses`` of the epochs, and ``resumed``, the
        largest relative difference of the weights of the two trainings.
    """
    data, model = random_images(small), net(device)
    settings = {"epochs": 3, "batch_size": 64, "lr": 0.05, "precision": precision, "test_each_epoch": False}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    whole = surgery.train(model, data, **settings)
    seconds = time.perf_counter() - begun
    stop = whole.steps // 2
    with tempfile.TemporaryDirectory(prefix="surgery-gpu-") as folder:
        file = Path(folder) / "training.checkpoint"
        given = {**settings, "checkpoint": file, "checkpoint_every": 1}
        try:
            surgery.train(model, data, progress=_stopped_after(stop), **given)
        except _StoppedError:
            pass
        else:
            raise WrongError("the training was not stopped")
        resumed = surgery.train(model, data, **given)
    if not all(bool(torch.isfinite(p).all()) for p in whole.module.parameters()):
        raise WrongError("the weights are not finite")
    difference = _difference(list(resumed.module.parameters()), list(whole.module.parameters()))
    if not difference <= (1e-2 if device == "cuda" else 0.0):  # kernels of a GPU may add in any order
        raise WrongError(f"the resumed training differs from the whole one by {difference:g}")
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    losses = [epoch.loss for epoch in whole.epochs]
    return {"steps_per_second": whole.steps / seconds, "peak_bytes": peak, "losses": losses, "resumed": difference}


def train_at_once(processes: int, device: str, small: bool) -> dict[str, Any]:
    """Train the same in several processes on one device at the same time, and once alone.

    Returns:
        ``seconds_alone``, ``seconds_together``, and ``difference``, the largest relative one from the weights alone.
    """

    def start(file: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.gpu.training", str(file), device, str(int(small))]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def finish(running: list[subprocess.Popen[str]]) -> None:
        said = [one.communicate()[1] for one in running]
        for one, text in zip(running, said, strict=True):
            if one.returncode:
                raise WrongError((text.strip().splitlines() or [f"code {one.returncode}"])[-1])

    with tempfile.TemporaryDirectory(prefix="surgery-gpu-") as folder:
        files = [Path(folder) / f"{number}.pt" for number in range(processes + 1)]
        begun = time.perf_counter()
        finish([start(files[0])])
        alone = time.perf_counter() - begun
        begun = time.perf_counter()
        finish([start(file) for file in files[1:]])
        together = time.perf_counter() - begun
        weights = [list(torch.load(file).values()) for file in files]
    difference = max(_difference(other, weights[0]) for other in weights[1:])
    if not difference <= (1e-2 if device == "cuda" else 0.0):
        raise WrongError(f"trainings at the same time differ from one alone by {difference:g}")
    return {"seconds_alone": alone, "seconds_together": together, "difference": difference}


def random_images(small: bool) -> Data:
    """Random images in ten classes, the same at every call."""
    count, size = (256, 4) if small else (1024, 32)
    pictures = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels = pictures.mean((1, 2, 3)).argsort().argsort() * 10 // count  # something that can be learned
    whole = TensorDataset(pictures, labels)
    classes = tuple(str(number) for number in range(10))
    return Data("random", whole, whole, classes, size, Normalisation())


def net(device: str) -> nn.Module:
    """A small network with what makes training random and stateful: dropout, batch statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(0.1),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 10),
        )  # fmt: skip
    return module.to(device)


class _StoppedError(Exception):
    """A training was stopped on purpose."""


def _stopped_after(steps: int) -> Any:
    def progress(task: str, done: int, total: int) -> None:
        if done == steps:
            raise _StoppedError

    return progress


def _slimmed(small: bool, rates: tuple[float, ...] = RATES) -> Mapping[str, nn.Module]:
    name = SMALL_MEASURED if small else MEASURED
    inputs = catalogue.example_inputs(name, 2, 64 if small else None)
    traced = surgery.trace(catalogue.build(name, seed=0).eval(), inputs, source=name)
    return {f"{rate:g}": traced if rate == 1 else surgery.slim(traced, rate) for rate in rates}


def _outputs(module: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """What a module computes in evaluation; the raw outputs of a detection model's heads."""
    with torch.no_grad():
        if not is_detector(module):
            return _tensors(module(*inputs))
        batch = image_batch(module, inputs[0])
        return _tensors(raw_outputs(module, batch, make_regions(batch)))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative difference; infinite where the comparison says nothing."""
    if not expected or [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    if not any(bool((t != t.flatten()[0]).any()) for t in expected if t.numel()):
        return float("inf")
    pairs = [(p, q) for p, q in zip(found, expected, strict=True) if q.numel()]
    errors = [(p - q).abs().max() / q.abs().max().clamp_min(1e-30) for p, q in pairs]
    return float(torch.stack([error.double().cpu() for error in errors]).max())


def _place(inputs: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return each_tensor(lambda tensor: tensor.to(device), inputs, {})[0]


def _double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return each_tensor(lambda tensor: tensor.double(), inputs, {})[0]


def _timed(seconds: dict[str, float], label: str, run: Any) -> Any:
    begun = time.perf_counter()
    result = run()
    seconds[label] = round(time.perf_counter() - begun, 3)
    return result
