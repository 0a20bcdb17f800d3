"""The clock of a search for a budget: `surgery.compare`, or the user's own timer."""

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
"""From modules by name to the latency of one query of each, in ms."""

_TOGETHER = 6
"""Models that are timed in one run, so that not all are in memory at once."""


@dataclass(frozen=True)
class Timed:
    """The latency of one query.

    Attributes:
        ms: the median.
        over_first: the ratio to the first model, timed in the same run: a slow phase of the machine slows both, and
            cancels out.
        ratio: ``over_first`` with its interval; for the first model, the A/A check, if one was made. None with a timer.
        iqr_ms: the interquartile range; None with a timer.
    """

    ms: float
    over_first: float
    ratio: Ratio | None = None
    iqr_ms: float | None = None


@dataclass(frozen=True)
class Clock:
    """How models are timed.

    Attributes:
        settings: as in `surgery.benchmark`.
        timer: replaces `surgery.compare`, for example by latencies of another machine.
        check: also measure the first model against itself, once.
    """

    settings: TimingSettings = TimingSettings()
    timer: Timer | None = None
    check: bool = False

    @contextmanager
    def ready(self, module: nn.Module) -> Iterator[nn.Module | Runner]:
        """Prepare a module, for example by an export, for several calls of `times`."""
        if self.timer is not None:
            yield module
        else:
            threads = usable_cores() if self.settings.threads is None else self.settings.threads
            job = Job(module, None, None, self.settings.batch_size, threads, self.settings.device)
            with ready(self.settings.runtime, job) as runner:
                yield runner

    def times(
        self,
        modules: Mapping[str, nn.Module | Runner],
        progress: Progress | None = None,
        told: Callable[[str, Timed], None] | None = None,
    ) -> dict[str, Timed]:
        """Measure the latency of each model. All take turns with the first, a few at a time.

        ``told`` is called with each of the others as soon as it is measured.
        """
        tell = progress or (lambda task, done, total: None)
        if self.timer is not None:
            taken = self.timer({name: module for name, module in modules.items() if isinstance(module, nn.Module)})
            tell("time", 1, 1)
            once = taken[next(iter(modules))]
            given = {name: Timed(float(ms), float(ms / once)) for name, ms in taken.items()}
            _tell_others(given, first=next(iter(modules)), told=told)
            return given
        (first, baseline), *others = modules.items()
        found: dict[str, Timed] = {}
        chunks = [others[k : k + _TOGETHER] for k in range(0, len(others), _TOGETHER)] or [[]]
        done, steps = (
            0,
            len(others) + 2 * len(chunks),
        )  # set up each; time each chunk
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
            _tell_others({name: found[name] for name in compared.results}, first=first, told=told)
            done += len(chunk) + 2
            tell("time", done, steps)
        return found


def _tell_others(timed: Mapping[str, Timed], *, first: str, told: Callable[[str, Timed], None] | None) -> None:
    for name, one in timed.items():
        if told is not None and name != first:
            told(name, one)
