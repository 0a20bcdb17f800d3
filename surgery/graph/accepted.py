"""What `trace` accepts: a private copy of the model without what wraps it, or a refusal that says what to do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from surgery.errors import TraceError, UsageError
from surgery.graph.fused import avoid_fused_paths


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `nn.DataParallel` and `DistributedDataParallel`."""
    inner: Any = model
    while True:
        if _is_compiled(inner):
            inner = inner._orig_mod
        elif isinstance(inner, (DataParallel, DistributedDataParallel)):
            inner = inner.module
        else:
            return inner  # type: ignore[no-any-return]


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` to trace, in which compiled parts are the modules that they were, and all parts are called.

    Raises:
        UsageError: a part is TorchScript, converted to int8 or lazy, or a parameter has a gradient hook.
        TraceError: it cannot be copied.
    """
    _refuse_parts(model)
    _refuse_gradient_hooks(model)
    try:
        result = copy.deepcopy(model)
    except Exception as error:
        what = str(error).strip().partition("\n")[0]
        raise TraceError(f"{type(model).__name__} cannot be copied: {_of_a_run(model) or what}") from error
    for module in list(result.modules()):
        _switch_off_cache(module)
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = unwrap(child) if _is_compiled(child) else child
    avoid_fused_paths(result)
    return result


def _switch_off_cache(module: nn.Module) -> None:
    """Clear ``use_cache`` in a configuration, as language models have it: a graph computes nothing that a later call
    reads. A call that asks for a cache stays Python."""
    config = getattr(module, "config", None)
    if config is not None and getattr(config, "use_cache", None) is True:
        config.use_cache = False


def _is_compiled(module: object) -> bool:
    return isinstance(module, nn.Module) and "_orig_mod" in module.__dict__.get("_modules", ())


def _refuse_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = repr(name) if name else type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{where} is TorchScript, which has no Python to trace: pass the nn.Module it was made from"
            )
        if hasattr(module, "_packed_params"):
            raise UsageError(
                f"{where} is converted to int8, and its packed weights cannot be operated on: "
                "operate on the model in its float form, then quantize the result"
            )
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise UsageError(f"{where} has parameters without a shape: call the model once on an input first")


def _refuse_gradient_hooks(model: nn.Module) -> None:
    """Hooks on a parameter stay behind when it is copied, and are written for its size."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UsageError(
                f"{name!r} has a gradient hook, which a traced copy would lose: "
                "remove it from the model, and register it on the parameter of the result"
            )


def _of_a_run(model: nn.Module) -> str:
    """What a module keeps of a run with gradients; empty where it keeps nothing."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                where = f"{path}.{name}" if path else name
                return (
                    f"{where!r} is a result of an earlier call with gradients: "
                    "make the model again, or call it under torch.no_grad() once"
                )
    return ""
