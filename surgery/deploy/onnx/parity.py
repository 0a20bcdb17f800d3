"""Compare what an ONNX file computes with what a module computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.deploy.onnx.detections import are_detections, find_unpaired, pair
from surgery.errors import ExportError, UsageError
from surgery.graph.batches import Args, Kwargs, tensors
from surgery.models.inputs import copy_inputs, refusing_bad_inputs, squash

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Inputs to compare on, and how messages name them: ``at batch 2``.

    An ``optional`` case is skipped if the module refuses it, or if the module's own rounding decides its outputs.
    """

    where: str
    args: Args
    kwargs: Kwargs
    optional: bool = False


class _RoundingError(ExportError):
    """The two differ, but the module also differs from itself in float64, or its outputs are not numbers."""


@dataclass(frozen=True)
class Parity:
    """How far a file is from a module.

    ``max_abs`` is the largest absolute difference over all outputs and cases; ``max_rel`` the largest
    max|onnx - torch| / max|torch| of an output. ``detections`` counts the compared detections of a detection model.
    """

    max_abs: float
    max_rel: float
    detections: int | None


def parity(path: Path, model: nn.Module, cases: Iterable[Case], rtol: float) -> Parity:
    """Compare the outputs of ``path`` in ONNX Runtime with those of ``model``, both on the CPU.

    Detections are paired first (`surgery.deploy.onnx.detections`): each that scores above the lowest needs a partner,
    whose score differs by at most ``rtol`` of the highest score, and its box by at most ``rtol`` of the largest
    coordinate.

    Raises:
        ExportError: the relative difference of an output is above ``rtol``, or its shape differs.
    """
    session = _session(path, model)
    worst, detections = np.zeros(2), None
    for case in cases:
        try:
            outputs = run_reference(model, case.args, case.kwargs)
            differences, paired_off = _differences(session, model, case, outputs, rtol)
        except UsageError as error:
            if not case.optional:
                raise ExportError(f"the module runs on its example inputs, but not {case.where}: {error}") from error
        except _RoundingError:
            if not case.optional:
                raise
        else:
            worst = np.maximum(worst, differences)
            detections = detections if paired_off is None else (detections or 0) + paired_off
    return Parity(float(worst[0]), float(worst[1]), detections)


def _differences(session: Any, model: nn.Module, case: Case, outputs: Any, rtol: float) -> tuple[Array, int | None]:
    """Return one case's largest absolute and relative difference, and the number of compared detections, if any."""
    expected, found = _arrays(outputs), _run(session, case)
    detections = None
    if are_detections(outputs):
        found, expected = _sort_pairs(found, outputs, model, case, rtol)
        detections = sum(len(boxes) for boxes in expected[:: len(outputs[0])])
    _refuse_other_shapes(found, expected, case)
    worst = np.zeros(2)
    for node, a, b in zip(session.get_outputs(), found, expected, strict=True):
        absolute, relative = difference(a, b)
        if not relative <= rtol:  # also where it is not a number
            excuse = _excuse(model, case, relative)
            wrong = not excuse or (np.isnan(a).any() and not np.isnan(b).any())
            raise (ExportError if wrong else _RoundingError)(
                f"{case.where}, output {node.name!r} differs from torch by {relative:.2e} relative "
                f"({absolute:.2e} absolute); rtol is {rtol:.0e}{excuse}"
            )
        worst = np.maximum(worst, (absolute, relative))
    return worst, detections


def run_reference(model: nn.Module, args: Args, kwargs: Kwargs) -> Any:
    """Run ``model`` without gradients, and leave the caller's random state as it is."""
    args, kwargs = copy_inputs(args, kwargs)
    with refusing_bad_inputs(args, kwargs), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return model(*args, **kwargs)


def difference(found: Array, expected: Array) -> tuple[float, float]:
    """Return max|a - b| and max|a - b| / max|b|; whole numbers have the scale 1, equal infinities do not differ."""
    if expected.size == 0 or np.array_equal(found, expected):
        return 0.0, 0.0
    unequal = found != expected
    absolute = float(np.abs(found[unequal].astype(np.float64) - expected[unequal]).max())
    if expected.dtype.kind in "iub":
        return absolute, absolute
    scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
    return absolute, absolute / scale if scale else absolute * float("inf")


