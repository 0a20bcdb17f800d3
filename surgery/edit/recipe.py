"""What was done to a model, as data: steps in order that can be printed, compared, stored as JSON and replayed."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery import edit
from surgery.edit.step import Step, count_units
from surgery.errors import CheckpointError
from surgery.graph.traced import info
from surgery.storage.documents import check_type, parse_object

SCHEMA = 3
"""Since 3, a saved folder's recipe holds digests."""

_MOST_UNITS = 2**22
"""The most entries of all indices of a recipe: the widest models have some 200,000 units."""


@dataclass(frozen=True)
class Recipe:
    """The edits made since `surgery.trace`, in order, and where the architecture came from.

    ``str()`` of it has one line for each step.
    """

    source: str | None
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join([f"source: {self.source}", *(step.describe() for step in self.steps)])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data; runs of an index are written ``"first:last+1"``."""
        return {"schema": SCHEMA, "source": self.source, "steps": [step.to_dict() for step in self.steps]}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; it reads older schemas too. Other keys are ignored.

        Raises:
            CheckpointError: the data is not a recipe, has an unknown schema, expands to too many numbers, or a step has
                unknown or missing fields or a value of another type.
        """
        for field in ("schema", "source", "steps"):
            if field not in data:
                raise CheckpointError(f"not a recipe: it lacks the field {field!r}")
        schema = check_type(data["schema"], int, "'schema' of the recipe")
        source = check_type(data["source"], _Text, "'source' of the recipe")
        steps = check_type(data["steps"], list[dict[str, Any]], "'steps' of the recipe")
        if not 1 <= schema <= SCHEMA:
            raise CheckpointError(f"recipe has schema {schema}, this version reads 1 to {SCHEMA}")
        refuse_large(steps)
        for older in range(schema, SCHEMA):
            steps = [_MIGRATIONS[older](step) for step in steps]
        _import_steps()
        return Recipe(source, tuple(map(Step.from_dict, steps)))

    @staticmethod
    def from_json(text: str) -> Recipe:
        """`from_dict` of JSON text, and what it raises."""
        return Recipe.from_dict(parse_object(text, "not a recipe: the text"))


_Text: Any = str | None


def refuse_large(steps: Sequence[Mapping[str, Any]]) -> None:
    """Raise `CheckpointError` for steps, as JSON data, whose indices would take too much memory."""
    units = count_units(list(steps))
    if units > _MOST_UNITS:
        raise CheckpointError(f"'steps' of the recipe hold {units} numbers, more than the {_MOST_UNITS} that are read")


def recipe(module: nn.Module) -> Recipe:
    """What was done to a traced module since `surgery.trace`.

    Args:
        module: a traced module.

    Returns:
        the steps in order, and the source of the architecture.

    Raises:
        UsageError: the module is not traced.

    Example:
        >>> print(surgery.recipe(surgery.slim(traced, 0.5)))
    """
    known = info(module)
    return Recipe(known.source, known.steps)


def _import_steps() -> None:
    """Import the modules of this package, so that the steps they define are known."""
    for found in pkgutil.iter_modules(edit.__path__, f"{edit.__name__}."):
        importlib.import_module(found.name)


def _from_schema_1(step: dict[str, Any]) -> dict[str, Any]:
    """Readers of schema 1 ignored unknown fields, and filled in these where an old file had none."""
    known: dict[str, dict[str, Any]] = {
        "Reindex": dict.fromkeys(("indices", "shares", "noise")),
        "InsertIdentity": {
            **dict.fromkeys(("after", "name", "form", "kernel", "norm", "activation", "channels")),
            **{"seed": 0, "pieces": 1, "eps": 2.0**-17},
        },
        "InsertBlock": dict.fromkeys(("after", "name", "like", "zeros")),
        "InsertDense": dict.fromkeys(("after", "name", "like")),
    }
    fields = known.get(str(step.get("step", "")))
    if fields is None:
        return step
    given = {key: value for key, value in step.items() if key in fields}
    return {"step": step["step"], **{k: v for k, v in fields.items() if v is not None}, **given}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_schema_1, 2: lambda step: step}
"""For each older schema what makes a step of it one of the next schema."""
