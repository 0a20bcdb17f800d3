"""Export to ONNX: the file is compared with torch, in ONNX Runtime, before anything appears at its path."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from surgery.counting.cost import cost
from surgery.deploy.onnx.detections import are_detections
from surgery.deploy.onnx.exporters import EXPORTERS, Order, convert, exportable_copy
from surgery.deploy.onnx.openings import Plan
from surgery.deploy.onnx.parity import Parity, parity, run_reference
from surgery.deploy.onnx.trees import open_outputs
from surgery.edit.recipe import recipe
from surgery.errors import ExportError, UsageError, unknown_name, whole_number
from surgery.graph import tracing
from surgery.graph.batches import Args, Kwargs, is_list_of_images
from surgery.models.detectors import without_threshold
from surgery.models.inputs import copy_inputs, resolve, squash
from surgery.storage.locks import hold, make_staging
from surgery.version import __version__

_INLINE_LIMIT = 2**31 - 2**24
"""Bytes of weights above which they go next to the graph: protobuf reads no message of 2 GiB or more."""
_INLINE_RECIPE = 2**16
"""The longest recipe, in characters, that the file's properties hold; a longer one leaves its hash only."""

RTOL, DETECTIONS_RTOL = 1e-4, 1e-3
"""Detection models cut boxes and masks out at rounded positions."""


