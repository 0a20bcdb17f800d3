"""Virtual environments for versions.py: what is installed in them, and how."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEWEST = "newest"
_READY = "surgery-ready"
"""The file that says that everything is installed, and which requirements were asked for."""


class InstallError(Exception):
    """What pip could not install, with its last lines."""


def requirements(target: str, pyproject: str | None = None) -> list[str]:
    """What is asked of pip besides the package itself.

    Args:
        target: ``"floor"``, ``"newest"`` or a version of torch, such as ``"2.13"``.
        pyproject: text of pyproject.toml; that of this package by default.
    """
    if target == NEWEST:
        return []
    if target != "floor":
        return [f"torch=={target}.*"]
    text = (ROOT / "pyproject.toml").read_text() if pyproject is None else pyproject
    dependencies = tomllib.loads(text)["project"]["dependencies"]
    found = [re.match(r"(torch|torchvision)>=([\d.]+)", dependency) for dependency in dependencies]
    return [f"{match[1]}=={match[2]}.*" for match in found if match]


def make_environment(folder: Path, wanted: list[str]) -> Path:
    """Make a virtual environment with the package, its tools and ``wanted``; take the one that is there and complete.

    Returns:
        Its Python.

    Raises:
        InstallError: when pip fails.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready, asked = folder / _READY, "\n".join(wanted)
    if ready.exists() and ready.read_text() == asked:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", f"{ROOT}[dev]", *wanted]
    done = subprocess.run([str(python), *install], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InstallError("; ".join(said) or f"pip ended with code {done.returncode}")
    ready.write_text(asked)
    return python
