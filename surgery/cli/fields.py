"""Options from dataclasses: a verb's parameter whose type is one becomes an option for each of its fields."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from surgery.settings import DistillSettings, Settings, option

REQUIRED: Any = MISSING

_WITHOUT_EFFECT = {
    *(one.name for one in fields(DistillSettings) if not one.metadata["result"]),
    *("out", "force", "as_json", "device", "reuse"),
}
"""Options that may differ when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(Settings):
    """The data set that a verb reads."""

    dataset: str = option(REQUIRED, "mnist5k, digits, torchvision:NAME or imagefolder:DIR.", metavar="DATA")
    image_size: int | None = option(None, "Side in pixels. [default: the data's own]", least=1)
    data_root: Path | None = option(None, "Where torchvision's data sets are kept.", metavar="DIR")
    limit: int | None = option(None, "Use so many training and test images at most.")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Settings):
    """Where a run that trains computes, and what it writes."""

    out: Path = option(REQUIRED, "The folder to write.", metavar="DIR")
    augment: str = option("none", "Training images: none, flip or flip-crop.")
    device: str = option("auto", "auto (a GPU where there is one), cpu or cuda.")
    trust: bool = option(False, "Allow package.module:factory to be imported and called.")
    force: bool = option(False, "Replace what --out names, if it was made by this command.")
    as_json: bool = option(False, "Print one JSON object, and nothing else, on stdout.", name="--json")


def takes_fields(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a verb take dataclasses: typer sees an option for each of their fields, except those named ``without``."""

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
            options = [_option(kind, one) for one in fields(kind) if one.name not in without]
            groups[parameter.name] = (kind, [one.name for one in options])
            parameters += options

        @functools.wraps(verb)
        def run(**given: Any) -> None:
            made = {name: kind(**{one: given.pop(one) for one in own}) for name, (kind, own) in groups.items()}
            verb(**given, **made)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def settings_of(context: typer.Context) -> dict[str, Any]:
    """What the command was called with, as plain JSON data, without the options that its result does not depend on."""
    given = {name: value for name, value in context.params.items() if name not in _WITHOUT_EFFECT}
    found: dict[str, Any] = json.loads(json.dumps(given, default=str))
    return found


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the command was called with this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _option(kind: Any, one: Field[Any]) -> inspect.Parameter:
    hint: Any = get_type_hints(kind)[one.name]
    words: dict[str, Any] = {"help": one.metadata["help"], "metavar": one.metadata.get("metavar")}
    flag = one.metadata.get("name", f"--{one.name.replace('_', '-')}")
    if "PathLike" in str(one.type):
        hint = (str | None) if one.default is None else str
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    annotation: Any = Annotated[hint, typer.Option(flag, **words)]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
