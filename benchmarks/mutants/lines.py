"""A plugin of pytest that notes which lines each test executes, and how long it takes.

SURGERY_LINES=lines.json pytest -p benchmarks.mutants.lines tests
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from benchmarks.mutants.mutate import ROOT
from benchmarks.mutants.rooms import ROOMS

_FOLDERS = tuple(f"{ROOT / room}{os.sep}" for room in ROOMS)
_LINES: dict[str, dict[str, Any]] = {}
_now: dict[CodeType, set[int]] = {}
_calls: Counter[CodeType] = Counter()
_clock = [0.0]
_ENOUGH = 30
"""Calls of a function that are followed in a test: following costs time, and later calls seldom take new ways."""
_SECONDS = 15
"""Seconds of CPU after which a test is not followed any further."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Follow one test, its fixtures included."""
    _now.clear()
    _calls.clear()
    started = _clock[0] = time.process_time()
    sys.settrace(_follow)
    yield
    sys.settrace(None)
    files: dict[str, set[int]] = {}
    for code, lines in _now.items():
        files.setdefault(str(Path(code.co_filename).relative_to(ROOT)), set()).update(lines)
    row = _LINES.setdefault(item.nodeid, {"passed": False})
    row["seconds"] = round(time.process_time() - started, 2)
    row["lines"] = {file: sorted(lines) for file, lines in files.items()}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Only tests that pass can tell a mutant."""
    if report.when == "call":
        _LINES.setdefault(report.nodeid, {})["passed"] = report.passed


def pytest_sessionfinish() -> None:
    """Write what was seen, beside what is there."""
    path = Path(os.environ["SURGERY_LINES"])
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **_LINES}, separators=(",", ":")))


def _follow(frame: FrameType, event: str, argument: Any) -> Any:
    code = frame.f_code
    if not code.co_filename.startswith(_FOLDERS):
        return None
    seen = _now.setdefault(code, set())
    seen.add(frame.f_lineno)
    _calls[code] += 1
    if _calls[code] > _ENOUGH:
        if time.process_time() - _clock[0] > _SECONDS:
            sys.settrace(None)
        return None

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        seen.add(frame.f_lineno)
        return note

    return note
