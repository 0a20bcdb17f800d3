"""Kill a process at its n-th system call that changes files: ptrace, on Linux and x86-64."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable

_TRACEME, _CONT, _SYSCALL, _GETREGS, _SETOPTIONS = 0, 7, 24, 12, 0x4200
_TRACESYSGOOD, _EXITKILL = 1, 0x100000
_ORIG_RAX, _REGISTERS = 15, 27

_CHANGING = {
    1: "write", 2: "open", 18: "pwrite64", 20: "writev", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir",
    84: "rmdir", 85: "creat", 86: "link", 87: "unlink", 88: "symlink", 90: "chmod", 91: "fchmod", 257: "openat",
    258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat", 268: "fchmodat", 285: "fallocate",
    316: "renameat2", 73: "flock", 3: "close",
}  # fmt: skip
"""Numbers of the system calls before which a process is killed, and after which: the next one of them."""


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
        return _step(libc, child, count)
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


def _step(libc: ctypes.CDLL, child: int, count: int) -> str | None:
    registers = (ctypes.c_ulonglong * _REGISTERS)()
    entering, passed, forwarded = False, 0, 0
    while True:
        _ptrace(libc, _SYSCALL, child, 0, forwarded)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise RuntimeError("the function raised an error in the child")
            return None
        if os.WIFSIGNALED(status):
            raise RuntimeError(f"the child was ended by signal {os.WTERMSIG(status)}")
        forwarded = 0
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            forwarded = os.WSTOPSIG(status)
            continue
        entering = not entering
        if not entering:
            continue
        _ptrace(libc, _GETREGS, child, 0, ctypes.addressof(registers))
        name = _CHANGING.get(registers[_ORIG_RAX])
        if name is not None:
            if passed == count:
                _end(child)
                return name
            passed += 1


def _end(child: int) -> None:
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
