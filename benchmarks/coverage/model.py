"""Every operation on one model of the catalogue, as `coverage.py` runs it: in a process of its own, in float64.

    python -m benchmarks.coverage.model resnet18 row.json

The row is written again after each step, so that what was found stays known if the process is ended in the middle.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.models.optical_flow import raft

import surgery
from benchmarks.coverage.ideal import ideals
from surgery import models as catalogue
from surgery.models.detectors import image_batch, is_detector, make_regions, raw_outputs
from surgery.operations.deepen import deepen_plan

HALF_WIDTH = 100_000_000
"""A model of more parameters is widened from its half-width version, for the widened float64 copy would not fit."""
BATCH_OF_ONE = ("mvit_v1_b", "mvit_v2_s", "ssd300_vgg16")
"""Models whose smallest input is large and whose batch statistics, if any, do not mind one sample."""
EXACT = 1e-10
BOUNDS = {"attention": 1.05, "detection or flow": 1.05, "neither": 1.02}
"""How much of the ideal MACs a slim model may need."""


def measure(name: str, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """One row: errors, costs and seconds of every operation on one model. A step that raises is one more failure."""
    warnings.filterwarnings("ignore")
    row: dict[str, Any] = {"model": name, "failures": []}
    run = _Run(name, row, write)
    for step in (run.build, run.trace, run.groups, run.permute, run.slim, run.save, run.widen, run.deepen):
        gc.collect()  # graphs and their modules know each other: large ones would stay until they are noticed
        label = step.__name__
        row["step"] = label
        write(row)
        begin = time.perf_counter()
        try:
            step()
        except Exception as error:
            row["failures"].append(label)
            row[f"{label}_said"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
            if label in ("build", "trace"):
                break
        row[f"{label}_step_seconds"] = round(time.perf_counter() - begin, 1)
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    row.pop("step")
    write(row)
    return row


class _Run:
    """The model, traced, and the inputs that it is compared on."""

    def __init__(self, name: str, row: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        self.row = row
        self.write = write
        self.entry = catalogue.CATALOGUE[name]
        self.source = catalogue.canonical(self.entry.small_source)
        batch = 1 if name in BATCH_OF_ONE else 2
        self.inputs, other = (_given(name, n) for n in (batch, batch + 1))
        self.batches = (self.inputs, other)
        self.graded = name == next(n for n, e in catalogue.CATALOGUE.items() if e.family == self.entry.family)
        self.targets: tuple[Any, ...] = ()
        if self.entry.targets:
            targets = catalogue.example_targets(self.entry.small_source, batch, self.entry.smallest)
            # torchvision takes keypoints in float32 alone
            self.targets = (
                [{k: v if k == "keypoints" else _cast(v, torch.float64) for k, v in t.items()} for t in targets],
            )
        self.counted = tuple(torch.cat([t, t])[:2] for t in self.inputs if isinstance(t, torch.Tensor))
        if self.entry.targets:
            self.counted = (torch.empty(2, *self.entry.input_size),)
        row |= {
            "family": self.entry.family,
            "source": self.source,
            "inputs": [list(t.shape) for t in tree_leaves(self.inputs)],
            "batches": [batch, batch + 1],
            "gradients": self.graded,
            "counted_on": [[1, *t.shape[1:]] for t in self.counted],
        }

    def build(self) -> None:
        torch.manual_seed(0)
        self.model = randomised(catalogue.build(self.entry.small_source, seed=0))
        changes = {"half": lambda n: math.ceil(n / 2), "double": lambda n: 2 * n}
        found = ideals(self.model, tuple(t.float() for t in self.counted), changes)
        self.row |= {
            "parameters": found["half"].dense_params,
            "macs": found["half"].dense_macs,
            "slim_macs_ideal": found["half"].macs / found["half"].dense_macs,
            "slim_parameters_ideal": found["half"].params / found["half"].dense_params,
            "widen_2_parameters_ideal": found["double"].params / found["double"].dense_params,
        }
        if self.entry.family == "RAFT":
            raft.make_coords_grid = _coordinates
        self.model = self.model.double().eval()
        kinds = (nn.LayerNorm, nn.GroupNorm)
        self.mixes = any(isinstance(m, kinds) or "LayerNorm" in type(m).__name__ for m in self.model.modules())
        self.attends = any(isinstance(getattr(m, k, None), int) for m in self.model.modules() for k in HEADS)

    def trace(self) -> None:
        self.traced = self._timed("trace", partial(surgery.trace, self.model, self.inputs, source=self.source))
        self._check("trace_eval", self._outputs(self.traced), self._outputs(self.model))
        self._check("trace_train", self._trained(self.traced), self._trained(self.model))
        del self.model
        self.reference = self._outputs(self.traced)

    def groups(self) -> None:
        groups = self._timed("groups", lambda: surgery.dimension_groups(self.traced))
        self.row["groups"] = len(groups)
        self.row["editable"] = sum(g.editable for g in groups)
        self.row["left_alone"] = {g.name: g.reason for g in groups if g.reason}

    def permute(self) -> None:
        groups = surgery.dimension_groups(self.traced)
        index = {g.name: g.permutation(1) for g in groups if g.editable}
        permuted = self._timed("permute", lambda: surgery.reindex(self.traced, index))
        self._check("permute_error", self._outputs(permuted), self.reference)

    def slim(self) -> None:
        slim = self._timed("slim", lambda: surgery.slim(self.traced, 0.5))
        row = self.row
        row["slim_macs"] = surgery.cost(slim, self._sample()).macs / row["macs"]
        row["slim_parameters"] = _parameters(slim) / row["parameters"]
        kind = "detection or flow" if self.entry.targets or self.entry.kind == "two images" else "neither"
        row["slim_macs_bound"] = BOUNDS["attention" if self.attends else kind]
        self.slimmed = slim
        self.slim_reference = self._outputs(slim)
        if difference(self.slim_reference, self.reference) < 1e-6:
            row["failures"].append("outputs do not depend on what was cut")
        if not row["slim_macs"] <= row["slim_macs_bound"] * row["slim_macs_ideal"]:
            row["failures"].append("slim_macs")
        masked = surgery.masked(self.traced, surgery.split_masks(self.traced, 0.5))
        self._check("slim_error", self.slim_reference, self._outputs(masked))

    def save(self) -> None:
        slim, dtype, expected = self.slimmed, torch.float64, self.slim_reference
        if self.entry.family == "RAFT":  # what is loaded is built anew, in float32 and with torchvision's coordinates
            raft.make_coords_grid = COORDINATES
            self.row["load_in"] = "float32"
            dtype = torch.float32
            model = randomised(catalogue.build(self.source, seed=0)).eval()
            slim = surgery.slim(surgery.trace(model, _cast(self.inputs, dtype), source=self.source), 0.5)
            expected = self._outputs(slim, dtype)
        with tempfile.TemporaryDirectory() as folder:
            self._timed("save", lambda: surgery.save(slim, Path(folder) / "slim"))
            loaded = self._timed("load", lambda: surgery.load(Path(folder) / "slim"))
        self._check("load_error", self._outputs(loaded, dtype), expected)
        if self.entry.family == "RAFT":
            raft.make_coords_grid = _coordinates

    def widen(self) -> None:
        row = self.row
        base, reference = self.traced, self.reference
        if row["parameters"] > HALF_WIDTH:
            row["widened_from"] = "half width"
            wide = surgery.widen(self.traced.to("meta"), 2.0)  # what held its weights is needed no more
            row["widen_2_parameters"] = _parameters(wide) / row["parameters"]
            base, reference = self.slimmed, self.slim_reference
        for factor in (2.0,) if self.mixes else (2.0, 1.5):
            wide = self._timed(f"widen_{factor:g}", partial(surgery.widen, base, factor, seed=1))
            if factor == 2.0 and base is self.traced:
                row["widen_2_parameters"] = _parameters(wide) / row["parameters"]
            if factor == 2.0:
                row["widen_2_macs"] = surgery.cost(wide, self._sample()).macs / surgery.cost(base, self._sample()).macs
            self._check(f"widen_{factor:g}_error", self._outputs(wide), reference)
            del wide
        if row["widen_2_parameters"] < 0.98 * row["widen_2_parameters_ideal"]:
            row["failures"].append("widen_parameters")

    def deepen(self) -> None:
        half = "widened_from" in self.row
        base, reference = (self.slimmed, self.slim_reference) if half else (self.traced, self.reference)
        places = stages(base)
        self.row["deepened"] = places
        if not places:
            self.row["failures"].append("deepen_places")
            return
        deep = self._timed("deepen", lambda: surgery.deepen(base, places))
        self.row["deepen_parameters"] = _parameters(deep) / _parameters(base)
        self._check("deepen_error", self._outputs(deep), reference)

    def _sample(self) -> tuple[torch.Tensor, ...]:
        """What costs are counted on: one image of a detection model, as its transform would have resized it."""
        return tuple(t[:1].double() for t in self.counted)

    def _outputs(self, module: nn.Module, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """What a module computes in evaluation at each batch size; the raw outputs of a detection model's heads. Of one
        model of each family also the gradients of the inputs, for a loss that weighs every number differently."""
        module.eval()
        found = []
        for inputs in self.batches:
            torch.manual_seed(0)
            inputs = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(self.graded), _cast(inputs, dtype))
            with torch.set_grad_enabled(self.graded):
                results = self._heads(module, inputs)
            if self.graded:
                weights = torch.Generator().manual_seed(1)
                loss = [
                    (t * torch.randn(t.shape, generator=weights, dtype=dtype)).sum() for t in results if t.requires_grad
                ]
                results = [t.detach() for t in results] + list(torch.autograd.grad(sum(loss), tree_leaves(inputs)))
            found += results
        return found

    def _heads(self, module: nn.Module, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
        if not is_detector(module):
            return _tensors(module(*inputs))
        batch = image_batch(module, inputs[0])
        return _tensors(raw_outputs(module, batch, make_regions(batch)))

    def _trained(self, module: nn.Module) -> list[torch.Tensor]:
        """What a module computes in training, of a detection model the losses."""
        torch.manual_seed(0)
        with torch.no_grad():
            result = module.train()(*copy.deepcopy(self.inputs), *copy.deepcopy(self.targets))
        module.eval()
        return _tensors(result)

    def _timed(self, label: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        self.row[f"{label}_seconds"] = round(time.perf_counter() - begin, 3)
        return result

    def _check(self, label: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        error = difference(found, expected)
        self.row[label] = error
        if not error <= EXACT:
            self.row["failures"].append(label)
        self.write(self.row)


HEADS = ("num_heads", "n_heads")
COORDINATES = raft.make_coords_grid


def _given(name: str, batch: int) -> tuple[Any, ...]:
    given = catalogue.small_inputs(name, batch)
    return _cast(given if isinstance(given, tuple) else (given,), torch.float64)


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest over all outputs of the largest absolute difference over the largest magnitude."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    errors = [0.0]
    for p, q in zip(found, expected, strict=True):
        if q.numel():
            scale = q.abs().max().item()
            errors.append((p - q).abs().max().item() / (scale or 1.0))
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def randomised(model: nn.Module) -> nn.Module:
    """Random values where torchvision starts from constants, so that no channel looks like another and none is silent.

    Affine parameters and statistics of norms, biases, the layer scales of ConvNeXt, and the weights that start at zero,
    as the head of the Vision Transformer does, behind which nothing could be seen.
    """
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.numel() < 2 or (tensor != tensor.flatten()[0]).any():
            continue
        if name.endswith("running_mean") or (tensor.ndim == 1 and not tensor.any()):
            fill(tensor, -0.5, 0.5)
        elif tensor.any():
            fill(tensor, 0.5, 1.5)
        else:
            scale = math.prod(tensor.shape[1:]) ** -0.5
            fill(tensor, -scale, scale)
    return model


def stages(traced: nn.Module) -> list[str]:
    """One place per stage: the children of the smallest container that holds nearly all of the parameters."""
    container, path = traced, ""
    while True:
        total = _parameters(container)
        main = [(n, c) for n, c in container.named_children() if any(True for _ in c.children())]
        main = [(n, c) for n, c in main if _parameters(c) > 0.9 * total]
        if not main:
            break
        path = f"{path}.{main[0][0]}".strip(".")
        container = main[0][1]
    return list(_places(traced, container, path))


def _places(traced: nn.Module, container: nn.Module, path: str) -> Iterator[str]:
    """The children that can be deepened; of one that cannot, such as a pyramid of several outputs, and of a head that
    writes predictions, its own children."""
    for name, child in container.named_children():
        place = f"{path}.{name}".strip(".")
        if not _parameters(child):
            continue
        if not name.endswith("_head") and _can_be_deepened(traced, place):
            yield place
        else:
            yield from _places(traced, child, place)


def _can_be_deepened(traced: nn.Module, place: str) -> bool:
    """Parts of auxiliary heads cannot, nor what has several outputs."""
    try:
        deepen_plan(traced, [place])
    except surgery.SurgeryError:
        return False
    return True


def _coordinates(batch_size: int, h: int, w: int, device: str = "cpu") -> torch.Tensor:
    """torchvision's function in float64: with its coordinates in float32, RAFT does not run in float64 at all."""
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1]).double()[None].repeat(batch_size, 1, 1, 1)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _write(file: Path, row: dict[str, Any]) -> None:
    staged = file.with_suffix(".part")
    staged.write_text(json.dumps(row))
    staged.replace(file)


if __name__ == "__main__":
    measure(sys.argv[1], partial(_write, Path(sys.argv[2])))
