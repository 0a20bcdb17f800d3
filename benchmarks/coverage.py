"""Every operation on every model of the catalogue, in float64 with random weights and random norm statistics.

    python benchmarks/coverage.py                   # all models: benchmarks/results/coverage.{json,md}
    python benchmarks/coverage.py resnet18 alexnet  # some models, printed only

Errors are relative: the largest absolute difference over the largest magnitude. `ideal` is the cost in which every
hidden channel axis is cut to ceil(s * n), or doubled, and only the network's input channels and outputs stay whole.
Each model runs in a process of its own. A model of more than `HALF_WIDTH` parameters is widened from its half-width
version, for the widened float64 copy would not fit in memory; its parameter ratio is still that of the full model.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import surgery
from surgery import catalogue
from surgery.deploy.environment import environment
from surgery.passes.deepen import deepen_plan

HALF_WIDTH = 100_000_000
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names from the catalogue; all by default")
    parser.add_argument("--out", type=Path, help="folder for coverage.json and coverage.md")
    options = parser.parse_args()
    names = options.models or list(catalogue.CATALOGUE)
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in names:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            rows.append(pool.submit(measure, name).result())
        print(_line(rows[-1]), flush=True)
    summary = {
        "command": "python benchmarks/coverage.py " + " ".join(options.models),
        "date": date.today().isoformat(),
        "device": environment().cpu,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "models": rows,
    }
    print(f"{len(rows)} models, {sum(not r['failures'] for r in rows)} without a failure, {summary['minutes']} minutes")
    out = options.out or (None if options.models else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "coverage.json").write_text(json.dumps(summary, indent=1) + "\n")
        (out / "coverage.md").write_text(_markdown(summary))


def measure(name: str) -> dict[str, Any]:
    """One row: errors, costs and seconds of every operation on one model."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = randomised(catalogue.build(name, seed=0)).double().eval()
    x = catalogue.example_inputs(name, image_size=catalogue.CATALOGUE[name].smallest).double()
    row: dict[str, Any] = {"model": name, "image_size": x.shape[-1], "parameters": _parameters(model), "failures": []}

    def timed(label: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        row[f"{label}_seconds"] = round(time.perf_counter() - begin, 3)
        return result

    def check(label: str, error: float, bound: float = 1e-10) -> None:
        row[label] = error
        if not error <= bound:
            row["failures"].append(label)

    traced = timed("trace", partial(surgery.trace, model, x, source=f"torchvision:{name}"))
    check("trace_eval", difference(traced, model, x))
    check("trace_train", difference(traced, model, x, train=True))
    del model
    groups = timed("groups", lambda: surgery.dimension_groups(traced))
    row["groups"] = len(groups)
    row["editable"] = sum(g.editable for g in groups)
    row["left_alone"] = {g.name: g.reason for g in groups if g.reason}

    permuted = timed(
        "permute", lambda: surgery.reindex(traced, {g.name: g.permutation(1) for g in groups if g.editable})
    )
    check("permute_error", difference(permuted, traced, x))
    del permuted
    slim = timed("slim", lambda: surgery.slim(traced, 0.5))
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    check("slim_error", difference(slim, masked, x))
    del masked
    dense_macs, dense_parameters = _macs(traced, x), row["parameters"]
    row["slim_macs"] = _macs(slim, x) / dense_macs
    ideal_macs, _ = ideal(traced, x, lambda n: math.ceil(n / 2))
    row["slim_macs_ideal"] = ideal_macs / dense_macs
    row["slim_parameters"] = _parameters(slim) / dense_parameters
    if row["slim_macs"] > 1.02 * row["slim_macs_ideal"]:
        row["failures"].append("slim_macs")

    row["widen_2_parameters_ideal"] = ideal(traced, x, lambda n: 2 * n)[1] / ideal(traced, x, lambda n: n)[1]
    if dense_parameters > HALF_WIDTH:
        row["widened_from"] = "half width"
        row["widen_2_parameters"] = _parameters(surgery.widen(traced.to("meta"), 2.0)) / dense_parameters
        traced = slim
    else:
        row["widen_2_parameters"] = _parameters(surgery.widen(traced, 2.0)) / dense_parameters
    if row["widen_2_parameters"] < 0.98 * row["widen_2_parameters_ideal"]:
        row["failures"].append("widen_parameters")
    for factor in (1.5, 2.0):
        wide = timed(f"widen_{factor:g}", lambda f=factor: surgery.widen(traced, f, seed=1))
        check(f"widen_{factor:g}_error", difference(wide, traced, x))
        del wide
    places = stages(traced)
    deep = timed("deepen", lambda: surgery.deepen(traced, places))
    row["deepened"] = places
    check("deepen_error", difference(deep, traced, x))
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    return row


def difference(a: nn.Module, b: nn.Module, x: torch.Tensor, train: bool = False) -> float:
    """As `surgery.verify`, but on the modules themselves: copies of the largest would not fit beside them.

    Both modules see the same batch, so their statistics stay equal in training.
    """
    outputs = []
    for module in (a, b):
        torch.manual_seed(0)
        with torch.no_grad():
            result = module.train(train)(x)
        module.eval()
        outputs.append([t for t in tree_leaves(result) if isinstance(t, torch.Tensor)])
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in zip(*outputs, strict=True))


