"""How much faster are slim models, and how much faster should they be? Measured speed-up beside the MACs ratio.

    python -m benchmarks.inference                          # benchmarks/results/inference.{json,md,png}
    python -m benchmarks.inference --models resnet18,vgg16 --batch-sizes 1 --out inference.json
    python -m benchmarks.inference --draw                   # the table and the picture of what is there

Each model is slimmed at each split rate (random weights: speed does not depend on them) and exported to ONNX, and the
files take turns, see `surgery.compare`: on ONNX Runtime on the CPU, and on the GPU where there is one; what is not here
is listed as missing. A speed-up is the dense model's latency over the slim one's; its efficiency, the part of the MACs
ratio that it is. Where that is below 0.8 for a rate of 0.5, on the CPU, both files are profiled, and a table says which
types of operators did not get faster by as much.

Measurements are written to the JSON file model by model and not repeated: a killed benchmark goes on where it was.
With ``--again`` those are, whose A/A check found the machine too noisy.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import surgery
from benchmarks.inference.profile import time_by_operator
from benchmarks.inference.report import draw, markdown
from benchmarks.results_io import RESULTS, new_document, open_document, read_document, write_document, write_report
from surgery import models as catalogue
from surgery.deploy.measure.environment import usable_cores
from surgery.errors import UsageError
from surgery.units import quantity

MODELS = (
    "resnet18", "resnet50", "vgg16", "densenet121", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16", "swin_t"
)  # fmt: skip
RATES = (1.0, 0.75, 0.5, 0.25)
EFFICIENT = 0.8
"""The least part of the MACs ratio that a speed-up should be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names of the catalogue")
    parser.add_argument("--batch-sizes", default="1,32")
    parser.add_argument("--devices", default="cpu,cuda")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--round-to", type=int, default=1, help="round widths up to a multiple of this")
    parser.add_argument("--sessions", type=int, default=8, help="how often each model is set up afresh")
    parser.add_argument("--min-runs", type=int, default=40)
    parser.add_argument("--min-seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "inference.json", help="table and picture go beside it")
    parser.add_argument("--again", action="store_true", help="measure anew what the machine was too noisy for")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    out: Path = options.out
    if options.draw:
        report(read_document(out), out)
        return
    settings = {key: getattr(options, key) for key in ("round_to", "threads", "sessions", "min_runs", "min_seconds")}
    document = open_document(out, {"runs": [], "settings": settings, "measured": []})
    run = new_document("inference")
    if options.again:
        document["measured"] = [one for one in document["measured"] if not one.get("too_noisy")]
    for name in options.models.split(","):
        wanted = [(d, int(b)) for d in options.devices.split(",") for b in options.batch_sizes.split(",")]
        there = {(m["device"], m["batch_size"]) for m in document["measured"] if m["model"] == name}
        missing = [one for one in wanted if one not in there]
        if missing:
            if run not in document["runs"]:
                document["runs"].append(run)
            found = measure(name, missing, settings)
            document["measured"] += [{**one, "run": document["runs"].index(run)} for one in found]
            write_document(out, document)
    report(document, out)


def measure(name: str, wanted: list[tuple[str, int]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One model at all rates, on each device and at each batch size that is ``wanted``."""
    source = catalogue.canonical(name)
    images = catalogue.example_inputs(source)
    dense = surgery.trace(catalogue.build(source, seed=0).eval(), images, source=source)
    timing = {key: value for key, value in settings.items() if key != "round_to"}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for rate in RATES:
            files[str(rate)] = Path(folder) / f"{rate}.onnx"
            slim = dense if rate == 1 else surgery.slim(dense, rate, round_to=settings["round_to"])
            surgery.export_onnx(slim, files[str(rate)], verify=False)
        for device, batch_size in wanted:
            record = {"model": name, "device": device, "batch_size": batch_size}
            try:
                compared = surgery.compare(files, device=device, batch_size=batch_size, memory=False, **timing)
            except UsageError as reason:
                found.append({**record, "missing": str(reason)})
                continue
            macs = {rate: result.macs or 0 for rate, result in compared.results.items()}
            points = {
                rate: {
                    "macs": macs[rate],
                    "params": result.params,
                    "p50_ms": result.p50_ms,
                    "p99_ms": result.p99_ms,
                    "iqr_ms": result.iqr_ms,
                    "throughput": result.throughput,
                    "macs_ratio": macs["1.0"] / macs[rate],
                    "notes": list(result.notes),
                    "samples_ms": [round(ms, 5) for ms in result.samples_ms],
                }
                for rate, result in compared.results.items()
            }
            for rate, ratio in compared.ratios.items():
                points[rate]["speedup"] = {"value": 1 / ratio.value, "low": 1 / ratio.high, "high": 1 / ratio.low}
            check = compared.to_dict()["check"]
            done = {**record, "points": points, "check": check, "too_noisy": compared.too_noisy or None}
            half = points["0.5"]
            if device == "cpu" and half["speedup"]["value"] < EFFICIENT * half["macs_ratio"]:
                done["profiles"] = profiles(files, images, batch_size, settings["threads"])
            found.append(done)
            print(f"{name} on {device}, batch {batch_size}: {quantity(macs['1.0'])} MACs, measured", flush=True)
    return found


def profiles(files: dict[str, Path], images: Any, batch_size: int, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds by type of operator, of the dense model and of the one at 0.5."""
    image = images if isinstance(images, torch.Tensor) else images[0]
    array = np.random.default_rng(0).standard_normal((batch_size, *image.shape[1:])).astype(np.float32)
    return {rate: time_by_operator(files[rate], [array], threads=threads) for rate in ("1.0", "0.5")}


def report(document: dict[str, Any], out: Path) -> None:
    draw(document, out.with_suffix(".png"))
    write_report(out, markdown(document))


if __name__ == "__main__":
    main()
