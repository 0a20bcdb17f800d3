"""How much memory running a model takes, measured in a fresh process.

This file is also the program of that process, which is why it imports nothing but the standard library at its top: an
import made before the baseline is read would be hidden, one made after it would count as the model's.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_RUNS = 3
_STATUS = Path("/proc/self/status")


class UnmeasuredError(Exception):
    """The memory could not be measured; the message says why."""


def peak_memory(runtime: str, model: Path, inputs: Path, threads: int) -> int:
    """Bytes by which a fresh process's resident set peaks above its baseline while it loads and runs a model.

    The baseline is read once the interpreter and the runtime are loaded; the peak (the kernel's own high-water mark,
    not samples of it) covers loading the model and three runs. So it holds weights, activations, whatever loading
    needs for a moment, and what the runtime sets aside for itself; it leaves out the libraries' code read before.

    Args:
        runtime: ``"onnxruntime"``, ``model`` being an ONNX file and ``inputs`` an ``.npz`` of its inputs in order; or
            ``"torch"``, where `torch.save` wrote the module to ``model`` and ``(args, kwargs)`` to ``inputs``.
        threads: intra-op threads of the run.

    Raises:
        UnmeasuredError: the system keeps no high-water mark (it is Linux that does), or the run failed.
    """
    if not _STATUS.exists():
        raise UnmeasuredError(f"peak memory is not measured on {sys.platform}: it needs the high-water mark of Linux")
    worker = [sys.executable, "-P", str(Path(__file__).resolve()), runtime, str(model), str(inputs), str(threads)]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # the module's classes are found
    done = subprocess.run(worker, env=where, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnmeasuredError(f"peak memory could not be measured in a fresh process: {last}")
    return int(done.stdout.split()[-1])


def _measure(load: Callable[[], Callable[[], object]]) -> int:
    gc.collect()
    with contextlib.suppress(OSError):  # not every kernel lets the mark be reset; then growth is a lower bound
        Path("/proc/self/clear_refs").write_text("5")
    baseline = _high_water()
    run = load()
    for _ in range(_RUNS):
        run()
    return _high_water() - baseline


def _high_water() -> int:
    """The largest resident set so far, in bytes."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def _onnxruntime(model: Path, inputs: Path, threads: int) -> int:
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with numpy.load(inputs) as arrays:
        values = list(arrays.values())

    def load() -> Callable[[], object]:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = {node.name: value for node, value in zip(session.get_inputs(), values, strict=True)}
        return lambda: session.run(None, feed)

    return _measure(load)


def _torch(model: Path, inputs: Path, threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    # On the meta device the weights are left out, but every class the module needs is imported before the baseline.
    torch.load(model, weights_only=False, map_location="meta")
    args, kwargs = torch.load(inputs, weights_only=False)
    torch.nn.functional.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))

    def load() -> Callable[[], object]:
        module = torch.load(model, weights_only=False)
        return lambda: module(*args, **kwargs)

    with torch.inference_mode():
        return _measure(load)


if __name__ == "__main__":
    runtimes = {"onnxruntime": _onnxruntime, "torch": _torch}
    sys.stdout.write(f"{runtimes[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))}\n")