@dataclass(frozen=True)
class Export:
    """An ONNX file that was written, and how far its outputs are from torch's.

    ``exporter`` is the one of torch's that made it, and ``open_axes`` are the names of the axes of its inputs whose
    length is open. ``bytes`` includes the external weights, if any.

    ``max_abs`` is the largest absolute difference over all outputs, all of ``batches`` and all of ``image_sizes``
    (height, width), those beyond the example inputs' own; ``max_rel`` the largest, over outputs, of
    max|onnx - torch| / max|torch|. Both are None, and the rest empty, where the check was waived. ``detections`` is how
    many a detection model had found on both sides.
    """

    path: Path
    exporter: str
    opset: int
    open_axes: tuple[str, ...]
    bytes: int
    max_abs: float | None = None
    max_rel: float | None = None
    batches: tuple[int, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    detections: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        lists = {name: list(value) for name, value in asdict(self).items() if isinstance(value, tuple)}
        return {**asdict(self), "path": str(self.path), **lists}


def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    opset: int | None = None,
    dynamic_batch: bool | None = None,
    dynamic_size: bool = False,
    exporter: str | None = None,
    verify: bool = True,
    rtol: float | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Export:
    """Write ``module``, in evaluation mode, as an ONNX file whose outputs in ONNX Runtime equal torch's.

    A BatchNorm after a convolution is folded into it. The file's properties (``surgery.*``) record versions, source,
    recipe and its hash, MACs and parameters.

    Args:
        module: any module. It is not modified.
        path: the file to write; its folder must exist. Weights above 2 GiB go to ``<path>.data`` next to it.
        example_inputs: a tensor or a tuple of positional inputs, ``kwargs`` the named ones; a traced module needs none.
        opset: the version of the ONNX operator set; torch's default where None.
        dynamic_batch: leave axis 0 of the inputs open (named ``batch``) and check batches 1, 2 and 3; otherwise the
            file is for the batch of the inputs alone. None: open, but for a list of images, each of which is an input
            of its own, so that their number is that of the example inputs.
        dynamic_size: leave the last two axes of images (named ``height`` and ``width``) open, and check another size,
            32 pixels higher and 64 wider.
        exporter: ``dynamo`` or ``torchscript``; where None, dynamo and, where that fails, TorchScript; for lists of
            images, TorchScript alone.
        verify: compare with torch, and refuse what TorchScript records of a module whose Python reads numbers that
            depend on the inputs. Without it, only the exporter's and `onnx.checker`'s word is taken.
        rtol: the largest relative error that passes: per output, max|onnx - torch| / max|torch|; 1e-4 where None.
            Detections are compared as such, in any order: scores and boxes to ``rtol``, 1e-3 where None.
        metadata: added to the properties the file carries.
        force: replace ``path`` if it exists, and the weights next to it.

    Returns:
        What was written, and the largest difference to torch.

    Raises:
        UsageError: the path, the inputs or an option are not usable.
        ExportError: the module cannot be exported, or its export does not match it; no file is left.

    Example:
        >>> surgery.export_onnx(slim, "student.onnx").max_rel
    """
    path = Path(path)
    _refuse_path(path, force)
    if path.suffix != ".onnx":
        raise UsageError(f"cannot write {path}: the name of an ONNX file ends in .onnx")
    if exporter is not None and exporter not in EXPORTERS:
        raise unknown_name("exporter", exporter, EXPORTERS)
    opset = None if opset is None else whole_number("opset", opset, 1)
    if rtol is not None and not (isinstance(rtol, Real) and 0 <= rtol < float("inf")):
        raise UsageError(f"rtol must be a number of at least 0, not {rtol!r}")
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise UsageError(f"the keys and values of metadata must be strings, not {metadata!r}")
    args, named = copy_inputs(*resolve(module, example_inputs, kwargs), "cpu")
    listed = is_list_of_images(args)
    plan = Plan(args, named, not listed if dynamic_batch is None else dynamic_batch, dynamic_size, opset)
    outputs = run_reference(_prepared(module), args, named)
    properties = {**_provenance(module, args, named), **(metadata or {})}
    failed: list[ExportError] = []
    for name in [exporter] if exporter else ["torchscript"] if listed else EXPORTERS:
        with _draft(path) as draft:
            try:
                order = plan.order(_prepared(module), outputs, frozen=not verify)
                made = _write(name, order, draft, {"surgery.exporter": name, **properties})
                size = sum(file.stat().st_size for file in draft.parent.iterdir())
                done = Export(path, name, made, plan.open_names, size)
                if verify:
                    found = _compare(name, order, plan, draft, rtol)
                    done = replace(done, **asdict(found), batches=plan.batches, image_sizes=plan.other_sizes)
            except ExportError as error:
                failed.append(error)
                continue
            _place(draft, path, force)
        return done
    hint = (
        " (dynamic_batch=False fixes the batch to that of the example inputs: --fixed-batch)"
        if plan.dynamic_batch
        else ""
    )
    raise ExportError("; ".join(dict.fromkeys(map(str, failed))) + hint) from failed[0]


def _prepared(module: nn.Module) -> nn.Module:
    model = exportable_copy(module)
    open_outputs(model)
    return model


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Give a path for the file until it is checked, in a folder of its own next to ``path``; nobody else writes it."""
    with hold(path):
        folder = make_staging(path)
        try:
            yield folder / path.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _refuse_path(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {path}: it is not a regular file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; pass force=True (--force) to replace it")


def _place(draft: Path, path: Path, force: bool) -> None:
    """Move the written files to their place.

    An old graph with weights next to it is removed first, and the new graph is moved last: a run that is killed leaves
    no graph with the weights of another.
    """
    graph_last = sorted(draft.parent.iterdir(), key=lambda file: file == draft)
    for file in graph_last:  # the weights' file, or one that has appeared meanwhile, may be someone else's
        _refuse_path(path.parent / file.name, force)
    if path.exists() and _weights_file(path).is_file():
        path.unlink()
        _weights_file(path).unlink()
    for file in graph_last:
        if force or not _link(file, path.parent / file.name):
            os.replace(file, path.parent / file.name)


def _link(file: Path, target: Path) -> bool:
    """Give a file another name, in one step that fails if that exists; False where the file system has no links."""
    try:
        os.link(file, target)
    except FileExistsError:
        raise UsageError(f"{target} has appeared meanwhile: choose another name") from None
    except OSError:
        return False
    return True


def _weights_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _write(exporter: str, order: Order, path: Path, properties: Mapping[str, str]) -> int:
    """Convert, annotate, save and check; return the opset of the file."""
    model = convert(exporter, order)
    _annotate(model, properties)
    size = sum(weight.const_value.nbytes for weight in model.graph.initializers.values() if weight.const_value)
    ir.save(model, path, external_data=_weights_file(path).name if size > _INLINE_LIMIT else None)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the model that {exporter} made is not valid ONNX: {squash(error)}") from error
    return model.opset_imports[""]


def _compare(exporter: str, order: Order, plan: Plan, path: Path, rtol: float | None) -> Parity:
    """Compare the file with the model; if a detection model detects nothing, again without its score threshold."""
    default = DETECTIONS_RTOL if are_detections(order.outputs) else RTOL
    rtol = default if rtol is None else rtol
    found = parity(path, order.model, plan.cases(), rtol)
    if found.detections == 0 and without_threshold(order.model):
        with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
            bare = Path(folder) / path.name
            _write(exporter, order, bare, {})
            found = parity(bare, order.model, plan.cases(), rtol)
    if found.detections == 0:
        raise ExportError(
            "nothing was detected on the example inputs, so that there was nothing to compare: give inputs on which "
            "the model detects something (example_inputs), or waive the check (verify=False)"
        )
    return found


def _provenance(module: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, str]:
    """Collect the properties that say where the file comes from."""
    facts = {"version": __version__, "torch": torch.__version__, "onnx": onnx.__version__}
    with contextlib.suppress(UsageError):  # a module that was not traced has neither
        source, made = tracing.info(module).source, recipe(module).to_json()
        facts |= {"recipe_sha256": hashlib.sha256(made.encode()).hexdigest()}
        facts |= {"recipe": made} if len(made) <= _INLINE_RECIPE else {}
        facts |= {} if source is None else {"source": source}
    with contextlib.suppress(UsageError):  # shapes that depend on values have no count
        paper = cost(module, args, kwargs=kwargs)
        facts |= {"macs": str(paper.macs), "params": str(paper.params)}
    return {f"surgery.{key}": value for key, value in facts.items()}


def _annotate(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Add the file's properties, and drop the exporter's debugging notes, which quote the source tree of this machine.

    Each node keeps the names of its layers, which profiles are read by.
    """
    kept = "pkg.torch.onnx.name_scopes"
    model.metadata_props.update(properties)
    model.graph.metadata_props.clear()
    for owner in (model.graph, *(function.graph for function in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(owner):
            node.doc_string = None
            scopes = node.metadata_props.get(kept)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[kept] = scopes
