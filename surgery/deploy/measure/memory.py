"""Measure the memory that running a model takes, on the host and on a GPU, in a fresh process.

This file is also the program of that process, so it imports only the standard library at its top: an import before the
baseline is read would be hidden, and one after it would count as the model's.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RUNS = 3
_STATUS = Path("/proc/self/status")


class UnmeasuredError(Exception):
    """The memory could not be measured; the message says why."""


@dataclass(frozen=True)
class Peak:
    """Bytes of memory that a model takes at most, as in `peak_memory`; ``device`` is None if it uses none."""

    host: int
    device: int | None = None


def peak_memory(runtime: str, model: Path, inputs: Path, threads: int, device: str = "cpu") -> Peak:
    """Measure by how many bytes the memory of a fresh process peaks above its baseline while it loads and runs a model.

    The baseline is read after the interpreter and the runtime are loaded; the peak covers loading the model and three
    runs. It includes weights, activations, what loading needs for a moment, and what the runtime reserves; it leaves
    out the code of the libraries. On the host it is the peak of the resident set, from the kernel's high-water mark. On
    a GPU it is the decrease of free memory since the context was made, since runtimes give nothing back while they
    live: nothing else may use the GPU meanwhile.

    Args:
        runtime: ``"torch"``, where `torch.save` wrote the module to ``model`` and ``(args, kwargs)`` to ``inputs``; or
            the name of an execution provider of ONNX Runtime, ``model`` being an ONNX file and ``inputs`` an ``.npz``
            of its inputs in order.
        threads: intra-op threads of the run.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        UnmeasuredError: the system keeps no high-water mark (only Linux does), or the run failed.
    """
    if not _STATUS.exists():
        raise UnmeasuredError(f"peak memory is not measured on {sys.platform}: it needs the high-water mark of Linux")
    script = [sys.executable, "-P", str(Path(__file__).resolve())]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the module's classes are found
    worker = [*script, runtime, str(model), str(inputs), str(threads), device]
    done = subprocess.run(worker, env=where, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnmeasuredError(f"peak memory could not be measured in a fresh process: {last}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def _measure(load: Callable[[], Callable[[], object]], device: str) -> tuple[int, int | None]:
    gc.collect()
    with contextlib.suppress(OSError):  # not every kernel lets the mark be reset; then growth is a lower bound
        Path("/proc/self/clear_refs").write_text("5")
    free = _free_on_gpu() if device == "cuda" else 0
    baseline = _high_water()
    run = load()
    for _ in range(_RUNS):
        run()
    return _high_water() - baseline, free - _free_on_gpu() if device == "cuda" else None


def _high_water() -> int:
    """Read the largest resident set so far, in bytes."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def _free_on_gpu() -> int:
    """Read the free bytes on the GPU after all its work is done."""
    import torch

    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def _onnxruntime(provider: str, model: Path, inputs: Path, threads: int, device: str) -> tuple[int, int | None]:
    import numpy

    if device == "cuda":
        import torch  # noqa: F401  the CUDA libraries that come with it are those the provider finds
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with numpy.load(inputs) as arrays:
        values = list(arrays.values())

    def load() -> Callable[[], object]:
        session = onnxruntime.InferenceSession(model, options, providers=[provider])
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"no {provider}")
        feed = {node.name: value for node, value in zip(session.get_inputs(), values, strict=True)}
        return lambda: session.run(None, feed)

    return _measure(load, device)


def _torch(model: Path, inputs: Path, threads: int, device: str) -> tuple[int, int | None]:
    import torch

    torch.set_num_threads(threads)
    # On the meta device the weights are left out, but every class the module needs is imported before the baseline.
    torch.load(model, weights_only=False, map_location="meta")
    torch.nn.functional.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))

    def place(tree: Any) -> Any:
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tree)

    args, kwargs = place(torch.load(inputs, weights_only=False))

    def load() -> Callable[[], object]:
        module = torch.load(model, weights_only=False, map_location=device)
        return lambda: module(*args, **kwargs)

    with torch.inference_mode():
        return _measure(load, device)


def _main(runtime: str, model: str, inputs: str, threads: str, device: str) -> None:
    if runtime == "torch":
        found = _torch(Path(model), Path(inputs), int(threads), device)
    else:
        found = _onnxruntime(runtime, Path(model), Path(inputs), int(threads), device)
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
