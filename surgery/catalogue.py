"""The models this package knows by name, as data, and the one way from a name to a module.

A *source* is text that says which architecture a model has: ``"resnet50"``, ``"torchvision:resnet50?num_classes=10"``
or ``"package.module:factory"``. It is what the command line takes and what a saved model keeps, so that its
architecture can be rebuilt from text alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

import torch
from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights

from surgery.errors import UsageError, unknown_name

Value = int | float | bool | str


class WeightsWarning(UserWarning):
    """Published weights were taken over only in part."""


@dataclass(frozen=True)
class Entry:
    """One builder of torchvision.

    ``input_size`` is the image size (channels, height, width) that the published weights are evaluated at. ``minimum``
    is the smallest square image, in pixels, that the model can be trained on with its default keywords. ``smallest`` is
    the smallest that is good for tests: its deepest feature map is at least 2 x 2, for with a batch of two and 1 x 1
    maps the batch statistics of a training pass are so ill-conditioned that float64 rounding alone moves a deep model's
    outputs.
    """

    name: str
    family: str
    input_size: tuple[int, int, int] = (3, 224, 224)
    smallest: int = 64
    minimum: int = 32
    notes: str = ""
    defaults: Mapping[str, Value] = field(default_factory=dict)
    """Builder keywords set unless the caller sets them."""
    pretrained: Mapping[str, Value] = field(default_factory=dict)
    """Builder keywords that the published weights need."""


def build(
    source: str,
    *,
    num_classes: int | None = None,
    weights: str | None = None,
    trust: bool = False,
    seed: int | None = None,
) -> nn.Module:
    """The module that ``source`` names, freshly initialised, in training mode.

    ``source`` is a name of the catalogue, optionally with the prefix ``torchvision:`` and a query of builder keywords
    (``resnet50?num_classes=10``), or ``package.module:factory``, which imports and calls your own code and so needs
    ``trust``. ``weights`` is ``"DEFAULT"`` or another name of torchvision's weights of the model; where
    ``num_classes`` or another keyword differs from theirs, entries whose shape fits are copied, and a `UserWarning`
    names the others. ``seed`` makes the initial values reproducible and leaves the global random state as it was.

    Raises `UsageError` for an unknown model, keyword or weights, and for weights that cannot be fetched.
    """
    parsed = parse(source, num_classes=num_classes, weights=weights)
    with _seeded(seed):
        if parsed.entry is None:
            return _from_factory(parsed, trust)
        if parsed.weights is None:
            return _call(parsed, {**parsed.entry.defaults, **parsed.keywords})
        return _with_weights(parsed, parsed.entry, parsed.weights)


def canonical(source: str, **keywords: Value | None) -> str:
    """``source`` in its one full form, ``torchvision:NAME?key=value``, with ``keywords`` added and sorted.

    The form describes the architecture and never its values: ``weights`` are replaced by the builder keywords that
    they imply. A keyword that is None is left out.
    """
    parsed = parse(source, **keywords)
    implied = parsed.entry.pretrained if parsed.entry and parsed.weights else {}
    query = urlencode({k: _text(v) for k, v in sorted({**implied, **parsed.keywords}.items())})
    return f"{parsed.prefix}:{parsed.name}" + (f"?{query}" if query else "")


def example_inputs(source: str, batch_size: int = 2, image_size: int | None = None) -> Tensor:
    """Random images (batch_size, 3, image_size, image_size) for ``source``, the same at every call.

    ``image_size`` is in pixels, by default the catalogue's. A factory of your own has no default, so it needs one.
    """
    entry = parse(source).entry
    if image_size is not None:
        shape: tuple[int, ...] = (3, image_size, image_size)
    elif entry is not None:
        shape = entry.input_size
    else:
        raise UsageError(f"the input size of {source!r} is not known: pass image_size (--input-shape)")
    return torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Source:
    """A source taken apart; ``entry`` is None for a factory of the user's own."""

    prefix: str
    name: str
    entry: Entry | None
    keywords: Mapping[str, Value]
    weights: str | None


def parse(source: str, **keywords: Value | None) -> Source:
    """``source`` taken apart, with ``keywords`` laid over its own; raises `UsageError` where it names nothing."""
    path, _, query = source.partition("?")
    prefix, _, name = path.rpartition(":")
    merged: dict[str, Any] = {k: _value(v) for k, v in parse_qsl(query, keep_blank_values=True)}
    merged |= {k: v for k, v in keywords.items() if v is not None}
    weights = merged.pop("weights", None)
    if isinstance(weights, str) and weights.lower() == "none":
        weights = None
    if prefix not in ("", "torchvision"):
        return Source(prefix, name, None, merged, weights)
    if name not in CATALOGUE:
        raise unknown_name("model", name, CATALOGUE)
    return Source("torchvision", name, CATALOGUE[name], merged, weights)


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _from_factory(source: Source, trust: bool) -> nn.Module:
    where = f"{source.prefix}:{source.name}"
    if not trust:
        raise UsageError(f"{where!r} would import and run code: pass trust=True (--trust) if you trust it")
    if source.weights is not None:
        raise UsageError(f"{where!r} is a factory of your own: load its weights in the factory, not by name")
    try:
        factory = getattr(import_module(source.prefix), source.name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot import {where!r}: {error}") from error
    try:
        module = factory(**source.keywords)
    except TypeError as error:
        raise UsageError(f"{where!r} cannot be called with {_described(source.keywords)}: {error}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{where!r} returned {type(module).__name__}, not an nn.Module")
    return module


def _described(keywords: Mapping[str, Value]) -> str:
    return ", ".join(f"{k}={_text(v)}" for k, v in keywords.items()) or "no arguments"


def _call(source: Source, keywords: Mapping[str, Any]) -> nn.Module:
    builder = cast(Callable[..., nn.Module], get_model_builder(source.name))
    try:
        return builder(**keywords)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"model {source.name!r} cannot be built with {_described(source.keywords)}: {error}"
        ) from error


