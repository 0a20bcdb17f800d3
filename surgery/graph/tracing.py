"""From a model to a traced module, whole or in parts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError, UsageError
from surgery.graph.islands import trace_islands
from surgery.graph.structure import seal
from surgery.graph.traced import TensorSpec as TensorSpec
from surgery.graph.traced import TracedModule as TracedModule
from surgery.graph.traced import TraceInfo as TraceInfo
from surgery.graph.traced import example_inputs as example_inputs
from surgery.graph.traced import info as info
from surgery.graph.traced import inputs_like as inputs_like
from surgery.graph.traced import set_info
from surgery.graph.traced import with_info as with_info
from surgery.graph.whole_graph import bound_arguments, traced_copy

_FEW = 4096
"""Up to how many entries of a tensor are remembered."""


def trace(
    model: nn.Module, example_inputs: Any, *, kwargs: dict[str, Any] | None = None, source: str | None = None
) -> nn.Module:
    """Trace ``model`` to graphs that compute the same in ``train()`` and in ``eval()``.

    Where Python decides by what tensors hold, the model is run once in each mode, stays the module that it is, and its
    largest parts that can be traced become graphs; what couples them is found by `dimension_groups`.

    Args:
        model: any module. It is not modified, and the result shares no storage with it.
        example_inputs: a tensor, or a tuple of the positional inputs. Shapes and dtypes are remembered; of a model that
            is traced in parts, the values of small tensors too.
        kwargs: inputs passed by name.
        source: where the architecture comes from (``"torchvision:resnet50"``), so that `surgery.load` can rebuild it.

    Returns:
        a `TracedModule` where the whole model traces; else a module of the model's own class with some in it.

    Raises:
        UsageError: a layer is converted to int8.
        TraceError: neither the model nor any part of it can be turned into a graph; the message says where.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(kwargs or {})
    _refuse_packed_weights(model)
    try:
        root = copy.deepcopy(model)
    except RuntimeError as error:
        raise TraceError(f"{type(model).__name__} cannot be copied: {error}") from error
    given = bound_arguments(model, args, kwargs)
    untraced = ""
    modes: tuple[bool, ...] = (False,)
    traced: nn.Module
    try:
        traced = traced_copy(root, given)
    except TraceError as error:
        untraced = str(error)
        traced, modes = trace_islands(copy.deepcopy(model), args, kwargs, error)
    spec_args, spec_kwargs = pytree.tree_map(lambda v: _spec(v, bool(untraced)), (args, kwargs))
    set_info(traced, TraceInfo(source, spec_args, spec_kwargs, untraced=untraced, modes=modes))
    seal(traced)
    return traced


def _refuse_packed_weights(model: nn.Module) -> None:
    """A layer converted to int8 holds its weight packed for one kernel, where no operation can reach it."""
    packed = next((name for name, module in model.named_modules() if hasattr(module, "_packed_params")), None)
    if packed is not None:
        raise UsageError(
            f"{packed!r} is converted to int8, and its packed weights cannot be operated on: "
            "operate on the model in its float form, then quantize the result"
        )


def _spec(value: Any, with_values: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    few = with_values and value.numel() <= _FEW
    return TensorSpec(tuple(value.shape), value.dtype, tuple(value.detach().flatten().tolist()) if few else None)
