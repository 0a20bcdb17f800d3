"""Models of timm, by name: ``timm:NAME?key=value``, with the keywords that the model's builder takes.

A name may have a tag (``timm:resnet50.a1_in1k``), which says what published weights are like; they are fetched only
where ``weights`` asks for them, by tag or as ``DEFAULT``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from surgery.errors import UsageError, unknown_name
from surgery.models.catalogue import Entry, text
from surgery.models.listing import KnownModel
from surgery.models.sources import Source, parse_query

SIZE = "img_size"


def parse(source: str, query: str, keywords: Mapping[str, Any]) -> Source:
    """Parse a name: see `surgery.models.libraries`.

    Raises:
        UsageError: timm has no model of that name, or no such weights of it.
    """
    given = {**parse_query(query), **keywords}
    weights = given.pop("weights", None)
    weights = None if weights is None or str(weights).lower() == "none" else str(weights)
    plain, _, tag = source.partition(".")
    if not timm.is_model(plain):
        raise unknown_name("model of timm", plain, timm.list_models())
    tags = {name.partition(".")[2] for name in timm.list_pretrained(f"{plain}.*")}
    for wanted in (tag, weights):
        if wanted and wanted != "DEFAULT" and wanted not in tags:
            raise unknown_name(f"weights of {plain!r}", wanted, tags)
    return Source("timm", source, _entry(source, given), given, weights)


def build(source: Source) -> nn.Module:
    """Build a model, with initial weights unless the source asks for published ones, in training mode.

    Raises:
        UsageError: timm refuses the keywords, or the weights cannot be fetched.
    """
    name = source.name
    if source.weights not in (None, "DEFAULT"):
        name = f"{name.partition('.')[0]}.{source.weights}"
    keywords: dict[str, Any] = dict(source.keywords)
    try:
        module = timm.create_model(name, pretrained=source.weights is not None, **keywords)
    except Exception as error:  # the library's own code, on any keywords; and whatever a download may raise
        what = ", ".join(f"{k}={text(v)}" for k, v in source.keywords.items()) or "no keywords"
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"'timm:{name}' cannot be built with {what}: {reason}") from error
    assert isinstance(module, nn.Module)
    return module.train()


def inputs(source: Source, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Make random images."""
    return torch.randn(*shape, generator=generator)


def models() -> list[KnownModel]:
    """List timm's models, by the file that defines them, with the size that their first weights are for."""
    return [KnownModel(_entry(name, {}), None, None, {}) for name in timm.list_models()]


def _entry(name: str, keywords: Mapping[str, Any]) -> Entry:
    """What a model takes, from timm's record of it."""
    plain = name.partition(".")[0]
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = (3, 224, 224) if known is None else tuple(known.input_size)
    family = timm.models.model_entrypoint(plain).__module__.rpartition(".")[2]
    channels = keywords.get("in_chans", size[0])
    fixed = known is not None and bool(known.fixed_input_size)
    return Entry(name, family, (channels, *size[1:]), fixed=fixed, size_keyword=SIZE if fixed else "")
