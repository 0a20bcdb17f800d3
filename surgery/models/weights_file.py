"""Trained weights in a file of the user's own, put into a model whose entries they must match one by one."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery.errors import UsageError
from surgery.models.sources import WEIGHTS_ENDINGS, is_weights_file

_INSIDE = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params", "model_ema")
"""What trainers call the weights in a checkpoint that holds other things too, the more telling names first."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What wrappers put before every name: DataParallel, torch.compile, Lightning and others."""

_SHOWN = 5


def load_weights_file(module: nn.Module, path: str | Path, *, what: str = "the model") -> None:
    """Put the weights of a file into a module, in place, every entry and no other.

    Args:
        module: the model that the weights were trained in, before or after edits.
        path: a ``.safetensors`` file, or one of `torch.save` with tensors only (it is never unpickled as code). A
            checkpoint may hold the state dict under a usual name, such as ``"state_dict"`` or ``"model"``, and each
            name may have a wrapper's prefix, such as ``"module."``.
        what: the name of the model in messages.

    Raises:
        UsageError: the file cannot be read or holds no state dict; entries that are missing, unexpected, or of another
            shape. The message lists them.

    Example:
        >>> load_weights_file(model, "best.pth")
    """
    path = Path(path)
    if not is_weights_file(path):
        raise UsageError(f"{path} is no file of weights by its ending: {', '.join(WEIGHTS_ENDINGS)}")
    own = module.state_dict()
    given = _strip_prefix(_read(path), own)
    missing, unexpected = ([n for n in a if n not in b] for a, b in ((own, given), (given, own)))
    shapes = [n for n in own if n in given and own[n].shape != given[n].shape]
    problems = [
        *([f"missing are {_list(missing)}"] if missing else []),
        *([f"unexpected are {_list(unexpected)}"] if unexpected else []),
        *([f"of another shape are {_list([_shapes(n, given[n], own[n]) for n in shapes])}"] if shapes else []),
    ]
    if problems:
        raise UsageError(f"{path} does not fit {what}: {'; '.join(problems)}{_advise(own, given, shapes)}")
    module.load_state_dict(given)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"there is no file of weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds more than tensors, and is not unpickled, since that could run code: save the state dict "
            "alone, torch.save(model.state_dict(), path)"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UsageError(f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    found = _find_state_dict(content)
    if found is None:
        holds = f"the keys {_list(list(map(str, content)))}" if isinstance(content, Mapping) else type(content).__name__
        raise UsageError(f"{path} holds no state dict, but {holds}")
    return found


def _find_state_dict(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(value, Tensor) for value in content.values()):
        return {str(name): value for name, value in content.items()}
    inner = [found for key in _INSIDE if (found := _find_state_dict(content.get(key))) is not None]
    return inner[0] if inner else None


def _strip_prefix(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights without a wrapper's prefix, where every name has it and the model's names do not."""
    for prefix in _PREFIXES:
        if given and all(name.startswith(prefix) for name in given) and not all(n.startswith(prefix) for n in own):
            return _strip_prefix({name.removeprefix(prefix): value for name, value in given.items()}, own)
    return given


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _shapes(name: str, given: Tensor, own: Tensor) -> str:
    return f"{name} ({tuple(given.shape)} in the file, {tuple(own.shape)} in the model)"


def _advise(own: Mapping[str, Tensor], given: Mapping[str, Tensor], shapes: list[str]) -> str:
    """What to do where only the number of classes differs."""
    counts = {(own[name].shape[0], given[name].shape[0]) for name in shapes if own[name].ndim}
    if len(shapes) in (1, 2) and len(counts) == 1:
        ((ours, theirs),) = counts
        if ours != theirs and all(own[name].shape[1:] == given[name].shape[1:] for name in shapes):
            return f". If that is the number of classes, say so with the model: NAME?num_classes={theirs}"
    return ""
