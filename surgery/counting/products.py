"""Count the multiply-accumulates of matrix products, convolutions and attention, one dispatched operator at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from surgery.errors import UsageError
from surgery.graph.batches import tensors
from surgery.graph.meta import OWN_NAMESPACES, is_custom_operator, run_custom_operator


class ProductCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add up the MACs of what runs inside the context, by the parameter that multiplies.

    torch chooses the kernel of an attention or a recurrent layer at run time, and new versions bring new kernels. A
    fused attention is counted by the shapes of its query, key and value, whatever its name. A product without a formula
    is an error, never a silent zero.

    Args:
        module: what will run; its parameters are told apart by their storage.
        layers: an entered tracker, which knows the layer that runs when an error is to name it.

    Attributes:
        macs: MACs by parameter name, in the order of execution; products of activations are under ``""``.

    Raises:
        UsageError: where an operator multiplies matrices by its name, or is none of torch's own and takes a weight
            matrix, and neither this module nor `torch.utils.flop_counter` has a formula for it.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, layers: ModuleTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[str, int] = {}
        self._layers = layers
        matrices = [(name, p) for name, p in module.named_parameters() if p.ndim > 1]
        self._matrices = {p.untyped_storage()._cdata: name for name, p in reversed(matrices)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload) and func.namespace != "prim":
            with self:  # in torch.inference_mode, composite operators arrive whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if is_custom_operator(func):
            device = next((t.device for t in tensors((args, kwargs))), torch.get_default_device())
            out = run_custom_operator(func, args, kwargs, device)
        else:
            out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name, operands = func.name().split(".")[0].rstrip("_"), tensors((args, kwargs))
        macs = product_macs(name, operands, _given(func, args, kwargs), tensors(out))
        if macs is None and (formula := flop_registry.get(getattr(func, "overloadpacket", func))) is not None:
            macs = formula(*args, **kwargs, out_val=out) // 2
        if macs is None and _RECURRENT.search(name):
            weights = [w for key, w in _given(func, args, kwargs).items() if key.startswith("weight")]
            for weight in (w for w in tensors(weights) if w.ndim == 2):
                self._add([weight], weight.numel() * (operands[0].numel() // operands[0].shape[-1]))
        elif macs is None and (_PRODUCT.search(name) or (_is_foreign(name) and self._name_of(operands))):
            layer = max(self._layers.parents - {"Global"}, key=len, default="the module")
            raise UsageError(
                f"cannot count the MACs of {name} in {layer}: there is no formula for it; give one with "
                "torch.utils.flop_counter.register_flop_formula"
            )
        elif macs:
            self._add(operands, macs)

    def _add(self, operands: list[Tensor], macs: int) -> None:
        name = self._name_of(operands)
        self.macs[name] = self.macs.get(name, 0) + macs

    def _name_of(self, operands: list[Tensor]) -> str:
        """Return the name of the parameter among ``operands``, or an empty string."""
        found = (self._matrices.get(t.untyped_storage()._cdata) for t in operands)
        return next((name for name in found if name is not None), "")


@contextmanager
def attention_as_matrix_products() -> Iterator[None]:
    """Let torch compute attention by matrix products: fused kernels may pad heads. A model may pin another kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def product_macs(name: str, operands: list[Tensor], given: Mapping[str, Any], out: list[Tensor]) -> int | None:
    """Count the MACs of one call of an operator; None where it has no formula here.

    Args:
        name: of the operator, with its namespace and without overload or final underscore, such as ``"aten::mm"``.
        operands: the tensors it was given, in order.
        given: all it was given, by the name of the argument.
        out: the tensors it returned.

    Returns:
        Rows x columns x contracted length of a matrix product; for attention, that of query by key and of weights by
        value, with as many heads as the query has (causal or not: masked products count); for a convolution, the
        weights once at each output position (at each input position if it is transposed).

    Example:
        >>> product_macs("aten::mm", [torch.empty(2, 3), torch.empty(3, 4)], {}, [torch.empty(2, 4)])
        24
    """
    if re.search("scaled_dot_product_.*attention", name) and "backward" not in name:
        query, key, value = operands[:3]
        return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if (first := _MATRIX_PRODUCTS.get(name)) is not None:
        left, right = operands[first : first + 2]
        return left.numel() * (right.shape[-1] if right.ndim > 1 else 1)
    if name in _CONVOLUTIONS:
        image, weight = operands[0] if given.get("transposed") else out[0], operands[1]
        return image.shape[0] * image.shape[2:].numel() * weight.numel()
    if name == "aten::_trilinear":  # of nn.Bilinear: (N, 1, in1, 1), (1, out, in1, in2), (N, 1, 1, in2) after expansion
        return out[0].shape[0] * operands[1].numel()
    return 0 if _WITHOUT_PRODUCTS.search(name) else None


_MATRIX_PRODUCTS = {
    **{f"aten::{name}": 0 for name in ("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm")},
    **{f"aten::{name}": 1 for name in ("addmm", "baddbmm", "addbmm", "addmv", "_addmm_activation")},
}
"""Products of two tensors, and the place of the first among the operands: after what is added to the product."""

_CONVOLUTIONS = {"torchvision::deform_conv2d"} | {
    f"aten::{name}"
    for name in ("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution")
}

_RECURRENT = re.compile("rnn(_layer)?$|lstm$|gru$")
_WITHOUT_PRODUCTS = re.compile("^aten::(_thnn_fused_|_use_cudnn_rnn|_cudnn_rnn_flatten|_convert_|mkldnn_reorder)")
_PRODUCT = re.compile(
    "mm(?![aiy])|matmul|attention|conv(olution|_|[1-3]d|$)|[:_](mv|v?dot|vecdot|linear|trilinear|bilinear|rnn|lstm|gru)(_|$)"
)


def _is_foreign(name: str) -> bool:
    return name.partition("::")[0] not in OWN_NAMESPACES


def _given(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by name; of a higher-order operator only the named ones."""
    arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else ()
    return dict(zip((argument.name for argument in arguments), args, strict=False)) | dict(kwargs)