def randomised(model: nn.Module) -> nn.Module:
    """Random affine parameters and statistics for every norm, so that no channel looks like another."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
            tensor = getattr(module, name, None)
            if tensor is not None and tensor.ndim == 1 and "Norm" in type(module).__name__:
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.5)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
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
    places = []
    for name, child in container.named_children():
        if _parameters(child):
            place = f"{path}.{name}".strip(".")
            try:
                deepen_plan(traced, [place])
            except surgery.EditError:  # auxiliary heads' parts, layers whose output is not one tensor
                continue
            places.append(place)
    return places


def ideal(module: nn.Module, x: torch.Tensor, change: Callable[[int], int]) -> tuple[float, float]:
    """MACs in evaluation, and parameters, if every hidden channel axis of n channels had ``change(n)``.

    Read layer by layer off the shapes of weights and outputs; which channels are tied does not enter.
    """
    whole = {(m.name, m.axis) for g in surgery.dimension_groups(module) if not g.editable for m in g.members}
    positions: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: Any, _: Any, out: torch.Tensor) -> None:
            positions[name] = positions.get(name, 0) + out.numel() // layer.weight.shape[0]

        return hook

    layers = {n: m for n, m in module.named_modules() if getattr(m, "weight", None) is not None and m.weight.ndim > 1}
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    macs = parameters = 0
    for name, parameter in module.named_parameters():
        sizes = list(parameter.shape)
        for axis in range(min(2, len(sizes))):
            if (name, axis) not in whole and sizes[axis] > 1:
                sizes[axis] = change(sizes[axis])
        parameters += math.prod(sizes)
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(sizes) > 1:
            macs += math.prod(sizes) * positions.get(layer, 0)
    return macs, parameters


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _macs(module: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() / 2


_ERRORS = (
    "trace_eval",
    "trace_train",
    "permute_error",
    "slim_error",
    "widen_1.5_error",
    "widen_2_error",
    "deepen_error",
)


def _line(row: dict[str, Any]) -> str:
    worst = max(row[e] for e in _ERRORS)
    failed = f"  FAILED: {', '.join(row['failures'])}" if row["failures"] else ""
    return (
        f"{row['model']:22} groups {row['editable']}/{row['groups']}  worst error {worst:.1e}  "
        f"MACs at 0.5 {row['slim_macs']:.4f} (ideal {row['slim_macs_ideal']:.4f})  "
        f"parameters at 2.0 {row['widen_2_parameters']:.3f} (ideal {row['widen_2_parameters_ideal']:.3f}){failed}"
    )


def _markdown(summary: dict[str, Any]) -> str:
    head = (
        "# Coverage\n\n"
        f"`{summary['command'].strip()}`, {summary['date']}, torch {summary['torch']}, torchvision "
        f"{summary['torchvision']}, {summary['device']}, {summary['minutes']} minutes. Errors are relative, in "
        "float64; a cost is a fraction of the dense model's, the ideal in brackets. Groups that are left alone are the "
        "network's input and outputs unless a line below the table says otherwise.\n\n"
        "| model | groups (editable) | trace eval / train | permute | slim 0.5 | widen 1.5 | widen 2.0 "
        "| deepen (places) | MACs at 0.5 | parameters at 2.0 | trace + groups, s |\n" + "|---" * 11 + "|\n"
    )
    rows = ""
    for r in summary["models"]:
        cells = [
            r["model"],
            f"{r['groups']} ({r['editable']})",
            f"{r['trace_eval']:.0e} / {r['trace_train']:.0e}",
            *(f"{r[k]:.0e}" for k in ("permute_error", "slim_error", "widen_1.5_error", "widen_2_error")),
            f"{r['deepen_error']:.0e} ({len(r['deepened'])})",
            f"{r['slim_macs']:.4f} ({r['slim_macs_ideal']:.4f})",
            f"{r['widen_2_parameters']:.3f} ({r['widen_2_parameters_ideal']:.3f})"
            + (" *" if "widened_from" in r else ""),
            f"{r['trace_seconds'] + r['groups_seconds']:.2f}",
        ]
        rows += "| " + " | ".join(cells) + " |\n"
    half = [r["model"] for r in summary["models"] if "widened_from" in r]
    notes = f"\n\\* errors of widening measured on the half-width version: {', '.join(half)}.\n" if half else ""
    for r in summary["models"]:
        odd = {n: why for n, why in r["left_alone"].items() if not set(why.split("; ")) <= _ENDS}
        notes += "".join(f"\n- {r['model']}: `{n}` left alone: {why}" for n, why in odd.items())
        if r["failures"]:
            notes += f"\n- **{r['model']} fails**: {', '.join(r['failures'])}"
    return head + rows + notes + "\n"


_ENDS = {"network input", "network output"}

if __name__ == "__main__":
    main()
