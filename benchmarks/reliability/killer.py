"""Kill a process at its n-th system call that changes files: ptrace, on Linux and x86-64."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_TRACEME, _SYSCALL, _GETREGS, _SETOPTIONS = 0, 24, 12, 0x4200
_TRACESYSGOOD, _EXITKILL = 1, 0x100000
_ORIG_RAX, _REGISTERS = 15, 27
_ARGUMENTS = (14, 13, 12)  # rdi, rsi, rdx

_CHANGING = {
    1: ("write", "fd"), 2: ("open", "path"), 3: ("close", "fd"), 18: ("pwrite64", "fd"), 20: ("writev", "fd"),
    40: ("sendfile", "fd"), 73: ("flock", "fd"), 76: ("truncate", "path"), 77: ("ftruncate", "fd"),
    82: ("rename", "path"), 83: ("mkdir", "path"), 84: ("rmdir", "path"), 85: ("creat", "path"), 86: ("link", "path"),
    87: ("unlink", "path"), 88: ("symlink", "path"), 90: ("chmod", "path"), 91: ("fchmod", "fd"), 257: ("openat", "at"),
    258: ("mkdirat", "at"), 263: ("unlinkat", "at"), 264: ("renameat", "at"), 265: ("linkat", "at"),
    268: ("fchmodat", "at"), 285: ("fallocate", "fd"), 316: ("renameat2", "at"),
}  # fmt: skip
"""Numbers of the system calls before which a process is killed, and after which: the next one of them. Each with what
its first arguments say of the file: a descriptor, a path, or a folder's descriptor and a path."""


class Killed(NamedTuple):
    """Where a process was killed: before ``call``, after as many as ``before``. ``call`` is None if it had ended."""

    call: str | None
    before: int


def can_trace() -> bool:
    """Whether this system lets a process trace its children."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    try:
        return kill_at(lambda: None, 10**6) is None
    except OSError:
        return False


def kill_at(run: Callable[[], object], count: int) -> str | None:
    """Run a function in a child process, and kill it before its system call number ``count`` that changes files.

    Returns:
        the name of the system call; None if the child ended before.

    Raises:
        OSError: the system does not allow tracing.
        RuntimeError: the function raised an error.
    """
    return _kill(run, count, None).call


def kill_command(words: list[str], folder: Path, count: int) -> Killed:
    """Run a program in ``folder``, and kill it before its system call number ``count`` that changes files in it.

    Raises:
        OSError: the system does not allow tracing.
        RuntimeError: the program failed.
    """

    def run() -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os.chdir(folder)
        os.execv(words[0], words)

    return _kill(run, count, folder)


def _kill(run: Callable[[], object], count: int, folder: Path | None) -> Killed:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    child = os.fork()
    if child == 0:
        _run_traced(libc, run)
    try:
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            raise OSError("this system does not allow tracing")
        _ptrace(libc, _SETOPTIONS, child, 0, _TRACESYSGOOD | _EXITKILL)
        return _step(libc, child, count, folder)
    except BaseException:
        _end(child)
        raise


def _run_traced(libc: ctypes.CDLL, run: Callable[[], object]) -> None:
    code = 1
    try:
        if libc.ptrace(_TRACEME, 0, None, None) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            run()
            code = 0
    finally:
        os._exit(code)


def _step(libc: ctypes.CDLL, child: int, count: int, folder: Path | None) -> Killed:
    registers = (ctypes.c_ulonglong * _REGISTERS)()
    entering, passed, forwarded = False, 0, 0
    while True:
        _ptrace(libc, _SYSCALL, child, 0, forwarded)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise RuntimeError("the function raised an error in the child, or the program failed")
            return Killed(None, passed)
        if os.WIFSIGNALED(status):
            raise RuntimeError(f"the child was ended by signal {os.WTERMSIG(status)}")
        forwarded = 0
        if os.WSTOPSIG(status) == signal.SIGTRAP:  # another program runs in it
            continue
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            forwarded = os.WSTOPSIG(status)
            continue
        entering = not entering
        if not entering:
            continue
        _ptrace(libc, _GETREGS, child, 0, ctypes.addressof(registers))
        name, kind = _CHANGING.get(registers[_ORIG_RAX], ("", ""))
        if name and (folder is None or folder in _file(child, kind, registers).parents):
            if passed == count:
                _end(child)
                return Killed(name, passed)
            passed += 1


def _file(child: int, kind: str, registers: ctypes.Array[ctypes.c_ulonglong]) -> Path:
    """The file that a system call is about; the root folder where that cannot be told."""
    first, second, _ = (registers[place] for place in _ARGUMENTS)
    with contextlib.suppress(OSError):
        if kind == "fd":
            return Path(os.readlink(f"/proc/{child}/fd/{first}"))
        base = f"/proc/{child}/cwd"
        if kind == "at" and ctypes.c_int(first).value >= 0:
            base = f"/proc/{child}/fd/{first}"
        return Path(os.readlink(base), _text_at(child, second if kind == "at" else first))
    return Path("/")


def _text_at(child: int, address: int) -> str:
    """The text that begins at an address of a process, which ends with a zero."""
    found = b""
    with open(f"/proc/{child}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        while b"\0" not in found and len(found) < 4096:
            found += memory.read(min(256, 4096 - address % 4096) if not found else 256)
    return os.fsdecode(found.partition(b"\0")[0])


def _end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended of itself
        os.kill(child, signal.SIGKILL)
    while True:
        try:
            _, status = os.waitpid(child, 0)
        except ChildProcessError:
            return
        if os.WIFSIGNALED(status) or os.WIFEXITED(status):
            return


def _ptrace(libc: ctypes.CDLL, request: int, child: int, address: int, data: int) -> None:
    if libc.ptrace(request, child, address, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
