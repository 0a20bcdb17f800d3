"""Find where Python reads numbers that depend on a module's inputs: a recorded run turns them into constants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from surgery.graph.batches import tensors
from surgery.graph.guards import user_line

_READS = frozenset({"__array__", "__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist"})
"""What turns a tensor into Python numbers."""
_SIZES = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        *(
            Tensor.size,
            Tensor.stride,
            Tensor.numel,
            Tensor.nelement,
            Tensor.__len__,
            torch.numel,
            torch._shape_as_tensor,
        ),
    }
)
"""What asks for sizes, which are tensors too in a run that is recorded."""
_WRITES = ("__iadd__", "__iand__", "__idiv__", "__imul__", "__ior__", "__isub__", "__setitem__")


class Reads(TorchFunctionMode):
    """While it is on, ``places`` collects the lines (``file.py:7``) that read numbers computed from ``given``.

    Sizes do not count. Only calls of torch are seen, which does not disturb a run that is being recorded; the output of
    a scripted function counts as independent of its inputs.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.places: list[str] = []
        self._computed = WeakIdKeyDictionary()
        self._learn(given)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        dependent = any(tensor in self._computed for tensor in tensors((args, kwargs)))
        if dependent and name in _READS:
            self.places.append(user_line())
        out = func(*args, **kwargs)
        if dependent and func not in _SIZES and not name.startswith("new_") and not name.endswith("_like"):
            self._learn(tensors((out, kwargs.get("out"))))
            if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
                self._learn(tensors(args[:1]))
        return out

    def _learn(self, found: Iterable[Tensor]) -> None:
        for tensor in found:
            self._computed[tensor] = True
            if tensor._is_view():  # so that what is written into a part counts for the whole
                self._computed[tensor._base] = True
