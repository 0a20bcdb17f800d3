"""Options from dataclasses: a verb's parameter whose type is a dataclass becomes one option for each of its fields."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from surgery.settings import DistillSettings

_WITHOUT_EFFECT = {
    *(one.name for one in fields(DistillSettings) if not one.metadata["result"]),
    *("out", "config", "force", "as_json", "device", "reuse", "skip_bad", "strict", "allow_changed_weights"),
}
"""Options that may differ when a run is resumed."""


def takes_fields(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a verb take dataclasses: typer sees an option for each of their fields, except those named ``without``.

    A field's type is ``Annotated`` with its option, or the field is made by `surgery.settings.option`. A field of the
    same name in several of the dataclasses is one option, that of the first, and all get its value.

    Example:
        >>> @app.command()
        ... @takes_fields()
        ... def inspect(model: Model, opening: Opening) -> None: ...
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(verb, include_extras=True)
        hints.pop("return", None)
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[Any, list[str]]] = {}
        for parameter in inspect.signature(verb).parameters.values():
            kind = hints[parameter.name]
            if not is_dataclass(kind):
                parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            types = get_type_hints(kind, include_extras=True)
            options = [_option(one, types[one.name]) for one in fields(kind) if one.name not in without]
            groups[parameter.name] = (kind, [one.name for one in options])
            known = {one.name for one in parameters}
            parameters += [one for one in options if one.name not in known]

        @functools.wraps(verb)
        def run(**given: Any) -> None:
            grouped = {name: kind(**{one: given[one] for one in own}) for name, (kind, own) in groups.items()}
            taken = {one for _, own in groups.values() for one in own}
            verb(**{name: value for name, value in given.items() if name not in taken}, **grouped)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def settings_of(context: typer.Context) -> dict[str, Any]:
    """Return what the command was called with as plain JSON data, without options that do not affect its result."""
    given = {name: value for name, value in context.params.items() if name not in _WITHOUT_EFFECT}
    found: dict[str, Any] = json.loads(json.dumps(given, default=str))
    return found


def is_given(context: typer.Context, name: str) -> bool:
    """Tell whether the command was called with this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def completion(choices: Iterable[str]) -> Callable[[str], list[str]] | None:
    """Make what completes one of ``choices`` in a shell; None without any."""
    known = list(choices)
    return (lambda incomplete: [choice for choice in known if choice.startswith(incomplete)]) if known else None


def _option(one: Field[Any], hint: Any) -> inspect.Parameter:
    if "PathLike" in str(one.type):
        hint = (str | None) if one.default is None else str
    if get_origin(hint) is not Annotated:
        flag = one.metadata.get("name", f"--{one.name.replace('_', '-')}")
        given = {"help": one.metadata["help"], "metavar": one.metadata.get("metavar")}
        hint = Annotated[hint, typer.Option(flag, **given, autocompletion=completion(one.metadata.get("choices", ())))]
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
