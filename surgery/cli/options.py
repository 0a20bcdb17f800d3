"""Options that several verbs share, and what their texts mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

import surgery
from surgery.cli.config import Config
from surgery.errors import UsageError, unknown_name
from surgery.settings import Settings, option
from surgery.storage.folders import refuse_file
from surgery.units import LIMITS

if TYPE_CHECKING:
    import torch
    from torch import nn


def complete_model(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the models whose names begin so, with their families, for the shell's completion."""
    for name, entry in {**surgery.models.CATALOGUE, **surgery.models.FITNETS}.items():
        if name.startswith(incomplete):
            yield name, entry.family


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A torchvision name, with builder keywords if you like (resnet18?num_classes=10), hf:CONFIG or hf:DIR of "
        "transformers, timm:NAME, a saved folder, or package.module:factory with --trust.",
        autocompletion=complete_model,
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        metavar="N,C,H,W",
        help="Shape of the example input; N,C,T,H,W for videos, N,L for tokens. "
        "[default: 2 samples of the model's own size]",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="torchvision's weights (none, DEFAULT or one by name), or a .safetensors or .pth file.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of everything random, initial weights included.")]
Trust = Annotated[bool, typer.Option("--trust", help="Allow package.module:factory to be imported and called.")]
ChangedWeights = Annotated[
    bool,
    typer.Option(
        "--allow-changed-weights",
        help="Load a saved folder whose weights were trained further elsewhere: of the same shapes and dtypes.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what --out names, if it was made by this command.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]

OutputNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="What the model returns whose channels may change: free for all of it; or, as often as you like, the NAME "
        "of an output. [default: none]",
    ),
]

Dataset = Annotated[str, typer.Option(metavar="DATA", help="mnist5k, digits, torchvision:NAME or imagefolder:DIR.")]

EXACT = 1e-10
"""Relative difference, in float64, up to which two models compute the same: rounding is 1e-15 to 1e-13."""

T = TypeVar("T")


def name_outputs(names: Sequence[str] | None) -> str | Sequence[str] | None:
    """Tell ``free``, given alone, from names."""
    return names[0] if names and len(names) == 1 else names


@dataclass(frozen=True)
class Opening:
    """How a verb opens the models that it is given."""

    input_shape: InputShape = None
    weights: Weights = "none"
    seed: Seed = 0
    trust: Trust = False
    allow_changed_weights: ChangedWeights = False

    def open(self, source: str) -> nn.Module:
        """Open one model, as `surgery.models.open_model` does."""
        return surgery.models.open_model(source, **self._keywords)

    def open_all(self, sources: Sequence[str]) -> dict[str, nn.Module]:
        """Open several models; weights are for those by name, and for saved ones only where there is no other."""
        saved = [source for source in sources if surgery.models.is_saved(source)]
        alone = replace(self, weights="none") if len(saved) < len(sources) else self
        return {source: (alone if source in saved else self).open(source) for source in sources}

    def open_pair(self, first: str, second: str) -> tuple[nn.Module, nn.Module]:
        """Open two models for the same inputs."""
        return surgery.models.open_pair(first, second, **self._keywords)

    @property
    def _keywords(self) -> dict[str, Any]:
        shape = None if self.input_shape is None else parse_shape(self.input_shape)
        return {
            "input_shape": shape,
            "weights": self.weights,
            "seed": self.seed,
            "trust": self.trust,
            "allow_changed_weights": self.allow_changed_weights,
        }


@dataclass(frozen=True, kw_only=True)
class DataOptions(Settings):
    """The data set that a verb reads: what `surgery.data_for` takes."""

    dataset: Dataset
    image_size: int | None = option(None, "Side in pixels. [default: the data's own]", least=1)
    data_root: Path | None = option(None, "Where torchvision's data sets are kept.", metavar="DIR")
    limit: int | None = option(None, "Use so many training and test images at most.")
    skip_bad: bool = option(False, "Leave out images that cannot be read.", result=False)
    strict: bool = option(False, "Identify data by the content of every file, not by size and date.", result=False)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a verb that trains computes, and what it writes."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")]
    config: Config = None
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto"
    trust: Trust = False
    allow_changed_weights: ChangedWeights = False
    force: Force = False
    as_json: AsJson = False


