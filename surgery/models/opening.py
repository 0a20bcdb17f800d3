"""From text to a traced module: a name of the catalogue, a saved folder or a factory of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import SurgeryError, UsageError
from surgery.graph import tracing
from surgery.models.building import build
from surgery.models.catalogue import CATALOGUE
from surgery.models.examples import example_inputs, inputs_of_shape
from surgery.models.fitnets import FITNETS
from surgery.models.libraries import LIBRARIES
from surgery.models.saving import RECIPE, load
from surgery.models.sources import canonical, is_weights_file
from surgery.models.weights_file import load_weights_file


def open_model(
    source: str,
    *,
    input_shape: Sequence[int] | None = None,
    inputs: Any = None,
    weights: str | None = None,
    seed: int | None = None,
    trust: bool = False,
    allow_changed_weights: bool = False,
) -> nn.Module:
    """Open a model by its name or folder, as the command line does.

    Args:
        source: a name of the catalogue with builder keywords, a model of a library (``hf:bert?num_hidden_layers=2``), a
            folder that `surgery.save` wrote, or ``package.module:factory``.
        input_shape: of the example input, (N, channels, height, width) or (N, channels, frames, height, width), or
            (N, length) of token numbers; by default 2 samples of the model's own size, or as a saved model was traced.
        inputs: example inputs, as `surgery.trace` takes them, instead of random ones.
        weights: the name of published weights, or ``"DEFAULT"``; or a file, as in `surgery.models.build`, for a saved
            model too.
        seed: of the initial weights.
        trust: allow ``package.module:factory`` to be imported and called.
        allow_changed_weights: of a saved model, as in `surgery.load`.

    Returns:
        a traced module in evaluation mode.

    Raises:
        UsageError: no such model or folder, an input it does not take, or a factory without ``trust``.

    Example:
        >>> traced = surgery.models.open_model("resnet18?num_classes=10", input_shape=(2, 3, 32, 32))
    """
    if is_saved(source):
        saved = load(source, trust=trust, allow_changed_weights=allow_changed_weights).eval()
        give_weights(saved, weights, what=source)
        return saved if input_shape is None else _with_shape(saved, tuple(input_shape), source)
    module = build(source, weights=weights, trust=trust, seed=seed).eval()
    architecture = canonical(source, weights=weights)
    if inputs is None and input_shape is not None:
        inputs = inputs_of_shape(architecture, input_shape)
    elif inputs is None:
        inputs = example_inputs(architecture)
    return tracing.trace(module, inputs, source=architecture)


def open_pair(
    first: str,
    second: str,
    *,
    input_shape: Sequence[int] | None = None,
    weights: str | None = None,
    seed: int | None = None,
    trust: bool = False,
    allow_changed_weights: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Open two models for the same inputs: those of the saved one, or else those of the first.

    Args:
        first, second: sources, as in `open_model`, like the other arguments.

    Returns:
        two traced modules in evaluation mode.

    Raises:
        UsageError: as in `open_model`.

    Example:
        >>> dense, slim = surgery.models.open_pair("resnet18", "slim/")
    """
    opening: dict[str, Any] = {"trust": trust, "allow_changed_weights": allow_changed_weights}
    building: dict[str, Any] = {"weights": weights, "seed": seed, **opening}
    if is_saved(second) and not is_saved(first):
        opened = open_pair(second, first, input_shape=input_shape, **building)
        return opened[1], opened[0]
    named = not is_saved(second)
    own = None if named and is_saved(first) else weights  # weights are for a model by name, where there is one
    one = open_model(first, input_shape=input_shape, **{**building, "weights": own})
    if not named:
        return one, open_model(second, **opening)
    inputs, _ = tracing.example_inputs(one)
    return one, open_model(second, inputs=inputs, **building)


def give_weights(module: nn.Module, weights: str | None, *, what: str) -> None:
    """Put a file of weights into a module that has weights already, in place.

    Args:
        weights: a file, as in `surgery.models.build`; nothing happens for None and ``"none"``.
        what: the name of the module in messages.

    Raises:
        UsageError: a file that does not fit, or the name of published weights.
    """
    if is_weights_file(weights):
        load_weights_file(module, str(weights), what=what)
    elif weights is not None and weights.lower() != "none":
        raise UsageError(f"{what} has weights of its own: published weights ({weights}) are for models by name")


def _with_shape(module: nn.Module, shape: tuple[int, ...], what: str) -> nn.Module:
    """Remember another shape of the one input, once the model has run on it."""
    known = tracing.info(module)
    spec = known.args[0] if len(known.args) == 1 and not known.kwargs else None
    if not isinstance(spec, tracing.TensorSpec) or spec.values is not None or len(spec.shape) != len(shape):
        raise UsageError(f"{what} was traced with other inputs than one tensor of {len(shape)} axes")
    changed = replace(spec, shape=shape)
    args, _ = tracing.inputs_like(((changed,), {}), module)
    try:
        with torch.no_grad():
            module(*args)
    except (RuntimeError, ValueError, SurgeryError) as error:
        raise UsageError(f"{what} does not take inputs of shape {shape}: {str(error).splitlines()[0]}") from error
    tracing.with_info(module, args=(changed,))
    return module


def is_saved(source: str) -> bool:
    """Tell whether ``source`` is a folder that `surgery.save` wrote.

    Returns:
        False for a name of the catalogue and for ``package.module:factory``.

    Raises:
        UsageError: a path to anything but a saved model; the message says what to pass instead.
    """
    if source.partition(":")[0] in LIBRARIES:
        return False
    path = Path(source)
    if path.is_dir():
        if not (path / RECIPE).is_file():
            raise UsageError(f"{source} is not a saved model: it has no {RECIPE}")
        return True
    if source.endswith(".py") or (".py:" in source and Path(source.rpartition(":")[0]).is_file()):
        raise UsageError(
            f"{source} names a Python file: pass a model of your own as package.module:factory, with trust=True "
            f"(--trust), here as {path.name.partition('.py')[0]}:NAME for the function or class that makes it"
        )
    if path.is_file() and source not in {**CATALOGUE, **FITNETS}:
        raise UsageError(
            f"{source} is a file, and a saved model is a folder; only bench takes files, and these end in .onnx"
        )
    if len(path.parts) > 1 or source.endswith(("/", "\\")):
        raise UsageError(f"there is no saved model at {source}")
    return False
