"""What gets timed: a model made ready in one runtime. Each runtime is a row of `RUNTIMES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from surgery.deploy.measure.jobs import Job, Runner, refuse_without_gpu
from surgery.deploy.measure.onnx_runtimes import onnxruntime_graphs, onnxruntime_plain, onnxruntime_tensorrt
from surgery.deploy.measure.torch_runtimes import torch_compiled, torch_eager, torch_graphs
from surgery.errors import unknown_name

RUNTIMES: Mapping[str, Callable[[Job, ExitStack], Runner]] = {
    "onnxruntime": onnxruntime_plain,
    "onnxruntime-tensorrt": onnxruntime_tensorrt,
    "onnxruntime-cuda-graphs": onnxruntime_graphs,
    "torch": torch_eager,
    "torch-compile": torch_compiled,
    "torch-cuda-graphs": torch_graphs,
}

DEVICES = ("cpu", "cuda")


@contextmanager
def ready(runtime: str, job: Job) -> Iterator[Runner]:
    """The candidate, read or exported; what was written for it is removed afterwards.

    Raises `UsageError` for a runtime or device that is unknown or not here, and, at the latest when it is started, for
    inputs that do not fit.
    """
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    if job.device not in DEVICES:
        raise unknown_name("device", job.device, DEVICES)
    refuse_without_gpu(job)
    with ExitStack() as stack:
        yield RUNTIMES[runtime](job, stack)
