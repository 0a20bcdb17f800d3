"""What was done to a model, as data: steps in order that can be printed, compared, stored as JSON and replayed."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery import edit
from surgery.edit.step import Step
from surgery.errors import UsageError
from surgery.graph.traced import info

SCHEMA = 2


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
            UsageError: the data is not a recipe, has an unknown schema, or a step has unknown or missing fields.
        """
        try:
            schema, source, steps = data["schema"], data["source"], [dict(step) for step in data["steps"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a recipe: {error!r}") from error
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            raise UsageError(f"recipe has schema {schema}, this version reads 1 to {SCHEMA}")
        for older in range(schema, SCHEMA):
            steps = [_MIGRATIONS[older](step) for step in steps]
        _import_steps()
        return Recipe(source, tuple(map(Step.from_dict, steps)))

    @staticmethod
    def from_json(text: str) -> Recipe:
        """`from_dict` of JSON text, and what it raises."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"not a recipe: {error!r}") from error
        return Recipe.from_dict(data)


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
    fields = known.get(step.get("step", ""))
    if fields is None:
        return step
    given = {key: value for key, value in step.items() if key in fields}
    return {"step": step["step"], **{k: v for k, v in fields.items() if v is not None}, **given}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_schema_1}
"""For each older schema what makes a step of it one of the next schema."""
