"""A plugin of pytest that notes which lines each test executes, and how long it takes.

SURGERY_LINES=lines.json pytest -p benchmarks.mutants.lines tests
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coverage import Coverage

from benchmarks.mutants.mutate import ROOT
from benchmarks.mutants.rooms import ROOMS

_tests: dict[str, dict[str, Any]] = {}
_coverage = Coverage(data_file=None, include=[f"{ROOT / room}{os.sep}*" for room in ROOMS])


def pytest_sessionstart() -> None:
    """Begin before the tests are imported: what runs while they are is no test's."""
    _coverage.start()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Follow one test, its fixtures included."""
    started = time.process_time()
    _coverage.switch_context(item.nodeid)
    yield
    _coverage.switch_context("")
    _tests.setdefault(item.nodeid, {"passed": False})["seconds"] = round(time.process_time() - started, 2)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Only tests that pass can tell a mutant."""
    if report.when == "call":
        _tests.setdefault(report.nodeid, {})["passed"] = report.passed


def pytest_sessionfinish() -> None:
    """Write what was seen, beside what is there."""
    _coverage.stop()
    data = _coverage.get_data()
    for file in data.measured_files():
        name = str(Path(file).relative_to(ROOT))
        for line, tests in data.contexts_by_lineno(file).items():
            for test in tests:
                if test in _tests:
                    _tests[test].setdefault("lines", {}).setdefault(name, []).append(line)
    for row in _tests.values():
        row.setdefault("lines", {})
    path = Path(os.environ["SURGERY_LINES"])
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **_tests}, separators=(",", ":")))
