"""Whether an ONNX file computes what a module computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.deploy.inputs import Args, Kwargs, refusing_bad_inputs, squashed, tensors
from surgery.errors import ExportError, UsageError

Arrays: TypeAlias = list[np.ndarray[Any, Any]]


def parity(
    path: Path,
    model: nn.Module,
    inputs_at: Callable[[int | None], tuple[Args, Kwargs]],
    batches: Sequence[int | None],
    rtol: float,
) -> tuple[float, float]:
    """Compare the outputs of ``path`` in ONNX Runtime with those of ``model``, both on the CPU.

    ``inputs_at`` gives the inputs at a batch size, or, for None, as they are. Returns the largest absolute difference
    and the largest relative one, max|onnx - torch| / max|torch| of an output.

    Raises `ExportError` at the first output whose relative difference is above ``rtol``, or that is of another shape.
    """
    session = _session(path)
    names = [node.name for node in session.get_outputs()]
    worst = np.zeros(2)
    for batch in batches:
        args, kwargs = inputs_at(batch)
        try:
            expected = _arrays(reference(model, args, kwargs))
        except UsageError as error:
            raise ExportError(
                f"the module runs at the batch of its example inputs, but not at {batch}: {error}"
            ) from error
        found = _run(session, args, kwargs, batch)
        if [a.shape for a in found] != [b.shape for b in expected]:
            shapes = f"{[a.shape for a in found]} instead of {[b.shape for b in expected]}"
            raise ExportError(f"at batch {batch}, the exported model's outputs have the shapes {shapes}")
        for name, a, b in zip(names, found, expected, strict=True):
            absolute, relative = difference(a, b)
            if not relative <= rtol:  # also where it is not a number
                raise ExportError(
                    f"at batch {batch}, output {name!r} differs from torch by {relative:.2e} relative "
                    f"({absolute:.2e} absolute); rtol is {rtol:.0e}{_excuse(model, args, kwargs, expected, relative)}"
                )
            worst = np.maximum(worst, (absolute, relative))
    return float(worst[0]), float(worst[1])


def reference(model: nn.Module, args: Args, kwargs: Kwargs) -> Any:
    """What ``model`` returns, without gradients and without drawing from the caller's random numbers."""
    with refusing_bad_inputs(args, kwargs), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return model(*args, **kwargs)


def difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> tuple[float, float]:
    """max|a - b| and max|a - b| / max|b|."""
    if expected.size == 0 or np.array_equal(found, expected):
        return 0.0, 0.0
    a, b = found.astype(np.float64), expected.astype(np.float64)
    absolute, scale = float(np.abs(a - b).max()), float(np.abs(b).max())
    return absolute, absolute / scale if scale else float("inf")


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised: nothing needs to be printed as well
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise ExportError(f"ONNX Runtime cannot load the exported model: {squashed(error)}") from error


def _run(session: Any, args: Args, kwargs: Kwargs, batch: int | None) -> Arrays:
    names = [node.name for node in session.get_inputs()]
    values = _arrays(tensors((args, kwargs)))
    try:
        found: Arrays = session.run(None, dict(zip(names, values, strict=True)))
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise ExportError(f"at batch {batch}, ONNX Runtime fails: {squashed(error)}") from error
    return found


def _arrays(tree: Any) -> Arrays:
    """The leaves as ONNX has them: tensors and numbers as arrays, and no None."""
    leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(tree)]
    if any(getattr(leaf, "dtype", None) is torch.bfloat16 for leaf in leaves):
        raise ExportError("an export in bfloat16 cannot be checked, for numpy lacks it: export module.float()")
    return [np.asarray(leaf) for leaf in leaves if leaf is not None]


def _excuse(model: nn.Module, args: Args, kwargs: Kwargs, expected: Arrays, relative: float) -> str:
    """Whose fault it may be: where torch's own rounding moves the outputs as much, it need not be the export's."""

    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    exact_args, exact_kwargs = pytree.tree_map_only(torch.Tensor, doubled, (args, kwargs))
    try:
        exact = _arrays(reference(copy.deepcopy(model).double(), exact_args, exact_kwargs))
    except UsageError:  # the module fixes a dtype somewhere
        return ""
    rounding = max((difference(b, c)[1] for b, c in zip(expected, exact, strict=True)), default=0.0)
    if rounding < relative / 10:
        return ""
    return f" (torch itself is {rounding:.2e} off its own float64: more cannot be asked of this model; raise rtol)"