def _sort_pairs(
    found: list[Array], outputs: list[dict[str, torch.Tensor]], model: nn.Module, case: Case, tolerance: float
) -> tuple[list[Array], list[Array]]:
    """Return both sets of detections in the same order, without those that need no partner, as lists of arrays.

    Raises:
        ExportError: a detection that needs a partner has none.
    """
    keys = list(outputs[0])
    sorted_found: list[Array] = []
    sorted_expected: list[Array] = []
    for k, image in enumerate(outputs):
        a = dict(zip(keys, found[k * len(keys) : (k + 1) * len(keys)], strict=True))
        b = {key: value.numpy() for key, value in image.items()}
        counts = len(a["scores"]), len(b["scores"])
        if counts[0] != counts[1]:
            excuse = _detections_excuse(model, case, k, b, tolerance)
            raise (_RoundingError if excuse else ExportError)(
                f"{case.where}, image {k} has {counts[0]} detections, and {counts[1]} in torch{excuse}"
            )
        rows, columns = pair(a, b, tolerance)
        alone = find_unpaired(a, b, rows, columns, tolerance)
        if len(alone):
            excuse = _detections_excuse(model, case, k, b, tolerance)
            raise (_RoundingError if excuse else ExportError)(
                f"{case.where}, {counts[0] - len(rows)} of {counts[0]} detections of image {k}, of scores up to "
                f"{alone.max():.4f}, have no partner on the other side of the same label, score and box; "
                f"rtol is {tolerance:.0e}{excuse}"
            )
        sorted_found += [a[key][rows] for key in keys]
        sorted_expected += [b[key][columns] for key in keys]
    return sorted_found, sorted_expected


def _refuse_other_shapes(found: list[Array], expected: list[Array], case: Case) -> None:
    if [a.shape for a in found] != [b.shape for b in expected]:
        shapes = f"{[a.shape for a in found]} instead of {[b.shape for b in expected]}"
        raise ExportError(f"{case.where}, the exported model's outputs have the shapes {shapes}")


def _session(path: Path, model: nn.Module) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised: nothing needs to be printed as well
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        dtypes = {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
        hint = f" (the model is in {' and '.join(sorted(dtypes))}: export module.float())" if dtypes else ""
        raise ExportError(f"ONNX Runtime cannot load the exported model: {squash(error)}{hint}") from error


def _run(session: Any, case: Case) -> list[Array]:
    names = [node.name for node in session.get_inputs()]
    values = _arrays(tensors((case.args, case.kwargs)))
    if len(names) != len(values):
        raise ExportError(f"the exported model has the inputs {names}, and the module {len(values)} tensors")
    try:
        found: list[Array] = session.run(None, dict(zip(names, values, strict=True)))
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise ExportError(f"{case.where}, ONNX Runtime fails: {squash(error)}") from error
    return found


def _arrays(tree: Any) -> list[Array]:
    """Return the leaves as ONNX has them: tensors and numbers as arrays, without None."""
    leaves = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(tree)]
    try:
        return [np.asarray(leaf) for leaf in leaves if leaf is not None]
    except TypeError as error:  # bfloat16, 8-bit floats
        raise ExportError(f"the export cannot be checked, for numpy lacks a dtype of it: {squash(error)}") from error


def _excuse(model: nn.Module, case: Case, relative: float) -> str:
    """Say where the difference may come from if torch's own rounding moves the outputs as much; else empty."""
    if np.isnan(relative):
        return ": one of the two is not a number; give example inputs that the model has finite outputs on"
    expected, exact = (_arrays(outputs) for outputs in _run_twice(model, case))
    if not exact:
        return ""
    if [a.shape for a in exact] != [b.shape for b in expected]:
        return " (torch itself gives another number of things in float64)"
    rounding = max((difference(b, c)[1] for b, c in zip(expected, exact, strict=True)), default=0.0)
    if rounding < relative / 10:
        return ""
    return f" (torch itself is {rounding:.2e} off its own float64: more cannot be asked of this model; raise rtol)"


def _detections_excuse(model: nn.Module, case: Case, k: int, expected: Mapping[str, Array], tolerance: float) -> str:
    """Say the same for the detections of image ``k``, if torch detects other things in float64."""
    _, exact = _run_twice(model, case)
    if not exact:
        return ""
    other = {key: value.numpy() for key, value in exact[k].items()}
    rows, columns = pair(expected, other, tolerance)
    if not len(find_unpaired(expected, other, rows, columns, tolerance)):
        return ""
    return (
        " (torch itself detects other things in float64: the scores tie, as those of an untrained model do, and "
        "rounding chooses; take trained weights)"
    )


def _run_twice(model: nn.Module, case: Case) -> tuple[Any, Any]:
    """Return the outputs of the model as it is, and in float64; the latter are empty if it fixes another dtype.

    Both come from copies, so that a model that changes with each call differs by rounding only.
    """

    def double(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    args, kwargs = pytree.tree_map_only(torch.Tensor, double, (case.args, case.kwargs))
    expected = run_reference(copy.deepcopy(model), case.args, case.kwargs)
    try:
        return expected, run_reference(copy.deepcopy(model).double(), args, kwargs)
    except UsageError:
        return expected, []
