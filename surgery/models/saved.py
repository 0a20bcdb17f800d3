"""What a saved folder holds, as a schema: its recipe, read strictly, and the weights that belong to it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open

from surgery.edit.layout import memory_format
from surgery.edit.recipe import SCHEMA
from surgery.errors import CheckpointError, UsageError
from surgery.graph.traced import TensorSpec
from surgery.storage.documents import check_signature, check_type, digest_file, read_object, refuse_special

RECIPE = "recipe.json"
"""The file in the folder of a saved model that says how it is rebuilt."""

WEIGHTS = "weights.safetensors"
"""The file next to it with the tensors."""

DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
"""torch's dtypes by the names that files hold."""

_MOST_VALUES = 2**28
"""The most entries of the example inputs: they are made to trace the model."""

_Length = Annotated[int, Meta(ge=0, le=2**40)]


class StoredTensor(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """What a tensor of the weights' file is; ``channels_last`` says how it lies in the memory of the model."""

    dtype: str
    shape: list[_Length]
    channels_last: bool = False


class StoredInput(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A tensor among the example inputs."""

    tensor: list[_Length]
    dtype: str
    values: list[bool | int | float] | None = None


class Inputs(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The example inputs, as `encode_input` writes them."""

    args: Any
    kwargs: Any


class SavedRecipe(msgspec.Struct, kw_only=True, frozen=True):
    """The content of ``recipe.json`` before schema 3, which had no digests."""

    schema: int
    source: str | None
    steps: list[dict[str, Any]]
    inputs: Inputs
    training: bool
    modes_other_than_training: list[str]
    frozen: list[str]
    hooks: dict[str, str] | None = None
    versions: dict[str, str] = {}


class SignedRecipe(SavedRecipe, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The content of ``recipe.json``: ``weights`` is the digest of the weights' file, ``sha256`` that of the rest."""

    tensors: dict[str, StoredTensor]
    weights: str
    sha256: str


def read_recipe(folder: Path) -> SavedRecipe:
    """Read ``recipe.json`` of a saved folder.

    Raises:
        UsageError: there is none.
        CheckpointError: it is damaged or malformed; names the field.
    """
    path = folder / RECIPE
    if not path.exists() and not path.is_symlink():
        raise UsageError(f"{folder} is not a saved model: it has no {RECIPE}")
    content = read_object(path)
    schema = check_type(content.get("schema"), int, f"{path}: 'schema'")
    if not 1 <= schema <= SCHEMA:
        raise CheckpointError(f"{path}: recipe has schema {schema}, this version reads 1 to {SCHEMA}")
    if schema < 3 and not {"sha256", "weights", "tensors"} & set(content):
        return check_type(content, SavedRecipe, str(path))
    check_signature(content, str(path))
    return check_type(content, SignedRecipe, str(path))


def check_weights(folder: Path, recipe: SavedRecipe, *, allow_changed: bool) -> None:
    """Compare the weights' file with the recipe that it was saved with, without reading a tensor.

    Args:
        allow_changed: other values are allowed, but the same tensors, shapes and dtypes.

    Raises:
        CheckpointError: it is not the file; says in what it differs.
    """
    path = folder / WEIGHTS
    refuse_special(path)
    if not isinstance(recipe, SignedRecipe):
        return
    found = _read_header(path)
    missing, extra = sorted(set(recipe.tensors) - set(found)), sorted(set(found) - set(recipe.tensors))
    if missing or extra:
        raise CheckpointError(f"{path} does not fit its recipe: missing {missing[:4]}, unexpected {extra[:4]}")
    for name, (dtype, shape) in found.items():
        wanted = recipe.tensors[name]
        if (dtype, shape) != (_format_name(wanted.dtype), wanted.shape):
            raise CheckpointError(
                f"{path}: {name} is {dtype} {tuple(shape)}, its recipe says {_format_name(wanted.dtype)} "
                f"{tuple(wanted.shape)}"
            )
    if not allow_changed and digest_file(path) != recipe.weights:
        raise CheckpointError(
            f"{path} was changed after it was saved, or is that of another model: its digest is not the one in "
            f"{RECIPE}. Weights that were trained further elsewhere are loaded with allow_changed_weights=True "
            "(--allow-changed-weights)"
        )


def check_tensors(module_tensors: Mapping[str, torch.Tensor], recipe: SavedRecipe, where: Path) -> None:
    """Raise `CheckpointError` unless the rebuilt module holds the tensors of the recipe."""
    if not isinstance(recipe, SignedRecipe):
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in recipe.tensors.items()}
    found = {name: tuple(tensor.shape) for name, tensor in module_tensors.items()}
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{where}: 'tensors': {name} is {wanted.get(name, 'not saved')}, the rebuilt model has "
                f"{found.get(name, 'none')}"
            )


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Describe tensors for the recipe."""
    found = {
        name: StoredTensor(_name(t.dtype), list(t.shape), memory_format(t) is not torch.contiguous_format)
        for name, t in tensors.items()
    }
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


def encode_input(value: Any) -> Any:
    """Encode example inputs as plain JSON data.

    Raises:
        UsageError: an input that JSON cannot hold.
    """
    if isinstance(value, TensorSpec):
        few = {} if value.values is None else {"values": list(value.values)}
        return {"tensor": list(value.shape), "dtype": _name(value.dtype), **few}
    if isinstance(value, tuple):
        return {"tuple": [encode_input(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: encode_input(v) for k, v in value.items()}}
    if isinstance(value, list):
        return [encode_input(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UsageError(f"an input of type {type(value).__name__} cannot be saved")


def decode_inputs(inputs: Inputs, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Decode example inputs: the positional and the named ones.

    Raises:
        CheckpointError: they are not what `encode_input` writes, or take too much memory; names the field.
    """
    args = _decode(inputs.args, f"{where}: 'inputs.args'")
    kwargs = _decode(inputs.kwargs, f"{where}: 'inputs.kwargs'")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise CheckpointError(f"{where}: 'inputs': 'args' must be a tuple, and 'kwargs' a dict")
    total = sum(math.prod(spec.shape) for spec in _specs((args, kwargs)))
    if total > _MOST_VALUES:
        raise CheckpointError(f"{where}: 'inputs' hold {total} numbers, more than the {_MOST_VALUES} that are made")
    return args, kwargs


def _decode(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_decode(v, where) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"tuple"}:
        return tuple(_decode(v, where) for v in check_type(value["tuple"], list[Any], f"{where}: 'tuple'"))
    if set(value) == {"dict"}:
        return {k: _decode(v, where) for k, v in check_type(value["dict"], dict[str, Any], f"{where}: 'dict'").items()}
    found = check_type(value, StoredInput, where)
    if found.values is not None and len(found.values) != math.prod(found.tensor):
        raise CheckpointError(f"{where}: {len(found.values)} values for a tensor of shape {found.tensor}")
    values = None if found.values is None else tuple(found.values)
    return TensorSpec(tuple(found.tensor), _dtype(found.dtype, where), values)


def _specs(value: Any) -> Iterable[TensorSpec]:
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _specs(part)


def _read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """The dtype, in the file's words, and the shape of each tensor of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            return {name: (str(part.get_dtype()), list(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _dtype(name: str, where: str) -> torch.dtype:
    if name not in DTYPES:
        raise CheckpointError(f"{where}: 'dtype': torch has no dtype {json.dumps(name)}")
    return DTYPES[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_FORMAT_NAMES = {"bool": "BOOL", "bfloat16": "BF16", "complex64": "C64"}


def _format_name(dtype: str) -> str:
    """The name of a dtype in a safetensors file: ``F32``, ``I64``, ``F8_E4M3``."""
    if dtype in _FORMAT_NAMES:
        return _FORMAT_NAMES[dtype]
    for prefix, letter in (("float", "F"), ("uint", "U"), ("int", "I")):
        if dtype.startswith(prefix):
            return letter + dtype.removeprefix(prefix).upper().removesuffix("FN")
    return dtype.upper()
