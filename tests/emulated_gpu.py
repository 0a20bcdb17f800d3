"""Tensors that say that they are on a GPU, where there is none: what mixes devices fails as it would on one.

Their data are on the CPU, which does the computing. An operator that is given tensors of both devices is an error, but
for the cases that CUDA takes: scalars, copies, and indices on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)


class DeviceMixError(RuntimeError):
    """An operator was given tensors of several devices, as CUDA would refuse them."""


class OnGpu(torch.Tensor):
    """A tensor whose device is `GPU` to Python; ``held`` has its data. To C++ it is on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> OnGpu:
        return OnGpu(self.held)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, OnGpu):
            raise DeviceMixError("the data of a tensor on cuda are replaced by data on the CPU")
        self.held = value.held
        torch.Tensor.data.__set__(self, value)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if copy or (device is not None and device.type != "cuda") or dtype not in (None, self.dtype):
            return torch.ops.aten._to_copy(self, device=device or GPU, dtype=dtype, memory_format=memory_format)
        return self

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """In this context ``"cuda:0"`` is a device, and tensors can be moved there."""
    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_rng_state", lambda device=0: torch.zeros(16, dtype=torch.uint8))
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device=0: None)
        # A parameter that is moved is a new one: the data of a plain one cannot be replaced by what only Python sees.
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        yield


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = any(isinstance(tensor, OnGpu) for tensor in given)
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else (GPU if on_gpu else None)
    to_gpu = device is not None and device.type == "cuda"
    if not on_gpu and not to_gpu:
        return func(*args, **kwargs)
    if on_gpu and func.overloadpacket not in _MIX:
        strangers = [t for t in given if not isinstance(t, OnGpu) and t.ndim > 0]
        if strangers:
            raise DeviceMixError(f"{func} was given tensors of cuda and of {strangers[0].device}")
    generator = kwargs.get("generator")
    if to_gpu and generator is not None and generator.device.type != "cuda":
        raise DeviceMixError(f"{func} on cuda was given a generator of {generator.device}")
    args, inner = pytree.tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
    if to_gpu and asked is not None:
        inner["device"] = torch.device("cpu")
    outputs = func(*args, **inner)
    if func.overloadpacket in _ON_CPU or not to_gpu:
        return outputs
    wrapped = {id(tensor.held): tensor for tensor in given if isinstance(tensor, OnGpu)}
    plain = {id(tensor) for tensor in given if not isinstance(tensor, OnGpu)}
    return pytree.tree_map_only(
        torch.Tensor,
        lambda tensor: tensor if id(tensor) in plain else wrapped.get(id(tensor)) or OnGpu(tensor),
        outputs,
    )


_aten = torch.ops.aten
_MIX = {_aten.copy_, _aten._to_copy, _aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_ON_CPU = {_aten._local_scalar_dense, _aten.equal, _aten.is_same_size}
