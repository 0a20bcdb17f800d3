"""Options from a YAML file, and the file that repeats a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.errors import UsageError, unknown_name

CONFIG = "run.yaml"
"""The file in the folder of a run with what its command was given."""

_NOT_OF_THE_RUN = {"config", "out", "force", "as_json"}
"""Options that say nothing of what a run does."""


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a YAML file as defaults of the command: a callback of `Config`.

    Raises:
        UsageError: a file that cannot be read or is no mapping, an unknown option, or a value that is none.
    """
    if path is None:
        return None
    known = {one.name: one for one in context.command.params if one.name not in (None, *_NOT_OF_THE_RUN, "help")}
    given = {str(name).lstrip("-").replace("-", "_"): value for name, value in _load(path).items()}
    for name in given.keys() - known.keys():
        raise unknown_name(f"option in {path}", name, [str(one) for one in known])
    context.default_map = {
        name: _plain(path, name, value, several=getattr(known[name], "multiple", False))
        for name, value in given.items()
        if value is not None
    }
    return path


def write_config(context: typer.Context, folder: Path) -> None:
    """Write what a command was given, defaults included, into the folder of its results: `read_config` reads it."""
    import yaml

    names = [one.name for one in context.command.params if one.name in context.params.keys() - _NOT_OF_THE_RUN]
    given = {str(name): context.params[str(name)] for name in names}
    plain = {
        name.replace("_", "-"): [str(one) for one in value] if isinstance(value, (list, tuple)) else _text(value)
        for name, value in given.items()
        if value is not None and value != [] and value != ()
    }
    (folder / CONFIG).write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        is_eager=True,
        callback=read_config,
        help=f"Take options from a YAML file, such as the {CONFIG} of an earlier run; what is given here comes first.",
    ),
]


def _load(path: Path) -> Mapping[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config: {path} must hold options, each as NAME: VALUE")
    return content


def _plain(path: Path, name: str, value: Any, *, several: bool) -> Any:
    """The value of an option as its command takes it; a list for one that takes no list is joined by commas."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(one, (str, int, float)) for one in items):
        raise UsageError(f"--config: {name} in {path} must be a text, a number, true or false, or a list of these")
    if several:
        return [str(one) for one in items]
    return ",".join(map(str, items)) if isinstance(value, list) else value


def _text(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
