"""One mutant in a process of its own: the function is changed in memory, and tests run until one fails."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutants.mutate import ROOT, Mutant, apply_mutant

Result = tuple[str, str, int]
"""``killed``, ``lived``, ``timeout``, ``untested`` or ``invalid``; by which test; how many tests were to run."""


class Trials:
    """Runs mutants. This process imports the tests once; each mutant is a fork of it."""

    def __init__(self, tests: dict[str, Any], seconds: float) -> None:
        """
        Args:
            tests: by node id, as `benchmarks.mutants.lines` writes them.
            seconds: of CPU for one mutant, at least: as many as all of its tests have taken, twice, if that is more.
                So what ends at the limit does not end.
        """
        self.tests = {name: row for name, row in tests.items() if row.get("passed") and "lines" in row}
        self.seconds = seconds
        os.chdir(ROOT)
        for file in sorted({name.partition("::")[0] for name in self.tests}):
            importlib.import_module(file.removesuffix(".py").replace("/", "."))
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if tests fail that run here without any mutant."""
        result, by, _ = self.fork(None, sorted(self.tests, key=lambda name: self.tests[name]["seconds"])[:20])
        if result != "lived":
            raise RuntimeError(f"the tests do not run here without a mutant: {result} by {by or 'no test'}")

    def run(self, mutant: Mutant) -> Result:
        """Try one mutant."""
        tests = self.choose(mutant)
        return self.fork(mutant, tests) if tests else ("untested", "", 0)

    def fork(self, mutant: Mutant | None, tests: list[str]) -> Result:
        """Run tests on a mutant, or on what is there."""
        seconds = max(self.seconds, 2 * sum(self.tests[name]["seconds"] for name in tests))
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "failed"
            child = os.fork()
            if child == 0:
                _run_child(mutant, tests, told, seconds)
            code = _wait(child, 20 * seconds)
            by = told.read_text() if told.exists() else ""
        if code is None:
            return "timeout", by, len(tests)
        if code == _INVALID:
            return "invalid", "", len(tests)
        return ("lived" if code == 0 else "killed" if by or code > 0 else "timeout"), by, len(tests)

    def choose(self, mutant: Mutant) -> list[str]:
        """The tests that execute the line, those that take least first; but before them those of its own test file."""
        found = [name for name, row in self.tests.items() if mutant.line in row["lines"].get(mutant.file, ())]
        found.sort(key=lambda name: self.tests[name]["seconds"])
        own = f"/test_{Path(mutant.file).stem}.py"
        first = [name for name in found if own in name]
        return [*first, *(name for name in found if name not in first)]


_INVALID = 77


def _run_child(mutant: Mutant | None, tests: list[str], told: Path, seconds: float) -> None:
    """Never returns."""
    code = 1
    try:
        limit = int(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        try:
            if mutant is not None:
                apply_mutant(mutant)
        except (ValueError, StopIteration, SyntaxError):
            os._exit(_INVALID)
        with _silence():
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain"]
            code = int(pytest.main([*options, *tests], plugins=[_Tell(told)]))
    except BaseException:
        code = 1
    finally:
        os._exit(code)


class _Tell:
    """Writes which test failed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first failure is the last test."""
        if report.failed:
            self.file.write_text(report.nodeid)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        yield


def _wait(child: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; None where the child was ended at the limit."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
