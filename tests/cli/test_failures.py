"""What a verb says that could not end: one line, in the tool's own words."""

from __future__ import annotations

import errno
import os
import resource
import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import surgery


@pytest.fixture(autouse=True)
def empty_folder(module_in_folder):
    code = """
        from torch import nn

        def tiny():
            return nn.Sequential(nn.Linear(300, 40), nn.ReLU(), nn.Linear(40, 3))
    """
    return module_in_folder("failing_factory", code)


SLIM = ["slim", "failing_factory:tiny", "--trust", "--input-shape", "2,300", "--rate", "0.5", "--out", "slim"]


def fail(monkeypatch, action):
    def slim(*_, **__):
        return action()

    monkeypatch.setattr(surgery, "slim", slim)


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        (lambda: raise_(KeyboardInterrupt()), 130, "interrupted: results are written whole or not at all"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "terminated: results are written whole or not at all"),
        (
            lambda: raise_(OSError(errno.ENOSPC, "No space left on device", "slim/x")),
            1,
            "error: cannot write slim/x: the disk is full",
        ),
        (lambda: raise_(OSError(errno.ENOSPC, "No space")), 1, "error: cannot write the result: the disk is full"),
        (
            lambda: raise_(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")),
            1,
            "error: there is not enough memory for this: [enforce fail] DefaultCPUAllocator: can't allocate memory: "
            "you tried",
        ),
        (lambda: warnings.warn("x/trained.json is damaged", surgery.DamageWarning, stacklevel=1) or raise_(
            surgery.CheckpointError("y is damaged")), 2, "warning: x/trained.json is damaged\nerror: y is damaged"),
    ],
    ids=["Ctrl-C", "SIGTERM", "full", "full somewhere", "memory", "damage"],
)  # fmt: skip
def test_what_ends_a_verb_is_one_line(run, monkeypatch, empty_folder, action, code, said):
    fail(monkeypatch, action)
    before = signal.getsignal(signal.SIGTERM)
    assert run(*SLIM) == (code, "", f"{said}\n")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(empty_folder.glob("*slim*"))


@pytest.mark.parametrize(
    "kind", [c for c in vars(surgery.errors).values() if isinstance(c, type) and issubclass(c, Warning)]
)
def test_every_warning_of_the_package_is_printed_and_no_others(run, monkeypatch, kind):
    def action():
        warnings.warn("of torch", UserWarning, stacklevel=1)
        warnings.warn("mind this", kind, stacklevel=1)
        raise surgery.CheckpointError("y is damaged")

    fail(monkeypatch, action)
    assert run(*SLIM) == (2, "", "warning: mind this\nerror: y is damaged\n")


def test_an_error_that_is_none_of_memory_is_not_hidden(run, monkeypatch):
    fail(monkeypatch, lambda: raise_(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(*SLIM)


@contextmanager
def files_of(most: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("most", [0, 100, 4096])
def test_a_disk_that_is_full_leaves_the_earlier_model(empty_folder, most):
    model = surgery.trace(nn.Linear(300, 40), torch.zeros(2, 300))
    surgery.save(model, "saved")
    with files_of(most), pytest.raises(OSError, match="File too large") as caught:
        surgery.save(model, "saved", force=True)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in empty_folder.glob("*saved*")] == ["saved"]
    surgery.load("saved", model=nn.Linear(300, 40))


def test_weights_that_were_trained_elsewhere_are_loaded_where_that_is_said(run, empty_folder):
    assert run(*SLIM)[0] == 0
    other = [*SLIM[:-1], "other", "--seed", "1"]
    assert run(*other)[0] == 0
    (empty_folder / "other" / "weights.safetensors").replace(empty_folder / "slim" / "weights.safetensors")
    code, out, err = run("inspect", "slim", "--trust")
    assert (code, out) == (2, "")
    assert err.startswith("error: slim/weights.safetensors was changed after it was saved, or is that of another model")
    assert err.endswith("are loaded with --allow-changed-weights\n")
    assert run("inspect", "slim", "--trust", "--allow-changed-weights")[0] == 0
