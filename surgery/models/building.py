"""From a source to a module: torchvision's builders, FitNets, and factories of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torchvision.models import get_model_builder
from torchvision.ops import FrozenBatchNorm2d

from surgery.errors import CheckpointError, SurgeryError, UsageError
from surgery.graph.seeding import seed_generators
from surgery.models import pretrained
from surgery.models.bounds import refuse_keywords, refuse_too_large
from surgery.models.catalogue import FROZEN_NORM, Value, text
from surgery.models.fitnet_modules import build_fitnet
from surgery.models.libraries import LIBRARIES, open_library
from surgery.models.sources import Source, is_weights_file, parse
from surgery.models.weights_file import load_weights_file


def build(
    source: str,
    *,
    num_classes: int | None = None,
    weights: str | None = None,
    trust: bool = False,
    seed: int | None = None,
) -> nn.Module:
    """Build the model that ``source`` names.

    Args:
        source: a name of the catalogue, optionally with the prefix ``torchvision:`` or ``fitnets:`` and with builder
            keywords (``resnet50?num_classes=10``); a model of a library in `LIBRARIES` (``hf:vit?hidden_size=192``); or
            ``package.module:factory``, your own code.
        num_classes: the builder's keyword.
        weights: ``"DEFAULT"`` or another name of torchvision's weights of the model. Where ``num_classes`` or another
            keyword differs from theirs, entries whose shape fits are copied, and a `WeightsWarning` names the others. A
            name that ends in ``.safetensors`` or ``.pth`` is a file of yours, which must match entry by entry
            (`surgery.models.load_weights_file`).
        trust: allow ``package.module:factory`` to be imported and called.
        seed: of the initial values; the global random state stays as it was.

    Returns:
        a freshly initialised module in training mode.

    Raises:
        UsageError: an unknown model, keyword or weights, weights that cannot be fetched, or a factory without
            ``trust``.

    Example:
        >>> model = surgery.models.build("resnet50", num_classes=10, seed=0)
    """
    if is_weights_file(weights):
        built = build(source, num_classes=num_classes, trust=trust, seed=seed)
        load_weights_file(built, str(weights), what=repr(source))
        return built
    parsed = parse(source, num_classes=num_classes, weights=weights)
    with _seeded(seed):
        if parsed.prefix in LIBRARIES:
            module: nn.Module = open_library(parsed.prefix).build(parsed)
            return module
        if parsed.entry is None:
            return _from_factory(parsed, trust)
        if parsed.weights is None:
            return _call(parsed, {**parsed.entry.defaults, **parsed.keywords})
        return pretrained.build(parsed, parsed.entry, parsed.weights, _call)


def build_stored(source: str, where: str, *, trust: bool = False) -> nn.Module:
    """Build the model that a source in a file names. No weights are fetched, whatever it says.

    Args:
        source: as in `build`.
        where: the file, for errors.
        trust: as in `build`.

    Raises:
        UsageError: a factory without ``trust``.
        CheckpointError: any other source that cannot be built, or that names weights.

    Example:
        >>> module = build_stored("torchvision:resnet18?num_classes=10", "student/recipe.json")
    """
    try:
        _refuse_file(source)
        parsed = parse(source)
        if parsed.entry is not None and parsed.weights is not None:
            raise UsageError(f"{source!r} names weights to fetch, which a file may not")
        if parsed.entry is not None:
            return build(source)
    except UsageError as error:
        raise CheckpointError(f"{where}: 'source': {error}") from error
    return build(source, trust=trust)


def _refuse_file(source: str) -> None:
    """Refuse a source that would read another file; the canonical form of a configuration holds all of it."""
    prefix, _, rest = source.partition(":")
    name = rest.partition("?")[0]
    if prefix in LIBRARIES and not rest.startswith("{") and ("/" in name or "\\" in name or Path(name).exists()):
        raise UsageError(f"{source!r} names a file to read, which a file may not")


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        seed_generators(seed)
        yield


def _from_factory(source: Source, trust: bool) -> nn.Module:
    where = f"{source.prefix}:{source.name}"
    if not trust:
        raise UsageError(f"{where!r} would import and run code: pass trust=True (--trust) if you trust it")
    if source.weights is not None:
        raise UsageError(f"{where!r} is a factory of your own: load its weights in the factory, not by name")
    try:
        factory = getattr(import_module(source.prefix), source.name)
    except Exception as error:  # importing runs the module, which may raise anything
        raise UsageError(f"cannot import {where!r}: {error}") from error
    try:
        module = factory(**source.keywords)
    except SurgeryError:
        raise
    except Exception as error:  # it is someone else's code
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{where!r} cannot be called with {_describe(source.keywords)}: {reason}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{where!r} returned {type(module).__name__}, not an nn.Module")
    return module


def _describe(keywords: Mapping[str, Value]) -> str:
    return ", ".join(f"{k}={text(v)}" for k, v in keywords.items()) or "no arguments"


def _call(source: Source, keywords: Mapping[str, Any]) -> nn.Module:
    """Call the builder, then apply the keywords that torchvision's builders do not know."""
    fitnet = partial(build_fitnet, source.name)
    refuse_keywords(source)
    builder = fitnet if source.prefix == "fitnets" else cast(Callable[..., nn.Module], get_model_builder(source.name))
    keywords = dict(keywords)
    own = source.entry is not None and FROZEN_NORM in source.entry.pretrained
    eps = keywords.pop(FROZEN_NORM, None) if own else None
    refuse_too_large(source.name, builder, keywords)
    try:
        module = builder(**keywords)
    except UsageError:
        raise
    except Exception as error:  # numbers that make no layer fail wherever they are first computed with
        raise UsageError(
            f"model {source.name!r} cannot be built with {_describe(source.keywords)}: {_reason(error)}"
        ) from error
    if eps is not None:
        _freeze_norms(cast(nn.Module, module.backbone), eps)
    return module


def _reason(error: Exception) -> str:
    """What the error says, in one line; the name of its class where that is not said by the text."""
    said = " ".join(str(error).split())
    if isinstance(error, (TypeError, ValueError)) and said:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _freeze_norms(backbone: nn.Module, eps: float) -> None:
    """Freeze the norms of the backbone, as torchvision's detection builders do when they load published weights."""
    for path, norm in list(backbone.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(norm.num_features, eps=eps)
            frozen.load_state_dict(norm.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(backbone.get_submodule(parent), name, frozen)
