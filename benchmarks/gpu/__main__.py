"""What the package does on a GPU, in eight minutes: is it right there, how fast is it, and does it train and resume?

    python -m benchmarks.gpu                          # benchmarks/results/gpu-<name of the GPU>.{json,md}
    python -m benchmarks.gpu 'latency/*' --again      # these parts anew, the others kept
    python -m benchmarks.gpu --device cpu --small     # the same code without a GPU, for small models

Parts, each with its own limit of time:

surgery/<model>        one model a family: traced, widened and slimmed on the device, each compared with what it should
                       equal, and the slim one with that made on the CPU
latency/<runtime>/<b>  a model slimmed to 1, 0.75, 0.5 and 0.25, at batch b: eager, compiled, as CUDA graphs, by ONNX
                       Runtime with its inputs and outputs bound on the device, and by TensorRT where it is installed
memory/<runtime>       the peak of device memory at batch 32, in a fresh process
training/<precision>   steps in fp32, fp16 and bf16, and a training that is stopped and resumed against one that is not
processes/<n>          n trainings on one device at the same time, each compared with one alone

Parts run one after the other in a worker process. A part that fails is recorded with its error; after an error of the
device, at the limit of time, or where the worker dies, a new worker goes on with the next part. Results are written
part by part: a run that was ended, or that ran out of ``--minutes``, goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import part_names
from benchmarks.gpu.report import line, markdown
from benchmarks.gpu.runner import Plan, run_parts
from benchmarks.results_io import RESULTS, new_document, open_document, write_document, write_report

NO_GPU = "no GPU: torch finds no CUDA device here, so nothing was run (--device cpu runs the same code without one)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="names of parts, or globs over them; all by default")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a small model and short measurements")
    parser.add_argument("--again", action="store_true", help="run what has a result as well")
    parser.add_argument("--minutes", type=float, default=8, help="begin no part after this time")
    parser.add_argument("--out", type=Path, help="JSON file; a table goes beside it")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    out: Path = options.out or RESULTS / f"gpu-{'-'.join(name.lower().split())}.json"
    settings = {"device": options.device, "small": options.small}
    document = open_document(out, new_document("gpu", device=name, settings=settings, parts=[]))
    rows: dict[str, dict[str, Any]] = {row["part"]: row for row in document["parts"]}
    known = part_names(options.small)
    wanted = [
        part
        for part in known
        if (not options.parts or any(fnmatchcase(part, pattern) for pattern in options.parts))
        and (options.again or part not in rows)
    ]
    end = time.monotonic() + 60 * options.minutes
    for row in run_parts(Plan(tuple(wanted), options.device, options.small), end):
        print(line(row), flush=True)
        rows[row["part"]] = row
        document["parts"] = [rows[part] for part in known if part in rows]
        write_document(out, document)
        out.with_suffix(".md").write_text(markdown(document))
    missing = [part for part in known if part not in rows]
    if missing:
        print(f"not run yet: {', '.join(missing)}", file=sys.stderr)
    write_report(out, markdown(document))


if __name__ == "__main__":
    main()
