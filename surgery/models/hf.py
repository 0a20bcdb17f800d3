"""Models of Hugging Face's transformers, from configurations alone: no code and no weights of a hub, and no network.

A source is ``hf:TYPE?key=value``, with a model type that transformers knows (``hf:bert?num_hidden_layers=2``), a folder
with a ``config.json``, such a file, or its JSON. The keyword ``class`` names the class of transformers to build; by
default it is what the configuration says in ``architectures``, a classifier where ``num_labels`` is given, or else the
model without a head. The canonical form has the whole configuration, so that it needs no file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch
import transformers
from torch import Tensor, nn

from surgery.errors import UsageError, unknown_name
from surgery.models.catalogue import Entry, Kind, text
from surgery.models.listing import KnownModel
from surgery.models.sources import Source, parse_query

_LEFT_OUT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map")
"""Entries of a configuration that say nothing of the architecture."""

_LENGTH = 32
"""Tokens of an example input, where the model takes as many."""

_CLASSIFIERS = ("AutoModelForImageClassification", "AutoModelForSequenceClassification")


def parse(source: str, query: str, keywords: Mapping[str, Any]) -> Source:
    """Parse a configuration: see `surgery.models.libraries.Library.parse`.

    Raises:
        UsageError: no such model type, file, class or entry of a configuration, or published weights.
    """
    given = {**parse_query(query), **keywords}
    if str(given.pop("weights", None) or "none").lower() != "none":
        raise UsageError("'hf:' sources are configurations, without weights: load them into the model that is built")
    if "num_classes" in given:
        given["num_labels"] = given.pop("num_classes")
    entries = _read(source)
    unknown = _unknown(entries["model_type"], given)
    if unknown:
        defaults = vars(_config_class(entries["model_type"])())
        raise unknown_name(f"entry of a configuration of {entries['model_type']!r}", unknown[0], [*defaults, "class"])
    entries.update(given)
    architectures = entries.pop("architectures", None)
    if architectures and "class" not in entries:
        entries["class"] = architectures if isinstance(architectures, str) else architectures[0]
    entries = {name: value for name, value in entries.items() if name not in _LEFT_OUT}
    config = _configure(entries)
    name, flat = _written(entries)
    return Source("hf", name, _entry(config, _model_class(config, entries)), flat, None)


def build(source: Source) -> nn.Module:
    """Build the model of a configuration, with initial weights, in training mode.

    Raises:
        UsageError: transformers refuses the configuration.
    """
    entries = _entries(source)
    config = _configure(entries)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache is no part of what a graph computes
    try:
        module = _model_class(config, entries)(config)
    except Exception as error:  # the library's own code, on any configuration
        raise UsageError(f"{_where(entries)} cannot be built: {error}") from error
    assert isinstance(module, nn.Module)
    return module.float().train()


def inputs(source: Source, shape: Sequence[int], generator: torch.Generator) -> Any:
    """Make random inputs: pixels, token numbers or features, and where there is a decoder its token numbers."""
    entries = _entries(source)
    config = _configure(entries)
    entry = source.entry
    assert entry is not None
    if len(shape) != 1 + len(entry.input_size):
        wanted = "x".join(map(str, ("N", *entry.input_size)))
        raise UsageError(f"{_where(entries)} takes inputs like {wanted}, not {'x'.join(map(str, shape))}")
    first = _tokens(config, shape, generator) if entry.kind == "tokens" else torch.randn(*shape, generator=generator)
    others = _others(config, _model_class(config, entries), shape, generator)
    return (first, *others) if others else first


def models() -> list[KnownModel]:
    """List the model types that transformers can build, by what they take; their sizes are those of configurations."""
    auto = transformers.models.auto.modeling_auto
    kinds: dict[Kind, Mapping[str, Any]] = {
        "image": {**auto.MODEL_FOR_IMAGE_MAPPING_NAMES, **auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES},
        "features": {
            **auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            **auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        },
    }
    found: dict[str, Kind] = {name: kind for kind, names in kinds.items() for name in names}
    rows = [(found.get(name, "tokens"), name) for name in auto.MODEL_MAPPING_NAMES]
    return [KnownModel(Entry(name, name, (), kind=kind), None, None, {}) for kind, name in sorted(rows)]


def _read(source: str) -> dict[str, Any]:
    """The entries of a configuration as text, as a file or folder, or by its type."""
    if source.startswith("{"):
        where, content = "hf:", source
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            if len(path.parts) > 1 or source.endswith(".json"):
                raise UsageError(f"there is no configuration at {path}: 'hf:' takes files, and fetches nothing")
            return {"model_type": source}
        where, content = str(path), path.read_text(encoding="utf-8")
    try:
        entries = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{where} is no JSON: {error}") from error
    if not isinstance(entries, dict) or not isinstance(entries.get("model_type"), str):
        raise UsageError(f"{where} is no configuration of transformers: it has no model_type")
    return entries


def _written(entries: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and keywords of a source: the type and the entries where these can be written so, or else JSON."""
    flat = {name: value for name, value in entries.items() if name != "model_type"}
    simple = all(isinstance(value, (bool, int, float, str)) for value in flat.values())
    if (
        simple
        and not _unknown(entries["model_type"], flat)
        and parse_query(urlencode({name: text(value) for name, value in flat.items()})) == flat
    ):
        return entries["model_type"], flat
    return json.dumps(entries, sort_keys=True, separators=(",", ":")), {}


