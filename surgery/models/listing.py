"""The models known by name with what is published of them: a listing that needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from surgery.errors import unknown_name
from surgery.models.catalogue import CATALOGUE, Entry
from surgery.models.fitnets import FITNETS, fitnet_cost
from surgery.models.libraries import LIBRARIES, open_library

_SCORES = {"acc@1": "{:.1f}% top-1", "miou": "{:.1f} mIoU", "box_map": "{:.1f} box mAP", "epe": "{:.2f} px"}
"""How the metrics of torchvision are printed, in the order of preference."""


@dataclass(frozen=True)
class KnownModel:
    """A model of the catalogue with its published figures.

    Attributes:
        entry: what the model is called with and how it is built.
        params: number of parameters; None where it is not published.
        gmacs: billions of multiply-accumulates for one input, as published; None where they are not.
        metrics: scores by data set and metric, as torchvision publishes them with its default weights; none of FitNets.
    """

    entry: Entry
    params: int | None
    gmacs: float | None
    metrics: Mapping[str, Mapping[str, float]]

    @property
    def score(self) -> str:
        """The main metric on the main data set, in words (``"69.8% top-1"``); empty where nothing is published."""
        figures = {name: value for of_data in reversed(list(self.metrics.values())) for name, value in of_data.items()}
        return next((form.format(figures[name]) for name, form in _SCORES.items() if name in figures), "")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        entry = self.entry
        return {
            "name": entry.name,
            "family": entry.family,
            "kind": entry.kind,
            "input": f"{entry.kind} {'x'.join(map(str, entry.input_size))}",
            "input_size": list(entry.input_size),
            "params": self.params,
            "gmacs": self.gmacs,
            "metrics": dict(self.metrics),
            "score": self.score,
            "notes": entry.notes,
        }


def list_models(pattern: str = "*", family: str | None = None, library: str | None = None) -> list[KnownModel]:
    """List the models that can be built by name.

    Args:
        pattern: a glob over names.
        family: a glob over families, in any case (``"swin*"``).
        library: the prefix of another library's sources (``"hf"``); by default torchvision's and the FitNets.

    Returns:
        the models that match both, in the order of the catalogue.

    Raises:
        UsageError: nothing matches; lists close names. There is no such library, or it is not installed.

    Example:
        >>> [known.entry.name for known in surgery.models.list_models("resnet1*")]
        ['resnet18', 'resnet101', 'resnet152']
    """
    known = {model.entry.name: model for model in _of_library(library)}
    if family is not None:
        families = {model.entry.family for model in known.values()}
        known = {name: m for name, m in known.items() if fnmatchcase(m.entry.family.lower(), family.lower())}
        if not known:
            raise unknown_name("family", family, families)
    found = [model for name, model in known.items() if fnmatchcase(name, pattern)]
    if not found:
        raise unknown_name("model", pattern, known)
    return found


def _of_library(library: str | None) -> list[KnownModel]:
    if library in (None, "torchvision"):
        return [_known(entry) for entry in {**CATALOGUE, **FITNETS}.values()]
    if library not in LIBRARIES:
        raise unknown_name("library", library, ["torchvision", *LIBRARIES])
    models: list[KnownModel] = open_library(library).models()
    return models


def _known(entry: Entry) -> KnownModel:
    if entry.name in FITNETS:
        params, multiplications = fitnet_cost(entry.name)
        return KnownModel(entry, params, multiplications / 1e9, {})
    return KnownModel(entry, *_figures()[entry.name.removeprefix("quantized_")])


@cache
def _figures() -> dict[str, tuple[int, float, dict[str, dict[str, float]]]]:
    """By name the parameters, billions of MACs and metrics that torchvision publishes with its default weights."""
    text = files("surgery.models").joinpath("published.json").read_text(encoding="utf-8")
    return {name: tuple(figures) for name, figures in json.loads(text).items()}
