"""From a model to a traced module, whole or in parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError
from surgery.graph.accepted import private_copy, unwrap
from surgery.graph.agreement import check_agreement
from surgery.graph.arguments import bound_arguments
from surgery.graph.fused import padding_encoders
from surgery.graph.islands import refuse_shapes_of_data, trace_islands
from surgery.graph.structure import seal
from surgery.graph.traced import TensorSpec as TensorSpec
from surgery.graph.traced import TracedModule as TracedModule
from surgery.graph.traced import TraceInfo as TraceInfo
from surgery.graph.traced import example_inputs as example_inputs
from surgery.graph.traced import info as info
from surgery.graph.traced import inputs_like as inputs_like
from surgery.graph.traced import set_info
from surgery.graph.traced import with_info as with_info
from surgery.graph.whole_graph import trace_whole

_FEW = 4096
"""Up to how many entries of a tensor are remembered."""


def trace(
    model: nn.Module,
    example_inputs: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    source: str | None = None,
    check: bool = True,
) -> nn.Module:
    """Trace ``model`` to graphs that compute the same in ``train()`` and in ``eval()``.

    Where Python decides by what tensors hold, the model is run once in each mode, stays the module that it is, and its
    largest parts that can be traced become graphs; what couples them is found by `dimension_groups`.

    The result is called once before it is returned, and compared with the model: see `check_agreement`.

    Args:
        model: any module. It is not modified, and the result shares no storage with it. What `torch.compile`,
            `nn.DataParallel` and `DistributedDataParallel` wrap is traced without the wrapper.
        example_inputs: a tensor, or a tuple of the positional inputs. Shapes and dtypes are remembered; of a model that
            is traced in parts, the values of small tensors too.
        kwargs: inputs passed by name.
        source: where the architecture comes from (``"torchvision:resnet50"``), so that `surgery.load` can rebuild it.
        check: whether to compare; False saves a forward pass or a few, and two copies of the weights meanwhile.

    Returns:
        a `TracedModule` where the whole model traces; else a module of the model's own class with some in it.

    Raises:
        UsageError: a part is TorchScript, converted to int8 or lazy, or a parameter has a gradient hook.
        TraceError: neither the model nor any part of it can be turned into a graph, or what was made of it computes
            something else; the message says where.

    Example:
        >>> traced = surgery.trace(torchvision.models.resnet18(), torch.rand(2, 3, 64, 64))
        >>> traced(torch.rand(5, 3, 64, 64)).shape
        torch.Size([5, 1000])
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(kwargs or {})
    model = unwrap(model)
    padding = padding_encoders(model)
    root = private_copy(model)
    given = bound_arguments(root, args, kwargs)
    untraced = ""
    modes: tuple[bool, ...] = (False,)
    batched = False
    traced: nn.Module
    try:
        other = given.with_batch(1 if given.batch > 1 else 2) if given.batch else None
        traced = trace_whole(root, given, other=other)
        if check:
            batched = check_agreement(traced, partial(private_copy, model), args, kwargs, padding)
        refuse_shapes_of_data(traced, given)
    except TraceError as error:
        untraced = str(error)
        traced, modes = trace_islands(private_copy(model), args, kwargs, error)
        if check:
            batched = check_agreement(traced, partial(private_copy, model), args, kwargs, padding)
    spec_args, spec_kwargs = pytree.tree_map(lambda v: _spec(v, bool(untraced)), (args, kwargs))
    set_info(traced, TraceInfo(source, spec_args, spec_kwargs, untraced=untraced, modes=modes, batched=batched))
    seal(traced)
    return traced


def _spec(value: Any, with_values: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    few = with_values and value.numel() <= _FEW
    return TensorSpec(tuple(value.shape), value.dtype, tuple(value.detach().flatten().tolist()) if few else None)
