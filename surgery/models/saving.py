"""Saving and loading: a recipe as text and the weights as plain tensors.

A directory holds ``recipe.json`` (where the architecture comes from, the inputs it was traced with, what was done to
it) and ``weights.safetensors``. It holds no code, and loading executes none. Only steps
of the recipe can be replayed, so a module that was changed in another way is not saved.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from surgery.edit.apply import apply
from surgery.edit.recipe import Recipe, recipe
from surgery.errors import SurgeryError, UsageError
from surgery.folders import refuse_folder, staged_folder
from surgery.graph.structure import changes_since_seal, hooks
from surgery.graph.tracing import TensorSpec, info, inputs_like, trace, with_info
from surgery.models.building import build

RECIPE, WEIGHTS = "recipe.json", "weights.safetensors"


def save(module: nn.Module, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a traced module to a directory, all of it or nothing.

    Args:
        module: a traced module, operated on or not.
        directory: created with its parents; must not exist, or be empty.
        force: replace a saved model that is there; no other folder is ever replaced.

    Returns:
        the directory.

    Raises:
        UsageError: the module was not traced, what it computes was changed other than by steps (a hook, a
            parametrization, an edit of its graph, another layer), or the directory has something in it.

    Example:
        >>> surgery.save(slim, "student")
    """
    known = info(module)
    changed = changes_since_seal(module)
    if changed:
        more = f" (and {len(changed) - 1} more such changes)" if len(changed) > 1 else ""
        raise UsageError(
            f"the module was changed in a way that is not in its recipe and would be lost: {changed[0]}{more}. "
            "Undo it, make it before surgery.trace, or make it a surgery.Step"
        )
    target = Path(directory)
    force = force or (target.is_dir() and not any(target.iterdir()))
    refuse_folder(target, marker=RECIPE, force=force)
    modes = [n for n, m in module.named_modules() if m.training != module.training]
    content = {
        **recipe(module).to_dict(),
        "inputs": {"args": _encode(known.args), "kwargs": _encode(known.kwargs)},
        "training": module.training,
        "modes_other_than_training": modes,
        "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
        "hooks": hooks(module),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    with staged_folder(target, marker=RECIPE, force=force) as folder:
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in _tensors(module).items()}, folder / WEIGHTS)
        (folder / RECIPE).write_text(json.dumps(content, indent=1) + "\n")
    return target


def load(directory: str | os.PathLike[str], model: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
    """Rebuild what `save` wrote: the architecture from its source, the edits from the recipe, then the weights.

    Args:
        directory: where `save` wrote it.
        model: the architecture before `surgery.trace`, for a class of your own. Its weights do not matter.
        trust: allow a source of the form ``package.module:factory`` to be imported and called.

    Returns:
        The traced module, with its recipe, in the mode in which it was saved.

    Raises:
        UsageError: no saved model there, or an architecture that cannot be rebuilt without ``model``.
        SurgeryError: weights that do not fit the rebuilt architecture, or forward hooks that it lacks; names them.

    Example:
        >>> student = surgery.load("student")
    """
    source = Path(directory)
    content = _read_recipe(source)
    steps = Recipe.from_dict(content)
    with torch.random.fork_rng():
        if model is None:
            if steps.source is None:
                raise UsageError(f"{source} does not say where its architecture comes from: pass model=")
            model = build(steps.source, trust=trust)
        specs = _decode(content["inputs"]["args"]), _decode(content["inputs"]["kwargs"])
        args, kwargs = inputs_like(specs, model)
        traced = trace(model, args, kwargs=kwargs, source=steps.source)
        with_info(traced, args=specs[0], kwargs=specs[1])
        module = apply(traced, steps)
    if "hooks" in content and hooks(module) != content["hooks"]:
        raise SurgeryError(
            f"{source}: the saved model has the forward hooks {content['hooks']}, the rebuilt one {hooks(module)}: "
            "pass model= with the same hooks"
        )
    load_weights(module, source / WEIGHTS)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in content["frozen"])
    module.train(content["training"])
    for name in content["modes_other_than_training"]:
        module.get_submodule(name).training = not content["training"]
    return module


def _read_recipe(directory: Path) -> dict[str, Any]:
    path = directory / RECIPE
    if not path.is_file():
        raise UsageError(f"{directory} is not a saved model: it has no {RECIPE}")
    try:
        content = json.loads(path.read_text())
        if not {"inputs", "training", "modes_other_than_training", "frozen"} <= set(content):
            raise UsageError(f"{path} is not complete")
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    assert isinstance(content, dict)
    return content


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict and the buffers outside it, each shared tensor once, under its first name."""
    held = {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}
    first = {id(tensor): name for name, tensor in reversed(held.items())}
    return {name: tensor for name, tensor in held.items() if first[id(tensor)] == name}


def load_weights(module: nn.Module, path: Path) -> None:
    """Give a module the parameters and buffers that `save` wrote of one of the same structure, in place.

    Raises:
        UsageError: the file cannot be read.
        SurgeryError: weights that do not fit; names them.
    """
    wanted, known = _tensors(module), module.state_dict()
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            missing, extra = sorted(set(wanted) & set(known) - names), sorted(names - set(wanted))
            if missing or extra:
                raise SurgeryError(f"{path} does not fit its recipe: missing {missing[:4]}, unexpected {extra[:4]}")
            for name, tensor in wanted.items():
                if name not in names:  # a buffer outside the state dict, which older versions did not save
                    continue
                value = stored.get_tensor(name)
                if value.shape != tensor.shape:
                    raise SurgeryError(f"{path}: {name} is {tuple(value.shape)}, the model has {tuple(tensor.shape)}")
                tensor.data = value
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        few = {} if value.values is None else {"values": list(value.values)}
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), **few}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"an input of type {type(value).__name__} cannot be saved")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        values = tuple(value["values"]) if "values" in value else None
        return TensorSpec(tuple(value["tensor"]), getattr(torch, value["dtype"]), values)
    if "tuple" in value:
        return tuple(_decode(v) for v in value["tuple"])
    return {k: _decode(v) for k, v in value["dict"].items()}
