"""One model for exports.py: ``python exports_model.py NAME VARIANT FILE`` writes what came of it to FILE, as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

import surgery
from benchmarks.coverage.model import randomised
from surgery import models as catalogue
from surgery.errors import SurgeryError
from surgery.graph.batches import tensors

DETECTION_SIZE = 320
"""Pixels to which detection models resize the height of images, but for those that have no choice."""
BATCHES = (1, 2, 3)
"""The lengths of the list of images that a detection model is exported for, one after the other."""


def main() -> None:
    name, variant, file = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    source = source_of(name, variant)
    begun = time.perf_counter()
    row: dict[str, Any] = {"source": source, "variant": variant, "step": "build"}

    def note(**facts: Any) -> None:
        row.update(facts)
        row["seconds"] = round(time.perf_counter() - begun, 1)
        file.write_text(json.dumps(row))

    note()
    inputs = inputs_of(name, source, variant, 2)
    model = settled(randomised(catalogue.build(source, seed=0)).eval(), inputs)
    if variant == "slim":
        note(step="slim")
        model = surgery.slim(surgery.trace(model, inputs, source=source), 0.5)
    note(step="export", input_shapes=[list(tensor.shape) for tensor in tensors(inputs)][:2])
    files = []
    for batch in BATCHES if isinstance(inputs[0], list) else (None,):
        given = inputs if batch is None else inputs_of(name, source, variant, batch)
        try:
            files.append(exported(model, given))
        except SurgeryError as error:
            note(error=str(error), step=None)
            return
        note(files=files)
    note(step=None)


def source_of(name: str, variant: str) -> str:
    """The model as it is exported: but as ``built`` in its small form, and detection models for smaller images."""
    entry = catalogue.CATALOGUE[name]
    if variant != "built":
        return entry.small_source
    return f"{name}?min_size={DETECTION_SIZE}" if "min_size" in entry.small else name


def inputs_of(name: str, source: str, variant: str, batch: int) -> tuple[Any, ...]:
    """Images of the published size as ``built``, else of the smallest."""
    small = variant != "built"
    images = catalogue.small_inputs(name, batch) if small else catalogue.example_inputs(source, batch_size=batch)
    return images if isinstance(images, tuple) else (images,)


def exported(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """What `export_onnx` says; the number of nodes; and the norms that could have been folded and were not."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = surgery.export_onnx(model, Path(folder) / "model.onnx", example_inputs=inputs).to_dict()
        graph = onnx.load(Path(folder) / "model.onnx", load_external_data=False).graph
        files = sorted(file.name for file in Path(folder).iterdir())
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    unfolded = [
        node.name
        for node in graph.node
        if node.op_type == "BatchNormalization"
        and (before := makers.get(node.input[0])) is not None
        and before.op_type in ("Conv", "ConvTranspose", "Gemm")
        and readers[node.input[0]] == 1
    ]
    seconds = round(time.perf_counter() - begun, 1)
    return {**found, "path": None, "files": files, "nodes": len(graph.node), "unfolded": unfolded, "seconds": seconds}


def settled(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """The model with its BatchNorms' statistics fitted to the inputs, so that nothing vanishes or explodes.

    They divide by the root mean square, and shift by a random tenth of it: by the variance would blow up the little by
    which an untrained network tells inputs apart, and float32 rounding with it.
    """
    generator = torch.Generator().manual_seed(0)

    def fit(norm: Any, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0]
        norm.running_var = x.square().mean([axis for axis in range(x.ndim) if axis != 1]).clamp_min(1e-8)
        norm.running_mean = norm.running_var.sqrt() * torch.randn(norm.num_features, generator=generator) / 10

    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(fit) for norm in norms]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return model


if __name__ == "__main__":
    main()
