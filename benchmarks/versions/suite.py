"""The tests that versions.py runs in each environment, and what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.versions.environments import ROOT

PARTS = {
    "graph": ("tests/graph", "tests/axes"),
    "rules": ("tests/rules", "tests/layers"),
    "edit": ("tests/edit",),
    "operations": ("tests/operations",),
    "cost": ("tests/counting",),
    "export": ("tests/deploy/onnx",),
    "checkpoint": (
        "tests/models/test_saving.py",
        "tests/training/test_resume.py",
        "tests/training/test_optimizer_state.py",
    ),
    "internals": ("tests/test_internals.py",),
    "README": ("tests/test_readme.py",),
}
"""Files and folders of tests, by the name of their column."""

_ASK = """
import json, platform
from importlib.metadata import version
packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy", "surgery")
print(json.dumps({"python": platform.python_version(), "versions": {name: version(name) for name in packages}}))
"""


def installed_versions(python: Path) -> dict[str, Any]:
    """The versions of Python and of the packages that matter, as the environment's own Python gives them."""
    done = subprocess.run([str(python), "-c", _ASK], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_part(python: Path, part: str, processes: int, seconds: float) -> dict[str, Any]:
    """Run the tests of one part.

    Returns:
        Counts of ``passed`` and ``skipped``; ``failed``, the names of those that failed, each with the last line of its
        error; ``error``, why there may be more tests than these, or None; ``seconds`` and ``date``.
    """
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        parallel = ["-n", str(processes), "--dist", "loadgroup"] if processes > 1 else []
        where = ["-p", "no:cacheprovider", f"--junitxml={report}", *PARTS[part]]
        said = ""
        try:
            done = subprocess.run(
                [str(python), "-m", "pytest", *parallel, *where],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
            if done.returncode not in (0, 1):  # 1: tests ran and some failed
                said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [""]
                said = f"pytest ended with code {done.returncode}: {said[0]}"
        except subprocess.TimeoutExpired:
            said = f"ended at the time limit of {seconds / 60:g} minutes"
        counts = read_report(report.read_text()) if report.exists() else {"passed": 0, "skipped": 0, "failed": {}}
    if not said and not counts["passed"] and not counts["failed"]:
        said = "no test ran"
    spent = round(time.perf_counter() - begun)
    return {**counts, "error": said or None, "seconds": spent, "date": datetime.now(UTC).date().isoformat()}


def read_report(text: str) -> dict[str, Any]:
    """Count what a JUnit report of pytest holds: tests that passed, were skipped, and failed (by name, with why)."""
    counts: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for case in ElementTree.fromstring(text).iter("testcase"):
        broken = [entry for kind in ("failure", "error") for entry in case.findall(kind)]
        if broken:
            message = (broken[0].get("message") or "").strip().splitlines() or [""]
            counts["failed"][f"{case.get('classname')}::{case.get('name')}"] = message[0][:200]
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts
