"""Parts of a model that are slimmed by themselves: its dimension groups, or its stages; and what slimming each does."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset

from surgery.axes.analysis import dimension_groups
from surgery.axes.groups import DimensionGroup
from surgery.deploy.measure.benchmark import Ratio, compare
from surgery.deploy.measure.environment import usable_cores
from surgery.deploy.measure.jobs import Job, Runner
from surgery.deploy.measure.runners import ready
from surgery.errors import EditError, unknown_name
from surgery.operations.slim import slim
from surgery.progress import Progress
from surgery.training.data.data import Images, count
from surgery.training.data.loading import loader
from surgery.training.evaluation import device_of, in_mode
from surgery.training.history import Score

Timer = Callable[[Mapping[str, nn.Module]], Mapping[str, float]]
"""From modules by name to what one query of each takes, in ms."""

_TOGETHER = 6
"""Models that are timed in one run, so that not all need be in memory at once."""


def parts(module: nn.Module, by: str) -> dict[str, tuple[DimensionGroup, ...]]:
    """The editable groups of a traced module by part, in the order of the forward pass.

    Args:
        by: ``"group"``: each is a part. ``"stage"``: those whose names begin with the same container, of the outermost
            containers of which there are four or more (``layer1`` … ``layer4`` of a ResNet).

    Raises:
        UsageError: another ``by``.
        EditError: no group can be edited.
    """
    if by not in ("group", "stage"):
        raise unknown_name("kind of part", by, ("group", "stage"))
    groups = [group for group in dimension_groups(module) if group.editable]
    if not groups:
        raise EditError("no dimension group of the model can be edited")
    found: dict[str, list[DimensionGroup]] = {}
    cut = _cut([group.name for group in groups]) if by == "stage" else None
    for group in groups:
        found.setdefault(group.name if cut is None else cut(group.name), []).append(group)
    return {name: tuple(members) for name, members in found.items()}


def _cut(names: Sequence[str]) -> Callable[[str], str]:
    """From a layer's name to its stage's: the largest container is opened until there are four or more."""
    inside = ""
    while True:
        depth = inside.count(".")
        below = Counter(n.split(".")[depth] for n in names if n.startswith(inside) and n.count(".") >= depth)
        largest = below.most_common(1)[0][0]
        deeper = f"{inside}{largest}."
        if len(below) >= 4 or not any(n.startswith(deeper) for n in names):
            break
        inside = deeper

    def stage(name: str) -> str:
        pairs = zip(name.split("."), inside.split("."), strict=False)
        known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return ".".join(name.split(".")[: known + 1])

    return stage


@dataclass(frozen=True)
class Timed:
    """What one query takes.

    Attributes:
        ms: its median, in ms.
        over_first: the same over what the first model takes, which was timed along with it: what slows the machine
            for a while slows both, and drops out.
        ratio: where they took turns, ``over_first`` with its interval; the first's own is that to itself, where it
            was checked (A/A).
        iqr_ms: where they took turns, the interquartile range.
    """

    ms: float
    over_first: float
    ratio: Ratio | None = None
    iqr_ms: float | None = None


@dataclass(frozen=True)
class Clock:
    """How models are timed, on what they are to run on.

    Attributes:
        runtime, batch_size, threads, device: as in `surgery.benchmark`.
        min_seconds: spent on each model, at the least.
        timer: takes the place of `surgery.compare`: how long queries take on another machine, say.
        check: measure the first model against itself as well, once.
    """

    runtime: str = "onnxruntime"
    batch_size: int = 1
    threads: int | None = None
    device: str = "cpu"
    min_seconds: float = 1.0
    seed: int = 0
    timer: Timer | None = None
    check: bool = False

    @contextmanager
    def ready(self, module: nn.Module) -> Iterator[nn.Module | Runner]:
        """What to give to `times` for a module that it is to time more than once: exported, say, but once only."""
        if self.timer is not None:
            yield module
        else:
            threads = usable_cores() if self.threads is None else self.threads
            with ready(self.runtime, Job(module, None, None, self.batch_size, threads, self.device)) as runner:
                yield runner

    def times(self, modules: Mapping[str, nn.Module | Runner], progress: Progress | None = None) -> dict[str, Timed]:
        """The median latency of each; all take turns with the first, a few at a time."""
        tell = progress or (lambda task, done, total: None)
        if self.timer is not None:
            taken = self.timer({name: module for name, module in modules.items() if isinstance(module, nn.Module)})
            tell("time", 1, 1)
            once = taken[next(iter(modules))]
            return {name: Timed(float(ms), float(ms / once)) for name, ms in taken.items()}
        (first, baseline), *others = modules.items()
        found: dict[str, Timed] = {}
        chunks = [others[k : k + _TOGETHER] for k in range(0, len(others), _TOGETHER)] or [[]]
        done, steps = 0, len(others) + 2 * len(chunks)  # each model is set up, the first in each chunk, which is timed
        for chunk in chunks:
            compared = compare(
                {first: baseline, **dict(chunk)},
                runtime=self.runtime,
                batch_size=self.batch_size,
                threads=self.threads,
                device=self.device,
                min_seconds=self.min_seconds,
                memory=False,
                check=self.check and not found,
                seed=self.seed,
                progress=lambda _, ready, total, before=done: tell("time", before + ready, steps),
            )
            for name, result in compared.results.items():
                ratio = compared.ratios.get(name)
                over = ratio.value if ratio else 1.0
                found.setdefault(name, Timed(result.p50_ms, over, ratio or compared.check, result.iqr_ms))
            done += len(chunk) + 2
            tell("time", done, steps)
        return found


@dataclass(frozen=True)
class Judged:
    """What a model makes of some images: how many it classifies correctly, and its mean cross-entropy."""

    score: Score
    loss: float


def judged(module: nn.Module, images: Images, *, most: int | None = None, batch_size: int = 250) -> Judged:
    """The score and the loss on the images, or on ``most`` of them, taken from all over the data set."""
    total = count(images)
    if most is not None and total > most:
        images = Subset(images, [total * k // most for k in range(most)])
    correct = seen = 0
    summed = 0.0
    device = device_of(module)
    with in_mode(module, training=False), torch.inference_mode():
        for batch, labels, *_ in loader(images, batch_size):
            logits = module(batch.to(device)).float()
            summed += float(functional.cross_entropy(logits, labels.to(device), reduction="sum"))
            correct += int((logits.argmax(1).cpu() == labels).sum())
            seen += len(labels)
    return Judged(Score(correct, seen), summed / seen if math.isfinite(summed) else math.inf)


def slimmed_alone(
    module: nn.Module,
    found: Mapping[str, Sequence[DimensionGroup]],
    rate: float,
    *,
    round_to: int = 1,
    importance: str = "prefix",
) -> Iterator[tuple[str, nn.Module]]:
    """Each part's name with the model in which it alone is slimmed."""
    for name, groups in found.items():
        yield name, slim(module, {g.name: rate for g in groups}, round_to=round_to, importance=importance)
