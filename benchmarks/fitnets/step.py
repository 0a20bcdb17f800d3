"""Part `step` of `fitnets.py`: how long a step of stage 1 takes, three ways."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

import surgery
from surgery import models as catalogue
from surgery.deploy.measure.benchmark import ratio_of_medians
from surgery.taps.hints import HintPair, hint_loss

T = TypeVar("T", bound=nn.Module)

WAYS = ("hooks", "truncated", "cached")
"""The whole networks with hooks; the truncated pair; its student alone, with the teacher's outputs at hand."""

TOLERANCE = 1e-4
"""How far the losses of one step may lie apart, relatively: in float32 the steps differ in their rounding alone."""


@dataclass(frozen=True)
class StepSettings:
    """Which pair, on which inputs, how often."""

    student: str
    teacher: str
    guided: str
    hint: str
    batch_size: int
    image_size: int
    device: str
    rounds: int
    warmup: int
    channels_last: bool = False
    seed: int = 0


def measure(settings: StepSettings) -> dict[str, Any]:
    """Times of a step in ms, by round and way, the ratios of their medians, and what each way computes on paper.

    A step is forward, hint loss, backward, and AdamW on the guided prefix and the regressor. All three begin with the
    same weights and see the same batch, so they have the same loss at every step: where they do not, it is an error.
    """
    torch.manual_seed(settings.seed)
    teacher, student = (_built(name, settings.seed) for name in (settings.teacher, settings.student))
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)
    pair = surgery.attach_hint(
        surgery.trace(student, images), surgery.trace(teacher, images), settings.guided, settings.hint
    )
    macs = _macs(pair, teacher, student, images)
    memory = torch.channels_last if settings.channels_last else torch.contiguous_format
    pair, teacher, student = (_placed(module, settings.device, memory) for module in (pair.train(), teacher, student))
    images = images.to(settings.device, memory_format=memory)
    steps = {
        "hooks": hooked(student, teacher, settings.guided, settings.hint, copy.deepcopy(pair.regressor), images),
        "truncated": truncated(copy.deepcopy(pair), images),
        "cached": cached(copy.deepcopy(pair), images),
    }
    rng = np.random.default_rng(settings.seed)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {way: [] for way in WAYS}
    with _resting_collector():
        for number in range(settings.warmup + settings.rounds):
            for index in rng.permutation(len(WAYS)):
                way = WAYS[index]
                elapsed, loss = _timed(steps[way], settings.device)
                losses[way].append(loss)
                if number >= settings.warmup:
                    times[way].append(elapsed)
            check_equal({way: losses[way][-1] for way in WAYS})
    arrays = {way: np.array(samples) for way, samples in times.items()}
    ratios = {way: ratio_of_medians(arrays["hooks"], arrays[way], 0.95, rng) for way in WAYS[1:]}
    return {
        "threads": torch.get_num_threads(),
        "macs": macs,
        "samples_ms": times,
        "median_ms": {way: float(np.median(samples)) for way, samples in arrays.items()},
        "speedups": {
            way: {"value": r.value, "low": r.low, "high": r.high, "confidence": r.confidence}
            for way, r in ratios.items()
        },
        "losses": losses,
    }


def hooked(
    student: nn.Module, teacher: nn.Module, guided: str, hint: str, regressor: nn.Module, images: Tensor
) -> Callable[[], Tensor]:
    """A step as toolkits without graphs do it: both networks run as a whole, hooks keep what the two layers give."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen[name] = output

        return hook

    teacher.requires_grad_(False).eval().get_submodule(hint).register_forward_hook(keep("hint"))
    student.train().get_submodule(guided).register_forward_hook(keep("guided"))

    def loss() -> Tensor:
        with torch.no_grad():
            teacher(images)
        student(images)
        return hint_loss(regressor(seen["guided"]), seen["hint"])

    return _step(loss, nn.ModuleList([student, regressor.train()]))


def truncated(pair: HintPair, images: Tensor) -> Callable[[], Tensor]:
    return _step(lambda: pair.loss(images), pair.student)


def cached(pair: HintPair, images: Tensor) -> Callable[[], Tensor]:
    hints = pair.teacher(images)
    return _step(lambda: hint_loss(pair.student(images), hints), pair.student)


def check_equal(losses: dict[str, float]) -> None:
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= TOLERANCE * high:
        raise AssertionError(f"the ways to take a step do not compute the same loss: {losses}")


def _step(loss_fn: Callable[[], Tensor], trained: nn.Module) -> Callable[[], Tensor]:
    descent = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def step() -> Tensor:
        loss = loss_fn()
        descent.zero_grad(set_to_none=True)
        loss.backward()
        descent.step()
        return loss.detach()

    return step


def _placed(module: T, device: str, memory: torch.memory_format) -> T:
    return cast(Any, module).to(device, memory_format=memory)


def _built(name: str, seed: int) -> nn.Module:
    return catalogue.build(catalogue.canonical(name), seed=seed)


def _macs(pair: HintPair, teacher: nn.Module, student: nn.Module, images: Tensor) -> dict[str, int]:
    """Of one image's forward passes: whole networks and their prefixes (the student's with its regressor)."""
    modules = {"teacher": teacher, "student": student, "teacher_prefix": pair.teacher, "student_prefix": pair.student}
    return {name: surgery.cost(module, images).macs for name, module in modules.items()}


def _timed(step: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of a step, and its loss."""
    _wait(device)
    started = time.perf_counter_ns()
    loss = step()
    _wait(device)
    return (time.perf_counter_ns() - started) / 1e6, loss.item()


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def _resting_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
