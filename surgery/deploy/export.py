"""Export to ONNX: the file is compared with torch, in ONNX Runtime, before anything appears at its path."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from surgery.deploy.cost import cost
from surgery.deploy.inputs import Args, Kwargs, batch_of, resolve, squashed, tensors
from surgery.deploy.parity import parity, reference
from surgery.errors import ExportError, UsageError
from surgery.graph import tracing
from surgery.passes.recipe import recipe
from surgery.version import __version__

CHECKED_BATCHES = (1, 2, 3)
_EXPORT_BATCH = 2
"""Not 1: a dimension of length 1 broadcasts, so an exporter may take it for a constant."""

_INLINE_LIMIT = 2**31 - 2**24
"""Weights, in bytes, above which they are kept beside the graph: protobuf reads no message of 2 GiB or more."""


@dataclass(frozen=True)
class Export:
    """An ONNX file that was written, and how far its outputs are from torch's.

    ``bytes`` includes the external weights, if any. ``max_abs`` is the largest absolute difference over all outputs and
    all of ``batches``; ``max_rel`` the largest, over outputs, of max|onnx - torch| / max|torch|. Both are None, and
    ``batches`` is empty, where the check was waived.
    """

    path: Path
    opset: int
    bytes: int
    max_abs: float | None
    max_rel: float | None
    batches: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same, as plain JSON data."""
        return {**asdict(self), "path": str(self.path), "batches": list(self.batches)}


def export_onnx(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    opset: int | None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
    rtol: float = 1e-4,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Export:
    """Write ``module``, in eval mode, as an ONNX model that ONNX Runtime computes alike.

    Args:
        module: any module. It is not modified.
        path: the file to write; its folder must exist. Weights above 2 GiB go to ``<path>.data`` beside it.
        example_inputs: a tensor or a tuple of positional inputs, ``kwargs`` the named ones; a traced module needs none.
        opset: the version of the ONNX operator set; torch's default where None.
        dynamic_batch: leave axis 0 of the inputs open (named ``batch``) and check batches 1, 2 and 3; otherwise the
            file is for the batch of the inputs alone.
        verify: compare with torch. Without it, only the exporter's and `onnx.checker`'s word is taken.
        rtol: the largest relative error that passes: per output, max|onnx - torch| / max|torch|.
        metadata: added to the properties the file carries (versions, source, hash of the recipe, MACs, parameters).
        force: replace ``path`` if it exists.

    Raises:
        UsageError: the path or the inputs are not usable.
        ExportError: the module cannot be exported, or its export does not match it; no file is left.
    """
    path = Path(path)
    _refuse_path(path, force)
    args, named = resolve(module, example_inputs, kwargs)
    model = copy.deepcopy(module).eval().cpu()

    def inputs_at(batch: int | None) -> tuple[Args, Kwargs]:
        at: tuple[Args, Kwargs] = pytree.tree_map_only(
            torch.Tensor, torch.Tensor.cpu, resolve(module, example_inputs, kwargs, batch_size=batch)
        )
        return at

    outputs = reference(model, *inputs_at(None))
    with _quietly():
        program = _convert(model, *inputs_at(_EXPORT_BATCH if dynamic_batch else None), outputs, opset, dynamic_batch)
        _annotate(program.model, {**_provenance(module, args, named), **(metadata or {})})
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        draft = Path(folder) / path.name
        draft_opset = _write(program, draft)
        del program  # a second copy of the weights
        batches: tuple[int | None, ...] = CHECKED_BATCHES if dynamic_batch else (batch_of(args, named),)
        max_abs, max_rel = parity(draft, model, inputs_at, batches, rtol) if verify else (None, None)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == draft):  # the graph last: it names the rest
            os.replace(file, path.parent / file.name)
    return Export(path, draft_opset, size, max_abs, max_rel, tuple(b for b in batches if b) if verify else ())


def _refuse_path(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; pass force=True (--force) to replace it")


def _convert(
    model: nn.Module, args: Args, kwargs: Kwargs, outputs: Any, opset: int | None, dynamic_batch: bool
) -> torch.onnx.ONNXProgram:
    shapes = None
    if dynamic_batch:
        batch = Dim("batch")
        collection = ShapesCollection()  # type: ignore[no-untyped-call]
        for tensor in tensors((args, kwargs)):
            if tensor.ndim and tensor.shape[0] == _EXPORT_BATCH:
                collection[tensor] = {0: batch}
        shapes = collection.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
    try:
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=shapes,
            output_names=_output_names(model, outputs),
        )
    except torch.onnx.OnnxExporterError as error:
        fixed = " with an open batch; dynamic_batch=False fixes it" if dynamic_batch else ""
        raise ExportError(f"{type(model).__name__} cannot be exported{fixed}: {squashed(_innermost(error))}") from error
    assert program is not None  # it is None for the TorchScript exporter only
    if opset is not None and program.model.opset_imports[""] != opset:
        raise ExportError(f"opset {opset} cannot be had: the exporter made opset {program.model.opset_imports['']}")
    return program


def _output_names(model: nn.Module, outputs: Any) -> list[str]:
    """``output``, or the keys that lead to each output: ``{"out": a, "aux": (b, c)}`` gives out, aux_0 and aux_1."""
    taken = set(inspect.signature(model.forward).parameters)  # an output of an input's name would be that input
    names = []
    for keys, leaf in pytree.tree_flatten_with_path(outputs)[0]:
        if leaf is None:
            continue
        name = re.sub(r"\W+", "_", pytree.keystr(keys)).strip("_")
        if not name or name[0].isdigit():
            name = f"output_{name}".rstrip("_")
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _provenance(module: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, str]:
    """What the file says about where it comes from."""
    facts = {"version": __version__, "torch": torch.__version__}
    with contextlib.suppress(UsageError):  # a module that was not traced has neither
        source = tracing.info(module).source
        facts |= {"recipe_sha256": hashlib.sha256(recipe(module).to_json().encode()).hexdigest()}
        facts |= {} if source is None else {"source": source}
    with contextlib.suppress(UsageError):  # shapes that depend on values have no count
        paper = cost(module, args, kwargs=kwargs)
        facts |= {"macs": str(paper.macs), "params": str(paper.params)}
    return {f"surgery.{key}": value for key, value in facts.items()}


def _annotate(model: Any, properties: Mapping[str, str]) -> None:
    """Add the file's properties, and drop the exporter's debugging notes, which quote the source tree of this machine.

    Of those, each node keeps the names of the layers it comes from: a profile is read by them.
    """
    kept = "pkg.torch.onnx.name_scopes"
    model.metadata_props.update(properties)
    model.graph.metadata_props.clear()
    for owner in (model.graph, *model.functions.values()):
        for node in owner.all_nodes():
            scopes = node.metadata_props.get(kept)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[kept] = scopes


def _write(program: torch.onnx.ONNXProgram, path: Path) -> int:
    """Save and check the file; its opset."""
    weights = [value.const_value for value in program.model.graph.initializers.values()]
    size = sum(weight.nbytes for weight in weights if weight is not None)
    program.save(path, external_data=size > _INLINE_LIMIT)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported model is not valid ONNX: {squashed(error)}") from error
    return int(program.model.opset_imports[""])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter prints, logs and warns of: what matters of it is raised.

    Standard error is left alone, for a progress bar may be drawn there meanwhile; the exporter's own messages reach it
    through ``logging`` and ``warnings`` only.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
