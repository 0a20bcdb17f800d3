"""Options that several verbs share, and the models they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import nn

from surgery import models as catalogue
from surgery.errors import UsageError, unknown_name
from surgery.graph.tracing import example_inputs, trace
from surgery.models.checkpoint import RECIPE, load

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A torchvision name, with builder keywords if you like (resnet18?num_classes=10), a saved folder, or "
        "package.module:factory with --trust.",
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        metavar="N,C,H,W",
        help="Shape of the example input; N,C,T,H,W for videos. [default: 2 samples of the model's own size]",
    ),
]
Weights = Annotated[str, typer.Option(metavar="NAME", help="torchvision's weights: none, DEFAULT or one by name.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random, initial weights included.")]
Threads = Annotated[int | None, typer.Option(help="Threads of one query. [default: all usable cores]")]
Trust = Annotated[bool, typer.Option("--trust", help="Allow package.module:factory to be imported and called.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what --out names, if it was made by this command.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]

Dataset = Annotated[str, typer.Option(metavar="DATA", help="mnist5k, digits, torchvision:NAME or imagefolder:DIR.")]
DataRoot = Annotated[Path | None, typer.Option(metavar="DIR", help="Where torchvision's data sets are kept.")]
ImageSize = Annotated[int | None, typer.Option(help="Side in pixels. [default: the data's own]")]
Limit = Annotated[int | None, typer.Option(help="Use so many training and test images at most.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")]

EXACT = 1e-10
"""Relative difference, in float64, up to which two models compute the same: rounding is 1e-15 to 1e-13."""

T = TypeVar("T")


def open_model(
    source: str,
    *,
    input_shape: str | None = None,
    inputs: Any = None,
    weights: str = "none",
    seed: int = 0,
    trust: bool = False,
) -> nn.Module:
    """The traced module that ``source`` names, in evaluation mode, for inputs of a shape or for those given."""
    if is_saved(source):
        if input_shape is not None:
            raise UsageError(f"{source} remembers its input shape: --input-shape is for a model that is built anew")
        return load(source, trust=trust).eval()
    module = catalogue.build(source, weights=weights, trust=trust, seed=seed).eval()
    architecture = catalogue.canonical(source, weights=weights)
    if inputs is None and input_shape is not None:
        inputs = catalogue.inputs_of_shape(architecture, parse_shape(input_shape))
    elif inputs is None:
        inputs = catalogue.example_inputs(architecture)
    return trace(module, inputs, source=architecture)


def open_pair(
    first: str, second: str, *, input_shape: str | None, weights: str, seed: int, trust: bool
) -> tuple[nn.Module, nn.Module]:
    """Two models for the same inputs: those a saved one remembers, or else as `open_model` has them."""
    if is_saved(second) and not is_saved(first):
        opened = open_pair(second, first, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
        return opened[1], opened[0]
    one = open_model(first, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    if is_saved(second):
        return one, open_model(second, trust=trust)
    inputs, _ = example_inputs(one)
    return one, open_model(second, inputs=inputs, weights=weights, seed=seed, trust=trust)


def is_saved(source: str) -> bool:
    """Whether ``source`` is a folder that `surgery.save` wrote; a path that is none is a `UsageError`."""
    path = Path(source)
    if path.is_dir():
        if not (path / RECIPE).is_file():
            raise UsageError(f"{source} is not a saved model: it has no {RECIPE}")
        return True
    if source.endswith(".py") or (".py:" in source and Path(source.rpartition(":")[0]).is_file()):
        raise UsageError(
            f"{source} names a Python file: a model of your own is given as package.module:factory, with --trust, here "
            f"as {path.name.partition('.py')[0]}:NAME for the function or class that makes it"
        )
    if path.is_file() and source not in {**catalogue.CATALOGUE, **catalogue.FITNETS}:
        raise UsageError(
            f"{source} is a file, and a saved model is a folder; only bench takes files, and these end in .onnx"
        )
    if len(path.parts) > 1 or source.endswith(("/", "\\")):
        raise UsageError(f"there is no saved model at {source}")
    return False


def parse_device(name: str) -> torch.device:
    """``"auto"``, ``"cpu"`` or ``"cuda"`` as a device that there is."""
    if name not in ("auto", "cpu", "cuda"):
        raise unknown_name("device", name, ("auto", "cpu", "cuda"))
    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise UsageError("--device cuda: there is no GPU here that torch can use")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def parse_shape(text: str) -> list[int]:
    """``"2,3,64,64"`` as numbers."""
    try:
        shape = [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        shape = []
    if len(shape) < 2 or min(shape) < 1:
        raise UsageError(f"input shape {text!r} is not of the form N,C,H,W, as in 2,3,64,64")
    return shape


def one_or_per_layer(
    option: str, items: Sequence[str], whole: Callable[[str], T], part: Callable[[str], T]
) -> T | dict[str, T]:
    """``["0.5"]`` as one value for the whole model, ``["layer3=0.5", "fc=0.25"]`` as one for each name."""
    if len(items) > 1 or "=" in items[0]:
        return per_layer(option, items, part)
    try:
        return whole(items[0])
    except ValueError:
        raise UsageError(f"{option} {items[0]!r} is neither a number nor of the form LAYER=NUMBER") from None


def per_layer(option: str, items: Sequence[str], part: Callable[[str], T]) -> dict[str, T]:
    """``["layer3=2", "fc=1"]`` as a value for each name."""
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


def int_or_float(text: str) -> int | float:
    """A whole number as int, any other number as float."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def kernel_size(text: str | None) -> int | list[int] | None:
    """``"3"`` as one size for every direction, ``"1,7"`` as one for each."""
    try:
        sizes = None if text is None else [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        raise UsageError(f"--kernel {text!r} is neither a number nor of the form 1,7") from None
    return sizes[0] if sizes is not None and len(sizes) == 1 else sizes


def numbers(option: str, text: str) -> list[float]:
    """``"1.0,0.5"`` as a list of numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers, as in 1.0,0.5,0.25") from None


def refuse_if_taken(path: Path, force: bool) -> None:
    """Raise `UsageError` for a file that exists, unless ``force``; before any work is done for it."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists: choose another file, or replace it with --force")
