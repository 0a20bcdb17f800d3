"""Where a measurement was taken: the figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from surgery.version import __version__

_PACKAGES = ("torch", "torchvision", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy")


@dataclass(frozen=True)
class Environment:
    """A machine and the software on it, at one moment. What could not be found out is None."""

    date: str
    """When the measurement began, in UTC, ISO 8601."""
    system: str
    cpu: str
    cpu_cores: int
    """Logical cores of the machine."""
    cpu_cores_usable: int
    """Logical cores that this process may run on."""
    cpu_governor: str | None
    load_1min: float | None
    """Mean number of processes that wanted to run, over the minute before: well above 0, the machine was not idle."""
    memory_bytes: int
    gpu: str | None
    cuda: str | None
    python: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        return asdict(self)


def environment() -> Environment:
    """The environment of this process, now."""
    gpu = torch.cuda.is_available()
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        system=platform.platform(),
        cpu=_cpu_name(),
        cpu_cores=os.cpu_count() or 1,
        cpu_cores_usable=usable_cores(),
        cpu_governor=_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        load_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        memory_bytes=psutil.virtual_memory().total,
        gpu=torch.cuda.get_device_name() if gpu else None,
        cuda=torch.version.cuda if gpu else None,
        python=platform.python_version(),
        versions=_versions(),
    )


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _versions() -> dict[str, str]:
    found = {"surgery": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