def load_if_saved(source: str, run: RunOptions) -> str | nn.Module:
    """Load a saved folder; return any other source as it is."""
    if not surgery.models.is_saved(source):
        return source
    return surgery.load(source, trust=run.trust, allow_changed_weights=run.allow_changed_weights)


def refuse_untrained(role: str, source: str, weights: str, *, epochs: str, because: str) -> None:
    """Raise `UsageError` for a model of the catalogue without published weights; the user's own may load its weights.

    Args:
        role: ``"model"`` or ``"teacher"``.
        epochs: the option that trains it, with a number.
        because: why random weights are of no use.
    """
    if surgery.models.is_saved(source) or surgery.models.is_weights_file(weights):
        return
    parsed = surgery.models.parse(source, weights=weights)
    if parsed.entry is not None and parsed.weights is None:
        option = "--weights" if role == "model" else f"--{role}-weights"
        raise UsageError(
            f"the {role} {source!r} has random weights, {because}: train it first ({epochs}), take published weights "
            f"({option} DEFAULT), or pass a saved folder"
        )


def parse_device(name: str) -> torch.device:
    """Parse ``"auto"``, ``"cpu"`` or ``"cuda"`` to a device that exists."""
    if name not in ("auto", "cpu", "cuda"):
        raise unknown_name("device", name, ("auto", "cpu", "cuda"))
    import torch

    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise UsageError("--device cuda: there is no GPU here that torch can use")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def parse_shape(text: str) -> list[int]:
    """Parse a shape, ``"2,3,64,64"``."""
    try:
        shape = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        shape = []
    if len(shape) < 2 or min(shape) < 1:
        raise UsageError(f"input shape {text!r} is not of the form N,C,H,W, as in 2,3,64,64")
    return shape


def parse_one_or_per_layer(
    option: str, items: Sequence[str], whole: Callable[[str], T], part: Callable[[str], T]
) -> T | dict[str, T]:
    """Parse ``["0.5"]`` to one value for the whole model, ``["layer3=0.5", "fc=0.25"]`` to one for each name."""
    if len(items) > 1 or "=" in items[0]:
        return parse_per_layer(option, items, part)
    try:
        return whole(items[0])
    except ValueError:
        raise UsageError(f"{option} {items[0]!r} is neither a number nor of the form LAYER=NUMBER") from None


def parse_per_layer(option: str, items: Sequence[str], part: Callable[[str], T]) -> dict[str, T]:
    """Parse ``["layer3=2", "fc=1"]`` to a value for each name."""
    values = {}
    for item in items:
        name, _, text = item.rpartition("=")
        if name in values:
            raise UsageError(f"{option}: {name!r} is given more than once")
        try:
            values[name] = part(text)
        except ValueError:
            name = ""
        if not name:
            what = "COUNT, a whole number" if part is int else "NUMBER"
            raise UsageError(f"{option} {item!r} is not of the form LAYER={what}")
    return values


def parse_number(text: str) -> int | float:
    """Parse a whole number to an int, any other number to a float."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def parse_kernel(text: str | None) -> int | list[int] | None:
    """Parse ``"3"`` to one size for every direction, ``"1,7"`` to one for each."""
    try:
        sizes = None if text is None else [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        raise UsageError(f"--kernel {text!r} is neither a number nor of the form 1,7") from None
    return sizes[0] if sizes is not None and len(sizes) == 1 else sizes


def parse_numbers(option: str, text: str) -> list[float]:
    """Parse a list of numbers, ``"1.0,0.5"``."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers, as in 1.0,0.5,0.25") from None


def find_budget(options: Settings) -> tuple[str, str] | None:
    """Return the one budget that is given among some options, and its text; None if there is none.

    Raises:
        UsageError: there are several.
    """
    found = {what: text for what, text in vars(options).items() if what in LIMITS and text}
    if len(found) > 1:
        raise UsageError(
            f"{' and '.join(f'--{what}' for what in found)} are budgets of different kinds: give the one that counts, "
            "then see what the result takes of the others"
        )
    return next(iter(found.items()), None)


def refuse_if_taken(path: Path, force: bool) -> None:
    """Raise `UsageError` for a file that exists, unless ``force``. Called before any work is done."""
    refuse_file(path, force=force)
