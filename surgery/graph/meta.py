"""Twins of a module's tensors and layers on the meta device: what runs on them has shapes and costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes


def storage_of(tensor: torch.Tensor) -> int:
    """What is the same for tensors that share memory; of one without storage, such as a sparse one, its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


class Twins:
    """Meta twins, each made once. The originals have to outlive them."""

    def __init__(self, root: nn.Module) -> None:
        """
        Args:
            root: the module whose parameters say on which device the originals are, for what asks a twin.
        """
        tensors = (*root.parameters(), *root.buffers())
        self.device = next((t.device for t in tensors), torch.get_default_device())
        self._tensors: dict[int, torch.Tensor] = {}
        self._layers: dict[int, nn.Module] = {}

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the meta device of the same shape, strides and dtype."""
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = tensor.detach().to("meta")
        return self._tensors[id(tensor)]

    def layer(self, leaf: nn.Module) -> nn.Module:
        """The layer with meta tensors, without hooks and in evaluation mode; shapes do not depend on the mode."""
        if id(leaf) not in self._layers:
            twin = object.__new__(type(leaf))
            twin.__dict__.update(
                {k: self.tensor(v) if isinstance(v, torch.Tensor) else v for k, v in leaf.__dict__.items()}
            )
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                twin.__dict__[hooks] = {}
            for part in ("_parameters", "_buffers"):
                twin.__dict__[part] = {k: None if v is None else self.tensor(v) for k, v in leaf.__dict__[part].items()}
            twin.__dict__["_modules"] = {
                k: None if v is None else self.layer(v) for k, v in leaf.__dict__["_modules"].items()
            }
            twin.__dict__["training"] = False
            self._layers[id(leaf)] = twin
        return self._layers[id(leaf)]

    def run(self, node: fx.Node, leaf: nn.Module | None, args: Any, kwargs: Any) -> Any:
        """What a node that calls something gives for meta tensors and numbers. ``leaf`` is the layer it calls.

        Raises:
            NotImplementedError: the shape of the result depends on the data.
        """
        target: Any = node.target
        if node.op == "call_method" and target in ("to", "cpu", "cuda"):
            return _on_meta(target, *args, **kwargs)
        if leaf is None and isinstance(kwargs.get("device"), (str, int, torch.device)):
            kwargs = {**kwargs, "device": "meta"}
        if target is getattr and args[1] in _DEVICE and isinstance(args[0], torch.Tensor):
            return _DEVICE[args[1]](self.device)
        if target is torch.autograd.grad:
            return _gradients(*args, **kwargs)
        with torch.no_grad():
            if leaf is not None:
                raw = self.layer(leaf)(*args, **kwargs)
            elif node.op == "call_method":
                if target == "backward":
                    raise NotImplementedError  # what it adds to gradients depends on the data, and may be read
                raw = getattr(args[0], target)(*args[1:], **kwargs)
            elif is_custom_operator(target):
                raw = run_custom_operator(target, args, kwargs, self.device)
            else:
                raw = target(*args, **kwargs)
        return pytree.tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, raw)


def run_custom_operator(operator: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    """What an operator from outside torch gives for tensors without data.

    Where nobody registered what it does to shapes (`torch.library.register_fake`), it is run on real tensors, once on
    zeros and once on ones, on ``device``.

    Returns:
        Tensors on ``device``; inside a `FakeTensorMode` fake ones.

    Raises:
        NotImplementedError: the two results differ in shape.
        RuntimeError: it writes into its arguments, or cannot be run.
    """
    try:
        return operator(*args, **kwargs)
    except RuntimeError as error:
        if _overload(operator)._schema.is_mutable:
            raise RuntimeError(
                f"{_overload(operator).name()} writes into its arguments and has no fake: torch.library.register_fake"
            ) from error
    with _disable_current_modes(), torch.random.fork_rng(devices=[]):
        zeros, ones = (_run_filled(operator, args, kwargs, device, value) for value in (0, 1))
    like = partial(pytree.tree_map_only, torch.Tensor, lambda t: (t.shape, t.dtype))
    if like(zeros) != like(ones):
        raise NotImplementedError
    return pytree.tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), zeros)


def _run_filled(operator: Any, args: Any, kwargs: Any, device: torch.device, value: int) -> Any:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full(tensor.shape, value, dtype=tensor.dtype, device=device)

    args, kwargs = pytree.tree_map_only(torch.Tensor, fill, (args, kwargs))
    return operator(*args, **kwargs)


def is_custom_operator(target: Any) -> bool:
    """Whether what a node calls is an operator that others than torch and torchvision registered."""
    overload = _overload(target)
    return isinstance(overload, torch._ops.OpOverload) and overload.namespace not in OWN_NAMESPACES


OWN_NAMESPACES = ("aten", "prim", "prims", "torchvision")
"""Where torch and torchvision register their operators."""


def _overload(target: Any) -> Any:
    """The first overload of a packet (``torch.ops.mine.op``); anything else as it is."""
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return target
    return getattr(target, target.overloads()[0])  # type: ignore[no-untyped-call]


def _gradients(
    outputs: Any, inputs: Any, grad_outputs: Any = None, *rest: Any, is_grads_batched: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, ...]:
    """What `torch.autograd.grad` gives: a tensor like each input."""
    if is_grads_batched or len(rest) > 4:
        raise NotImplementedError
    return tuple(torch.empty_like(t) for t in ((inputs,) if isinstance(inputs, torch.Tensor) else inputs))


_DEVICE: dict[str, Callable[[torch.device], Any]] = {
    "device": lambda device: device,
    "is_meta": lambda device: device.type == "meta",
    "is_cpu": lambda device: device.type == "cpu",
    "is_cuda": lambda device: device.type == "cuda",
}
"""Attributes by which a twin differs from its original."""


def _on_meta(method: str, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """``tensor.to``, ``.cpu`` and ``.cuda``: whatever the device they name, the twin stays where it is."""
    if not isinstance(tensor, torch.Tensor):
        return getattr(tensor, method)(*args, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k != "device"}
    if method != "to":
        return tensor.to("meta", **{k: v for k, v in kwargs.items() if k == "memory_format"})
    device = bool(args) and (args[0] is None or isinstance(args[0], (str, int, torch.device)))
    rest = args[1:] if device else args
    return tensor.to("meta", *rest, **kwargs) if device or not rest else tensor.to(*rest, **kwargs)
