"""The command line: thin verbs over the public API.

Each verb takes a torchvision name, a model of another library (``hf:CONFIG-or-DIR``, ``timm:NAME``), a folder that
`surgery.save` wrote, or ``package.module:factory`` with ``--trust``.
The result goes to stdout, as a table or, with ``--json``, as one JSON object; everything else goes to stderr. A verb
calls the public package and nothing else; what it needs of that is imported when it runs, so help needs no torch.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

import surgery
from surgery.cli import compress, distill, evolve, measure, operate, sensitivity, show
from surgery.errors import (
    UNWRITABLE,
    EditError,
    SurgeryError,
    SurgeryWarning,
    TraceError,
    UsageError,
    is_out_of_memory,
)

_ParserError = cast(type[typer.BadParameter], typer.BadParameter.__bases__[0])
"""What typer raises for arguments it cannot parse: it names only this subclass of it publicly."""

_REFUSED = (UsageError, EditError, TraceError)


class _PlainFlags:
    """Mixed into a command: help shows no type for options that take no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _InterruptedError(Exception):
    """An interruption of a verb, which typer would make its own of."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


class _Command(_PlainFlags, TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error
        except UsageError as error:
            flags = {one.name: max(one.opts, key=len) for one in self.params if one.opts[0].startswith("-")}
            error.args = (_speak_of_options(str(error), flags), *error.args[1:])
            raise


class _Group(_PlainFlags, TyperGroup):
    pass


class _App(typer.Typer):
    """An app whose commands are all of the class above."""

    def command(self, *args: Any, **settings: Any) -> Callable[[Any], Any]:
        return super().command(*args, cls=_Command, **settings)


app = _App(
    name="surgery",
    help="Widen, deepen and slim neural networks exactly; export them, measure them, choose among them.",
    epilog="Example: surgery tradeoff resnet18 --dataset mnist5k --split-rates 1.0,0.5,0.25 --out runs/demo",
    cls=_Group,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"surgery {surgery.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that may stand before a verb."""


for verbs in (show, operate, compress, distill, evolve, measure, sensitivity):
    verbs.register(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words, by default those of the process.

    Returns:
        the exit code. 0: done. 1: it failed, as when a verification does. 2: the request cannot be met, and nothing was
        done. 130: interrupted. 143: terminated.

    Example:
        >>> surgery.cli.main(["slim", "resnet18", "--rate", "0.5", "--out", "slim"])
    """
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if os.getcwd() not in sys.path:  # find a factory in the current folder, as python -m does
        sys.path.append(os.getcwd())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SurgeryWarning)
        warnings.showwarning = lambda message, *_, **__: _say("warning", message)
        try:
            with _terminable():
                code = get_command(app)(arguments, prog_name="surgery", standalone_mode=False, obj=arguments)
        except _ParserError as error:
            return _fail(error, error.format_message(), 2)
        except _REFUSED as error:
            return _fail(error, error, 2)
        except OSError as error:
            return _fail(error, _say_why(error), 1)
        except (SurgeryError, FloatingPointError) as error:
            return _fail(error, error, 1)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            said = f"there is not enough memory for this: {error}" if str(error) else "out of memory"
            return _fail(error, said, 1)
        except _InterruptedError as error:
            return _interrupted(error.__cause__)
        except (typer.Abort, KeyboardInterrupt) as error:  # before or after a verb
            return _interrupted(error)
    return code or 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a verb as an interruption does, unless the caller handles it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def terminate(*_: object) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupted(error: BaseException | None) -> int:
    """Print what an interrupted verb keeps."""
    terminated = isinstance(error, _Terminated)
    notes = [f"{note}: give the same command again to go on" for note in getattr(error, "__notes__", ())]
    word = "terminated" if terminated else "interrupted"
    for note in notes or [f"{word}: results are written whole or not at all"]:
        print(note, file=sys.stderr)
    return 143 if terminated else 130


def _say_why(error: OSError) -> str:
    """Say in one line what cannot be read or written."""
    if error.errno not in UNWRITABLE:
        return str(error)
    return f"cannot write {error.filename or 'the result'}: {UNWRITABLE[error.errno]}"


def _fail(error: BaseException, message: object, code: int) -> int:
    """Print what went wrong and the error's notes, which say what is kept of a run."""
    _say("error", message)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    return code


def _speak_of_options(message: str, flags: Mapping[str, str]) -> str:
    """Put the flags of a command where a message names settings: at its begin, and wherever they have an underscore."""

    def put(match: re.Match[str]) -> str:
        name, before = match[0], message[: match.start()]
        return flags[name] if "_" in name or not before or before.endswith(" and ") else name

    names = "|".join(map(re.escape, flags))
    return re.sub(rf"(?<![\w.'\"-])(?:{names})(?=(?: and \w+)? (?:must|is|are|may)\b)", put, message)


def _say(kind: str, message: object) -> None:
    """Print a message as one line on stderr. ``force=True (--force)`` becomes ``--force``: the reader has options."""
    line = re.sub(r"\b(?:\w+=\w*|\w+_\w+) \((--[^)]*)\)", r"\1", " ".join(str(message).split()))
    print(f"{kind}: {line}", file=sys.stderr)
