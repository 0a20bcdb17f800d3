"""The clock that models on the way to a budget are timed with: the one of `surgery.compare`, or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from surgery.deploy.measure.benchmark import Ratio, compare
from surgery.deploy.measure.environment import usable_cores
from surgery.deploy.measure.jobs import Job, Runner
from surgery.deploy.measure.runners import ready
from surgery.progress import Progress
from surgery.settings import TimingSettings

Timer = Callable[[Mapping[str, nn.Module]], Mapping[str, float]]
"""From modules by name to what one query of each takes, in ms."""

_TOGETHER = 6
"""Models that are timed in one run, so that not all need be in memory at once."""


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
    """How models are timed, on the machine they are to run on.

    Attributes:
        settings: as in `surgery.benchmark`.
        timer: replaces `surgery.compare`: how long queries take on another machine, say.
        check: measure the first model against itself as well, once.
    """

    settings: TimingSettings = TimingSettings()
    timer: Timer | None = None
    check: bool = False

    @contextmanager
    def ready(self, module: nn.Module) -> Iterator[nn.Module | Runner]:
        """What to give to `times` for a module that it is to time more than once: exported, say, but once only."""
        if self.timer is not None:
            yield module
        else:
            threads = usable_cores() if self.settings.threads is None else self.settings.threads
            job = Job(module, None, None, self.settings.batch_size, threads, self.settings.device)
            with ready(self.settings.runtime, job) as runner:
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
                settings=self.settings.timing(memory=False),
                check=self.check and not found,
                progress=lambda _, ready, total, before=done: tell("time", before + ready, steps),
            )
            for name, result in compared.results.items():
                ratio = compared.ratios.get(name)
                over = ratio.value if ratio else 1.0
                found.setdefault(name, Timed(result.p50_ms, over, ratio or compared.check, result.iqr_ms))
            done += len(chunk) + 2
            tell("time", done, steps)
        return found
