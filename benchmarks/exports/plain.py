"""Is a file of `surgery.export_onnx` slower than one of a plain `torch.onnx.export`? The ratio, with its interval.

    python -m benchmarks.exports.plain                      # benchmarks/results/plain-export.{json,md}
    python -m benchmarks.exports.plain --models resnet18 --batch-sizes 1 --out plain.json

Both files are made of the same model, with random weights and its norms' statistics random, and take turns in ONNX
Runtime, see `surgery.compare`. The plain one is what ``torch.onnx.export(model, images)`` gives: of a fixed batch.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import surgery
from benchmarks.coverage.model import randomised
from benchmarks.results_io import RESULTS, new_document, write_document, write_report
from surgery import models as catalogue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet50", help="names of the catalogue")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--min-runs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "plain-export.json", help="a table goes beside it")
    options = parser.parse_args()
    timing = {"threads": options.threads, "sessions": options.sessions, "min_runs": options.min_runs}
    measured = [
        measure(name, int(batch), timing)
        for name in options.models.split(",")
        for batch in options.batch_sizes.split(",")
    ]
    document = new_document("exports.plain", measured=measured)
    write_document(options.out, document)
    write_report(options.out, markdown(document))


def measure(name: str, batch: int, timing: dict[str, Any]) -> dict[str, Any]:
    """One model at one batch size."""
    source = catalogue.canonical(name)
    images = catalogue.example_inputs(source, batch_size=batch)
    model = randomised(catalogue.build(source, seed=0)).eval()
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = Path(folder) / "plain.onnx", Path(folder) / "ours.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, images if isinstance(images, tuple) else (images,), plain, verbose=False)
        surgery.export_onnx(surgery.trace(model, images, source=source), ours, verify=False)
        compared = surgery.compare({"plain": plain, "ours": ours}, batch_size=batch, memory=False, **timing)
    said = compared.to_dict()
    record = {"model": name, "batch_size": batch, "ratio": said["ratios"]["ours"]}
    return {**record, **{key: said[key] for key in ("check", "too_noisy", "results")}}


def markdown(document: dict[str, Any]) -> str:
    """A row for each model and batch size."""
    machine = document["environment"]
    lines = [
        "# Exports by surgery and plain ones",
        "",
        f"`{document['command']}`; {machine['date'][:10]}, {machine['cpu']}, torch {machine['versions']['torch']}, "
        f"ONNX Runtime {machine['versions']['onnxruntime']}. A ratio below 1 says that the file of "
        "`surgery.export_onnx` is the faster one; intervals are of 95 %.",
        "",
        "| model | batch | plain, ms | ours, ms | ratio | interval | plain against itself |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for one in document["measured"]:
        plain, ours = (one["results"][key]["p50_ms"] for key in ("plain", "ours"))
        ratio, check = one["ratio"], one["check"]
        lines.append(
            f"| {one['model']} | {one['batch_size']} | {plain:.2f} | {ours:.2f} | {ratio['value']:.3f} | "
            f"{ratio['low']:.3f} to {ratio['high']:.3f} | {check['low']:.3f} to {check['high']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
