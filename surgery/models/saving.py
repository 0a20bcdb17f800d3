"""Saving and loading: a recipe as text and the weights as plain tensors.

A directory holds ``recipe.json`` (where the architecture comes from, the inputs it was traced with, what was done to
it) and ``weights.safetensors``. It holds no code, and loading executes none. Only steps
of the recipe can be replayed, so a module that was changed in another way is not saved.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from surgery.edit.apply import carry_out
from surgery.edit.recipe import Recipe, recipe, refuse_large
from surgery.edit.step import Step
from surgery.errors import CheckpointError, SurgeryError, UsageError
from surgery.graph.structure import changes_since_seal, hooks
from surgery.graph.tracing import info, inputs_like, trace, with_info
from surgery.models.building import build_stored
from surgery.models.saved import (
    RECIPE,
    WEIGHTS,
    SavedRecipe,
    SignedRecipe,
    check_tensors,
    check_weights,
    decode_inputs,
    describe_tensors,
    encode_input,
    read_recipe,
)
from surgery.storage.documents import digest_file, refuse_long, refuse_special, sign
from surgery.storage.folders import file_mode, refuse_folder, staged_folder

__all__ = ["RECIPE", "WEIGHTS", "load", "load_weights", "save"]


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
    tensors = _tensors(module)
    content = {
        **recipe(module).to_dict(),
        "inputs": {"args": encode_input(known.args), "kwargs": encode_input(known.kwargs)},
        "training": module.training,
        "modes_other_than_training": modes,
        "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
        "hooks": hooks(module),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "tensors": describe_tensors(tensors),
    }
    refuse_large(content["steps"])
    with staged_folder(target, marker=RECIPE, force=force) as folder, _full_disks(folder / WEIGHTS):
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(file_mode())  # safetensors lets no other user read what it writes
        text = json.dumps(sign({**content, "weights": digest_file(folder / WEIGHTS)}), indent=1) + "\n"
        refuse_long(text, f"the recipe of {target}")
        (folder / RECIPE).write_text(text)
    return target


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    trust: bool = False,
    allow_changed_weights: bool = False,
) -> nn.Module:
    """Rebuild what `save` wrote: the architecture from its source, the edits from the recipe, then the weights.

    The folder is checked before anything is built: its recipe and its weights are those that were saved together.

    Args:
        directory: where `save` wrote it.
        model: the architecture before `surgery.trace`, for a class of your own. Its weights do not matter.
        trust: allow a source of the form ``package.module:factory`` to be imported and called.
        allow_changed_weights: take a weights file that was trained further elsewhere: the same tensors in the same
            shapes and dtypes, with other values.

    Returns:
        The traced module, with its recipe, in the mode and the memory format in which it was saved.

    Raises:
        UsageError: no saved model there, or an architecture that cannot be rebuilt without ``model``.
        CheckpointError: a file is malformed, or was changed since it was saved; names the file and the field.
        SurgeryError: weights that do not fit the rebuilt architecture, or forward hooks that it lacks; names them.

    Example:
        >>> student = surgery.load("student")
    """
    source = Path(directory)
    content = read_recipe(source)
    where = str(source / RECIPE)
    steps = _read_steps(content, where)
    specs = decode_inputs(content.inputs, where)
    check_weights(source, content, allow_changed=allow_changed_weights)
    with torch.random.fork_rng():
        if model is None:
            if steps.source is None:
                raise UsageError(f"{source} does not say where its architecture comes from: pass model=")
            model = build_stored(steps.source, where, trust=trust)
        with _replaying([f"{where}: 'inputs'"]):
            args, kwargs = inputs_like(specs, model)
        traced = trace(model, args, kwargs=kwargs, source=steps.source)
        with_info(traced, args=specs[0], kwargs=specs[1])
        module = _replay(traced, steps, where)
    if content.hooks is not None and hooks(module) != content.hooks:
        raise SurgeryError(
            f"{source}: the saved model has the forward hooks {content.hooks}, the rebuilt one {hooks(module)}: "
            "pass model= with the same hooks"
        )
    check_tensors(_tensors(module), content, source / RECIPE)
    load_weights(module, source / WEIGHTS)
    _lay_out(module, content)
    _set_modes(module, content, where)
    return module


def _read_steps(content: SavedRecipe, where: str) -> Recipe:
    try:
        return Recipe.from_dict({"schema": content.schema, "source": content.source, "steps": content.steps})
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _replay(traced: nn.Module, steps: Recipe, where: str) -> nn.Module:
    """Carry out the steps of a file, which nobody has planned for this model if the file is damaged."""
    at = [where]

    def begin(number: int, step: Step) -> None:
        at[0] = f"{where}: step {number} ({type(step).__name__})"

    with _replaying(at):
        return carry_out(traced, steps.steps, begin)


@contextmanager
def _replaying(at: Sequence[str]) -> Iterator[None]:
    """Say of an error where in the file its cause is: at ``at[0]``."""
    try:
        yield
    except Exception as error:  # values that no operation has planned make torch and Python raise what they like
        said = str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{at[0]} cannot be carried out: {said}") from error


def _lay_out(module: nn.Module, content: SavedRecipe) -> None:
    """Give tensors the memory format that they had."""
    if not isinstance(content, SignedRecipe):
        return
    for name, tensor in _tensors(module).items():
        if content.tensors[name].channels_last:
            last = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
            tensor.data = tensor.data.contiguous(memory_format=last)


def _set_modes(module: nn.Module, content: SavedRecipe, where: str) -> None:
    parameters, parts = dict(module.named_parameters()), dict(module.named_modules())
    for field, names, known in (
        ("frozen", content.frozen, parameters),
        ("modes_other_than_training", content.modes_other_than_training, parts),
    ):
        absent = [name for name in names if name not in known]
        if absent:
            raise CheckpointError(f"{where}: {field!r}: the model has no {absent[0]!r}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in content.frozen)
    module.train(content.training)
    for name in content.modes_other_than_training:
        parts[name].training = not content.training


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict and the buffers outside it, each shared tensor once, under its first name."""
    held = {**module.state_dict(keep_vars=True), **dict(module.named_buffers())}
    first = {id(tensor): name for name, tensor in reversed(held.items())}
    return {name: tensor for name, tensor in held.items() if first[id(tensor)] == name}


def load_weights(module: nn.Module, path: Path) -> None:
    """Give a module the parameters and buffers that `save` wrote of one of the same structure, in place.

    Raises:
        CheckpointError: the file cannot be read.
        SurgeryError: weights that do not fit; names them.
    """
    wanted, known = _tensors(module), module.state_dict()
    refuse_special(path)
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            missing, extra = sorted(set(wanted) & set(known) - names), sorted(names - set(wanted))
            if missing or extra:
                raise SurgeryError(f"{path} does not fit its recipe: missing {missing[:4]}, unexpected {extra[:4]}")
            for name, tensor in wanted.items():
                if name not in names:  # a buffer outside the state dict, which older versions did not save
                    continue
                shape = tuple(stored.get_slice(name).get_shape())
                if shape != tuple(tensor.shape):
                    raise SurgeryError(f"{path}: {name} is {shape}, the model has {tuple(tensor.shape)}")
                tensor.data = stored.get_tensor(name).clone()  # not a part of the file, which may change
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


@contextmanager
def _full_disks(path: Path) -> Iterator[None]:
    """Make of what safetensors raises where a file cannot be written what Python would."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