def _entries(source: Source) -> dict[str, Any]:
    return {**_read(source.name), **source.keywords}


def _config_class(model_type: str) -> Any:
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in known:
        raise unknown_name("model type of transformers", model_type, known.keys())
    return known[model_type]


def _unknown(model_type: str, entries: Mapping[str, Any]) -> list[str]:
    """The entries that a configuration of this type does not have: those of a file may be of other versions."""
    cls = _config_class(model_type)
    defaults, names = cls(), inspect.signature(cls.__init__).parameters
    return [name for name in entries if name != "class" and name not in names and not hasattr(defaults, name)]


def _configure(entries: Mapping[str, Any]) -> Any:
    given = {k: v for k, v in entries.items() if k not in ("model_type", "class")}
    try:
        return _config_class(entries["model_type"]).from_dict(given)
    except UsageError:
        raise
    except Exception as error:  # what a configuration checks, it may raise as anything
        raise UsageError(f"{_where(entries)} is no valid configuration: {' '.join(str(error).split())}") from error


def _model_class(config: Any, entries: Mapping[str, Any]) -> Any:
    name = entries.get("class")
    if name is not None:
        cls = getattr(transformers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            raise UsageError(f"transformers has no model class {name!r}")
        return cls
    autos = (*(_CLASSIFIERS if "num_labels" in entries else ()), "AutoModel")
    for auto in autos:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping.keys():  # noqa: SIM118 (it imports what it is asked for)
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise UsageError(f"{_where(entries)} has no class to build: name one of transformers with class=")


def _where(entries: Mapping[str, Any]) -> str:
    return f"'hf:{entries['model_type']}'"


def _entry(config: Any, cls: Any) -> Entry:
    """What a model takes, from its configuration."""
    name, main = config.model_type, cls.main_input_name
    kind: Kind = "features"
    size: tuple[int, ...]
    if main == "pixel_values":
        own = getattr(config, "vision_config", config)
        side = getattr(own, "image_size", None) or 224
        kind, size = (
            "image",
            (getattr(own, "num_channels", 3), *(tuple(side) if isinstance(side, (tuple, list)) else (side, side))),
        )
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        size = (config.num_mel_bins, 2 * getattr(config, "max_source_positions", 500))
    elif main == "input_values":
        size = (16000,)
    else:
        kind, size = "tokens", (min(_LENGTH, getattr(config, "max_position_embeddings", _LENGTH)),)
    return Entry(name, name, size, kind=kind)


def _tokens(config: Any, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    own = getattr(config, "text_config", config)
    return torch.randint(0, own.vocab_size, tuple(shape), generator=generator)


def _others(config: Any, cls: Any, shape: Sequence[int], generator: torch.Generator) -> tuple[Any, ...]:
    """The inputs that follow the first: None for those that may be left out before the last that is needed."""
    names = list(inspect.signature(cls.forward).parameters)[2:]
    needed: dict[str, Any] = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        needed["decoder_input_ids"] = _tokens(config, (shape[0], 8), generator)
    if cls.main_input_name == "input_ids" and "pixel_values" in names and hasattr(config, "vision_config"):
        side = config.vision_config.image_size
        needed["pixel_values"] = torch.randn(shape[0], 3, side, side, generator=generator)
    last = max((names.index(name) for name in needed), default=-1)
    return tuple(needed.get(name) for name in names[: last + 1])
