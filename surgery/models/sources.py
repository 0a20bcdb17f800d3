"""Sources: parsing the text that names an architecture, and writing it in one full form. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import parse_qsl, urlencode

from surgery.errors import UsageError, unknown_name
from surgery.models.catalogue import CATALOGUE, Entry, Value, text
from surgery.models.fitnets import FITNETS
from surgery.models.libraries import LIBRARIES, open_library

WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
"""What the names of files of weights end in."""


@dataclass(frozen=True)
class Source:
    """The parts of a source; ``entry`` is None for a factory of the user's own."""

    prefix: str
    name: str
    entry: Entry | None
    keywords: Mapping[str, Value]
    weights: str | None

    def implied(self) -> dict[str, Value]:
        """Return the builder keywords that the weights need."""
        if self.entry is None or self.weights is None:
            return {}
        return {**self.entry.pretrained, **self.entry.pretrained_by_name.get(self.weights, {})}

    def sample_size(self) -> tuple[int, ...]:
        """Return the size of one sample: what the model is built for where that is fixed, or the catalogue's."""
        assert self.entry is not None
        size = self.entry.input_size
        side = {**self.implied(), **self.keywords}.get(self.entry.size_keyword)
        if isinstance(side, tuple):
            return (*size[:-2], *side)
        return (*size[:-2], side, side) if isinstance(side, int) else size


def canonical(source: str, **keywords: Value | None) -> str:
    """Write a source in its one full form, ``torchvision:NAME?key=value``, with sorted keywords.

    A configuration of ``hf:`` is in it whole, wherever it was read from.

    The form describes the architecture and never its values: ``weights`` are replaced by the builder keywords that
    they need.

    Args:
        source: as `build` takes it.
        keywords: added to those of the source; None leaves one out.

    Returns:
        the full form.

    Raises:
        UsageError: the source names nothing.

    Example:
        >>> canonical("resnet18", num_classes=10)
        'torchvision:resnet18?num_classes=10'
    """
    parsed = parse(source, **keywords)
    query = urlencode({k: text(v) for k, v in sorted({**parsed.implied(), **parsed.keywords}.items())}, safe=",")
    return f"{parsed.prefix}:{parsed.name}" + (f"?{query}" if query else "")


def parse(source: str, **keywords: Value | None) -> Source:
    """Parse a source.

    Args:
        source: as `build` takes it.
        keywords: replace those of the source; None leaves the source's own.

    Returns:
        its parts; of weights the name under which torchvision publishes them, also for ``DEFAULT``. A file of weights
        is no part of a source.

    Raises:
        UsageError: the source names nothing.
    """
    if is_weights_file(keywords.get("weights")):
        keywords = {**keywords, "weights": None}
    path, _, query = source.partition("?")
    library, colon, rest = path.partition(":")
    if colon and library in LIBRARIES:
        if rest.startswith("{"):  # a configuration, in which anything may stand
            rest, query = source.partition(":")[2], ""
        given = {k: v for k, v in keywords.items() if v is not None}
        parsed: Source = open_library(library).parse(rest, query, given)
        return parsed
    prefix, _, name = path.rpartition(":")
    merged: dict[str, Any] = parse_query(query)
    merged |= {k: v for k, v in keywords.items() if v is not None}
    weights = _named(merged.pop("weights", None))
    if prefix == "fitnets" or (not prefix and name in FITNETS):
        if name not in FITNETS:
            raise unknown_name("model", name, FITNETS)
        if weights is not None:
            raise UsageError(f"{name!r} has no published weights")
        return Source("fitnets", name, FITNETS[name], merged, None)
    if prefix not in ("", "torchvision"):
        return Source(prefix, name, None, merged, weights)
    if name not in CATALOGUE:
        raise unknown_name("model", name, CATALOGUE if prefix else [*CATALOGUE, *FITNETS])
    if _named(merged.pop("weights_backbone", None)) is not None:
        raise UsageError(f"{name!r} takes no weights_backbone here: pass weights= for those of the whole model")
    if name.startswith("quantized_") and merged.get("quantize"):
        raise UsageError(
            f"{name!r} cannot be built with quantize=true: int8 layers hold packed weights, which no operation can "
            "change. Operate on its float form (quantize=false, the default) and quantize the result"
        )
    if weights is not None:
        known = published(name).__members__
        weights = known[weights].name if weights in known else weights
    return Source("torchvision", name, CATALOGUE[name], merged, weights)


def is_weights_file(weights: object) -> bool:
    """Whether ``weights`` names a file, by its ending, and not published weights."""
    return isinstance(weights, (str, PurePath)) and PurePath(weights).suffix.lower() in WEIGHTS_ENDINGS


def published(name: str) -> Any:
    """Return torchvision's enumeration of the weights of a model; of its float form, if it is quantizable."""
    from torchvision.models import get_model_weights  # a source can be read without it

    return get_model_weights(name.removeprefix("quantized_"))


def short(source: str) -> str:
    """Return the name of the model that a source names, without prefix and keywords."""
    prefix, colon, rest = source.partition(":")
    if colon and prefix in LIBRARIES:
        named = open_library(prefix).parse(rest, "", {}).entry if rest.startswith("{") else None
        return named.name if named is not None else rest.partition("?")[0]
    return source.removeprefix("torchvision:").removeprefix("fitnets:").partition("?")[0]


def parse_query(query: str) -> dict[str, Value]:
    """Parse what stands behind ``?`` in a source: numbers, booleans and tuples of whole numbers are such."""
    return {k: _value(v) for k, v in parse_qsl(query, keep_blank_values=True)}


def _named(weights: Any) -> Any:
    return None if isinstance(weights, str) and weights.lower() == "none" else weights


def _value(given: str) -> Value:
    if given.lower() in ("true", "false"):
        return given.lower() == "true"
    for number in (int, float):
        try:
            return number(given)
        except ValueError:
            continue
    try:
        return tuple(int(part) for part in given.split(",")) if "," in given else given
    except ValueError:
        return given