def _with_weights(source: Source, entry: Entry, name: str) -> nn.Module:
    """The published weights in the architecture asked for.

    torchvision's builder makes the donor, since some families rename the entries of their files on loading.
    """
    known = get_model_weights(source.name)
    if name not in known.__members__:
        raise unknown_name(f"weights of {source.name!r}", name, known.__members__)
    published = known[name]
    _fetch(source.name, published)
    keywords = {**entry.pretrained, **source.keywords}
    of_donor = {k: v for k, v in keywords.items() if k != "num_classes"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="auxiliary heads in the pretrained")
        donor = _call(source, {**of_donor, "weights": published, "progress": False})
    if keywords.get("num_classes", len(published.meta["categories"])) == len(published.meta["categories"]):
        return donor
    module = _call(source, {**entry.defaults, **keywords})
    skipped = _copy_matching(donor, module)
    if skipped:
        warnings.warn(
            f"{source.name}: the published weights do not fit, and initial values stay, in: {', '.join(skipped)}",
            WeightsWarning,
            stacklevel=3,
        )
    return module


def _fetch(name: str, published: Any) -> None:
    """Put the file of the weights into torch's hub cache, where torchvision's builder then finds it."""
    url = cast(str, published.url)
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    digest = file.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix=digest, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # no network, no such file, no space; another file than was published
        reason = getattr(error, "reason", None) or error
        raise UsageError(
            f"cannot fetch the weights of {name!r} from {url} ({reason}): pass weights none, or put the file at {file}"
        ) from error


def _copy_matching(donor: nn.Module, module: nn.Module) -> list[str]:
    """Copy each entry whose shape fits; the names of the module's entries that had none."""
    given = donor.state_dict()
    own = module.state_dict()
    fitting = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(fitting, strict=False)
    return [k for k in own if k not in fitting]


def _rows() -> Iterator[Entry]:
    """One row a builder; a family's shared facts are said once."""
    names: Callable[[str], list[str]] = str.split
    yield Entry("alexnet", "AlexNet", minimum=64)
    for depth in (11, 13, 16, 19):
        yield Entry(f"vgg{depth}", "VGG")
        yield Entry(f"vgg{depth}_bn", "VGG")
    for name in names("resnet18 resnet34 resnet50 resnet101 resnet152"):
        yield Entry(name, "ResNet")
    for name in names("resnext50_32x4d resnext101_32x8d resnext101_64x4d"):
        yield Entry(name, "ResNeXt")
    for name in names("wide_resnet50_2 wide_resnet101_2"):
        yield Entry(name, "Wide ResNet")
    for name in names("squeezenet1_0 squeezenet1_1"):
        yield Entry(name, "SqueezeNet")
    for name in names("densenet121 densenet161 densenet169 densenet201"):
        yield Entry(name, "DenseNet")
    yield Entry(
        "googlenet",
        "GoogLeNet",
        notes="two auxiliary heads in training",
        defaults={"init_weights": True},
        pretrained={"transform_input": True, "aux_logits": False},
    )
    yield Entry(
        "inception_v3",
        "Inception v3",
        input_size=(3, 299, 299),
        smallest=299,
        minimum=299,
        notes="one auxiliary head in training, which needs 299 pixels; with aux_logits=false 75 are enough",
        defaults={"init_weights": True},
        pretrained={"transform_input": True},
    )
    yield Entry("mobilenet_v2", "MobileNet v2")
    for name in names("mobilenet_v3_small mobilenet_v3_large"):
        yield Entry(name, "MobileNet v3")
    for name in names("mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3"):
        yield Entry(name, "MNASNet")
    for number, size in enumerate((224, 240, 288, 300, 380, 456, 528, 600)):
        yield Entry(f"efficientnet_b{number}", "EfficientNet", (3, size, size))
    for letter, size in (("s", 384), ("m", 480), ("l", 480)):
        yield Entry(f"efficientnet_v2_{letter}", "EfficientNet v2", (3, size, size))
    for name in names("x_400mf x_800mf x_1_6gf x_3_2gf x_8gf x_16gf x_32gf"):
        yield Entry(f"regnet_{name}", "RegNet")
    for name in names("y_400mf y_800mf y_1_6gf y_3_2gf y_8gf y_16gf y_32gf"):
        yield Entry(f"regnet_{name}", "RegNet")
    yield Entry("regnet_y_128gf", "RegNet", (3, 384, 384))
    for name in names("x0_5 x1_0 x1_5 x2_0"):
        yield Entry(f"shufflenet_v2_{name}", "ShuffleNet v2")


CATALOGUE: Mapping[str, Entry] = {entry.name: entry for entry in _rows()}
