"""Describe where a measurement was taken: the figures mean nothing without it."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnxruntime
import psutil
import torch

from surgery.version import __version__

_PACKAGES = ("torch", "torchvision", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "tensorrt")


@dataclass(frozen=True)
class Environment:
    """A machine and the software on it, at one moment. Unknown values are None."""

    date: str
    """When the measurement began, in UTC, ISO 8601."""
    system: str
    cpu: str
    cpu_cores: int
    """Logical cores of the machine."""
    cpu_cores_usable: int
    """Logical cores that this process may run on."""
    cpu_governor: str | None
    cpu_turbo: bool | None
    """Whether the CPU may exceed its base clock."""
    load_1min: float | None
    """Mean number of runnable processes over the minute before; well above 0 the machine was not idle."""
    memory_bytes: int
    gpu: str | None
    gpu_driver: str | None
    cuda: str | None
    tf32: dict[str, bool] | None
    """Whether torch may round float32 to TF32 on the GPU: in convolutions, in matrix products."""
    python: str
    versions: dict[str, str]
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers."""

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        return asdict(self)


def environment() -> Environment:
    """Describe the machine and the software that this process runs on, now.

    Returns:
        What a measurement depends on; None where it cannot be found out.

    Example:
        >>> surgery.environment().cpu
    """
    gpu = torch.cuda.is_available()
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        system=platform.platform(),
        cpu=_cpu_name(),
        cpu_cores=os.cpu_count() or 1,
        cpu_cores_usable=usable_cores(),
        cpu_governor=_first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        cpu_turbo=_turbo(),
        load_1min=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        memory_bytes=psutil.virtual_memory().total,
        gpu=torch.cuda.get_device_name() if gpu else None,
        gpu_driver=_gpu_driver() if gpu else None,
        cuda=torch.version.cuda if gpu else None,
        tf32=_tf32() if gpu else None,
        python=platform.python_version(),
        versions=_versions(),
        providers=tuple(onnxruntime.get_available_providers()),
    )


def usable_cores() -> int:
    """Count the logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _turbo() -> bool | None:
    folder = Path("/sys/devices/system/cpu")
    boost, no_turbo = _first_line(folder / "cpufreq/boost"), _first_line(folder / "intel_pstate/no_turbo")
    if boost is None:
        return None if no_turbo is None else no_turbo == "0"
    return boost == "1"


def _gpu_driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip()


def _tf32() -> dict[str, bool]:
    return {"convolution": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}


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
