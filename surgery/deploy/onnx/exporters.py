"""torch's two ONNX exporters behind one signature.

The newer one, torch.export's, comes first. It proves that the graph holds at every length of an open axis, and refuses
what it cannot prove. The older one records a run as TorchScript: it takes anything that runs and proves nothing. The
files of both are compared with torch (`surgery.deploy.onnx.parity`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree
from torchvision.ops.misc import FrozenBatchNorm2d

from surgery.deploy.onnx.reads import Reads
from surgery.deploy.onnx.sizes import sizes_in_float64
from surgery.errors import ExportError, UsageError
from surgery.graph.batches import Args, Kwargs, tensors
from surgery.models.inputs import squash

OpenAxes = list[dict[int, str]]
"""For each tensor of the inputs, in order, the name of each axis whose length is left open."""


@dataclass(frozen=True)
class Order:
    """What to export: ``model`` in evaluation mode, called with ``args`` and ``kwargs``, which returns ``outputs``.

    With ``frozen``, numbers that Python reads from the inputs may become constants.
    """

    model: nn.Module
    args: Args
    kwargs: Kwargs
    outputs: Any
    open_axes: OpenAxes
    opset: int | None
    frozen: bool


def dynamo(order: Order) -> ir.Model:
    """Convert by torch.export."""
    collection = ShapesCollection()  # type: ignore[no-untyped-call]
    dims = {name: Dim(name) for axes in order.open_axes for name in axes.values()}
    for tensor, axes in zip(tensors((order.args, order.kwargs)), order.open_axes, strict=True):
        if axes:
            collection[tensor] = {axis: dims[name] for axis, name in axes.items()}
    program = torch.onnx.export(
        order.model,
        order.args,
        kwargs=order.kwargs,
        dynamo=True,
        verbose=False,
        opset_version=order.opset,
        dynamic_shapes=collection.dynamic_shapes(order.model, order.args, order.kwargs),  # type: ignore[no-untyped-call]
        output_names=output_names(order),
    )
    assert program is not None  # it is None for the other exporter only
    model: ir.Model = program.model
    return model


def torchscript(order: Order) -> ir.Model:
    """Convert by recording a run: the file repeats what Python decided in it.

    Raises:
        ExportError: numbers of the inputs decided it.
    """
    flat = _Flat(order.model, order.args, order.kwargs).eval()
    given = tensors((order.args, order.kwargs))
    names = input_names(order)
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        draft = Path(folder) / "model.onnx"
        torch.onnx.export(
            flat,
            tuple(given),
            draft,
            dynamo=False,
            opset_version=order.opset,
            input_names=names,
            output_names=output_names(order),
            dynamic_axes={name: axes for name, axes in zip(names, order.open_axes, strict=True) if axes},
        )
        if flat.reads and not order.frozen:
            raise ExportError(
                f"its Python reads numbers that depend on the inputs ({', '.join(flat.reads)}), and the file would "
                "always do what follows from those of the example inputs (verify=False takes it as it is)"
            )
        model = ir.load(draft)
        ir.external_data.load_to_model(model)  # the folder of what it kept outside is about to go
    sizes_in_float64(model)
    return model


EXPORTERS: Mapping[str, Callable[[Order], ir.Model]] = {"dynamo": dynamo, "torchscript": torchscript}


def convert(exporter: str, order: Order) -> ir.Model:
    """Convert by the exporter of this name; raise `ExportError` with the reason if it fails."""
    try:
        with _quietly(), torch.random.fork_rng(devices=[]):
            model = EXPORTERS[exporter](order)
    except Exception as error:  # exporters raise whatever fails inside them
        name = type(order.model).__name__
        raise ExportError(f"{name} cannot be exported by {exporter}: {squash(_innermost(error))}") from error
    made = model.opset_imports[""]
    if order.opset is not None and made != order.opset:
        raise ExportError(f"opset {order.opset} cannot be had: the {exporter} exporter made opset {made}")
    return model


def exportable_copy(module: nn.Module) -> nn.Module:
    """Copy to the CPU, in evaluation mode, with FrozenBatchNorm2d as BatchNorm2d: exporters fold only the latter.

    Raises:
        UsageError: ``module`` is not a module, or cannot be copied.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"only a module can be exported, not {module!r}")
    try:
        model = copy.deepcopy(module).eval().cpu()
    except Exception as error:  # whatever the module's parts raise that cannot be copied
        raise UsageError(f"{type(module).__name__} cannot be copied to the CPU: {squash(error)}") from error
    for path, frozen in list(model.named_modules()):
        if type(frozen) is FrozenBatchNorm2d and path and not (frozen._forward_hooks or frozen._forward_pre_hooks):
            norm = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps, dtype=frozen.weight.dtype).eval()
            norm.load_state_dict(frozen.state_dict(), strict=False)  # a frozen norm counts no batches
            model.set_submodule(path, norm.requires_grad_(False))
    return model


def input_names(order: Order) -> list[str]:
    """Name the inputs as `dynamo` does: by the parameters of ``forward``, and the keys within a list or dict."""
    leaves, spec = pytree.tree_flatten((order.args, order.kwargs))
    args, kwargs = pytree.tree_unflatten(list(range(len(leaves))), spec)  # a tensor may be given twice, a place not
    bound = inspect.signature(order.model.forward).bind(*args, **kwargs).arguments
    names = {place: _join(keys) for keys, place in pytree.tree_flatten_with_path(bound)[0]}
    return [names[place] for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]


def output_names(order: Order) -> list[str]:
    """Name the outputs ``output``, or by their keys: ``{"out": a, "aux": (b, c)}`` gives out, aux_0 and aux_1."""
    taken = set(inspect.signature(order.model.forward).parameters)  # an output of an input's name would be that input
    taken |= set(input_names(order))
    names = []
    for keys, leaf in pytree.tree_flatten_with_path(order.outputs)[0]:
        if leaf is None:
            continue
        name = _join(keys)
        if not name or name[0].isdigit():
            name = f"output_{name}".rstrip("_")
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


class _Flat(nn.Module):
    """A module as a function of its input tensors, in order, that returns a tuple of its output tensors.

    ``reads`` are the lines at which Python read numbers that depend on the inputs.
    """

    def __init__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        super().__init__()
        self.module = module
        self.reads: tuple[str, ...] = ()
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        torch._C._jit_set_onnx_log_enabled(False)  # torch turned it on: C++ prints graphs to stdout if the export fails
        rest: Iterable[Tensor] = iter(given)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]  # type: ignore[call-overload]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        with Reads(given) as reads:
            found = pytree.tree_leaves(self.module(*args, **kwargs))
        self.reads = tuple(dict.fromkeys(reads.places))
        return tuple(torch.as_tensor(leaf) for leaf in found if leaf is not None)


def _join(keys: Sequence[Any]) -> str:
    return re.sub(r"\W+", "_", pytree.keystr(tuple(keys))).strip("_")


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide what the exporter prints, logs and warns of: its errors are raised.

    A progress bar that is drawn meanwhile must keep the standard error that it began with.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
