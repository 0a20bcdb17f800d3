"""Virtual environments for versions.py: what is installed in them, and how."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEWEST = "newest"
_READY = "surgery-ready"
"""The file that says that everything is installed, and which requirements were asked for."""


class InstallError(Exception):
    """What pip could not install, with its last lines."""


def requirements(target: str, pyproject: str | None = None) -> list[str]:
    """What is asked of pip besides the package itself.

    Args:
        target: ``"floor"``, ``"newest"`` or a version of torch: ``"2.13"`` is its last release, ``"2.13.0"`` this one.
        pyproject: text of pyproject.toml; that of this package by default.
    """
    if target == NEWEST:
        return []
    if target != "floor":
        # "===" leaves out builds of another label ("2.13.0+cpu"), which torchvision's own does not belong to
        return [f"torch==={target}" if target.count(".") == 2 else f"torch=={target}.*"]
    dependencies = _project(pyproject)["dependencies"]
    found = [re.match(r"(torch|torchvision)>=([\d.]+)", dependency) for dependency in dependencies]
    return [f"{match[1]}=={match[2]}.*" for match in found if match]


def _project(text: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text() if text is None else text)["project"]
    return found


def make_environment(folder: Path, wanted: list[str]) -> Path:
    """Make a virtual environment with the package, its tools and ``wanted``.

    One that is there is taken; what the package has come to need since is installed.

    Returns:
        Its Python.

    Raises:
        InstallError: when pip fails.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    project = _project()
    asked = "\n".join([*wanted, *project["dependencies"], *project["optional-dependencies"]["dev"]])
    ready = folder / _READY
    if ready.exists() and ready.read_text() == asked:
        return python
    if not ready.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", f"{ROOT}[dev]", *wanted]
    done = subprocess.run([str(python), *install], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InstallError("; ".join(said) or f"pip ended with code {done.returncode}")
    tried = subprocess.run([str(python), "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if tried.returncode:  # builds of torch and torchvision that do not belong together: the index decides which it has
        last = (tried.stderr.strip().splitlines() or [f"code {tried.returncode}"])[-1]
        raise InstallError(f"torchvision cannot be imported with the torch that pip chose: {last}")
    ready.write_text(asked)
    return python
