"""Fixtures of all tests, and what holds for each of them."""

from __future__ import annotations

import gc
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.cli import main
from surgery.graph.seeding import seed_generators
from surgery.training.data.data import Data
from tests.helpers import load_digits
from tests.sweeps import is_slow
from tests.zoo import FAMILIES, Family, build_family

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in filter(is_slow, items):
        item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: garbage collections, which trainings and timings ask for, pass it over."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test draws the same, its fixtures included, whatever ran before it in the same process."""
    seed_generators(0)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Only this machine can be reached."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests use no network, and {address} is not on this machine")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """The folder of the repository holds the same files afterwards, but for those of Python's tools."""
    before = set(_files())
    yield
    assert sorted(set(_files()) - before) == []


def _files() -> Iterator[Path]:
    for folder in (ROOT, ROOT / "tests", ROOT / "docs", ROOT / "benchmarks" / "results"):
        yield from (path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__")))


@pytest.fixture(scope="module")
def digits(request: pytest.FixtureRequest) -> Data:
    """The digits of scikit-learn; as many as the module's ``DIGITS`` says, where it has one."""
    return load_digits(getattr(request.module, "DIGITS", None))


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in FAMILIES])
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    """Each family in turn: all tests of one before the next, so that one model is held at a time."""
    yield build_family(request.param)
    gc.collect()


@pytest.fixture
def run(capfd):
    """Run a command: its exit code, stdout and stderr."""

    def call(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    return call


@pytest.fixture
def module_in_folder(tmp_path, monkeypatch):
    """Write a Python file into an empty folder, and run there, where it can be imported by its name."""

    def write(name, code):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        sys.modules.pop(name, None)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        return tmp_path

    return write
