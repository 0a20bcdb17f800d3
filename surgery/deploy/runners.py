"""What gets timed: a model made ready in one runtime. Each runtime is a row of `RUNTIMES`."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.deploy.cost import cost
from surgery.deploy.export import export_onnx
from surgery.deploy.inputs import Args, Kwargs, refusing_bad_inputs, resolve, squashed, tensors
from surgery.deploy.memory import UnmeasuredError, peak_memory
from surgery.errors import UsageError, unknown_name

Candidate: TypeAlias = nn.Module | str | os.PathLike[str]
Array: TypeAlias = np.ndarray[Any, Any]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Job:
    """What to run, and how."""

    candidate: Candidate
    example_inputs: Any
    kwargs: Mapping[str, Any] | None
    batch_size: int
    threads: int
    device: str


@dataclass(frozen=True)
class Runner:
    """A model that is ready to be timed.

    ``run`` answers one query: it returns when the outputs are there. ``peak_memory`` measures, in bytes, and raises
    `UnmeasuredError` where it cannot. ``file_bytes``, ``macs`` and ``params`` are None where they cannot be known.
    """

    run: Callable[[], object]
    peak_memory: Callable[[], int]
    input_shapes: tuple[tuple[int, ...], ...]
    file_bytes: int | None
    macs: int | None
    params: int | None


@contextmanager
def ready(runtime: str, job: Job) -> Iterator[Runner]:
    """The candidate, loaded and run once; what was written for it is removed afterwards.

    Raises `UsageError` for a runtime or device that is unknown or not here, and for inputs that do not fit.
    """
    if runtime not in RUNTIMES:
        raise unknown_name("runtime", runtime, RUNTIMES)
    if job.device not in _PROVIDERS:
        raise unknown_name("device", job.device, _PROVIDERS)
    if job.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no GPU: torch finds no CUDA device here, so nothing was measured on one")
    with ExitStack() as stack:
        yield RUNTIMES[runtime](job, stack)


def _torch_eager(job: Job, stack: ExitStack) -> Runner:
    if not isinstance(job.candidate, nn.Module):
        raise UsageError(f"the torch runtime takes a module, not the file {os.fspath(job.candidate)}")
    module = copy.deepcopy(job.candidate).eval().to(job.device)
    args, kwargs = _placed(job, resolve(module, job.example_inputs, job.kwargs, batch_size=job.batch_size))

    def run() -> object:
        with torch.inference_mode():
            outputs = module(*args, **kwargs)
        if job.device == "cuda":
            torch.cuda.synchronize()
        return outputs

    def memory() -> int:
        if job.device == "cuda":
            return _cuda_peak(run)
        return _pickled_peak(module, args, kwargs, job.threads)

    with refusing_bad_inputs(args, kwargs):
        run()
    paper = _paper(module, args, kwargs)
    return Runner(run, memory, _shapes(tensors((args, kwargs))), None, *paper)


def _placed(job: Job, inputs: tuple[Args, Kwargs]) -> tuple[Args, Kwargs]:
    placed: tuple[Args, Kwargs] = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to(job.device), inputs)
    return placed


def _cuda_peak(run: Callable[[], object]) -> int:
    """Bytes that torch's allocator holds on the GPU at most during a run, weights included."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def _pickled_peak(module: nn.Module, args: Args, kwargs: Kwargs, threads: int) -> int:
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        model_file, inputs_file = Path(folder) / "module.pt", Path(folder) / "inputs.pt"
        try:
            torch.save(module, model_file)
        except Exception as error:  # pickling runs code of the module's own classes, which may raise anything
            raise UnmeasuredError(
                f"peak memory is measured in a fresh process, and the module cannot be sent there: {squashed(error)}"
            ) from error
        torch.save((args, kwargs), inputs_file)
        return peak_memory("torch", model_file, inputs_file, threads)


def _paper(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[int | None, int | None]:
    """MACs of one sample, and parameters."""
    try:
        counted = cost(module, args, kwargs=kwargs)
    except UsageError:  # it runs, so its shapes depend on the values of the inputs
        return None, sum(parameter.numel() for parameter in module.parameters())
    return counted.macs, counted.params


def _onnxruntime(job: Job, stack: ExitStack) -> Runner:
    if isinstance(job.candidate, nn.Module):
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-"))) / "model.onnx"
        export_onnx(job.candidate, path, example_inputs=job.example_inputs, kwargs=job.kwargs, verify=False)
    else:
        path = Path(job.candidate)
    model = _load(path)
    feed = _feed(model, job)
    session = _session(path, job)
    run = _bound(session, feed) if job.device == "cuda" else lambda: session.run(None, feed)
    try:
        run()
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise UsageError(f"{path} cannot be run on inputs {_shapes(feed.values())}: {squashed(error)}") from error

    def memory() -> int:
        if job.device == "cuda":
            raise UnmeasuredError("the peak memory of ONNX Runtime on a GPU is not measured")
        with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
            inputs_file = Path(folder) / "inputs.npz"
            np.savez(inputs_file, *feed.values())
            return peak_memory("onnxruntime", path, inputs_file, job.threads)

    return Runner(run, memory, _shapes(feed.values()), _file_bytes(path, model), *_noted_paper(model))


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError, of whichever of its implementations is installed
        raise UsageError(f"{path} is not an ONNX model: {squashed(error)}") from error


def _feed(model: onnx.ModelProto, job: Job) -> dict[str, Array]:
    """The inputs by name: the example inputs, or a module's own, or random ones of the shapes in the file."""
    weights = {weight.name for weight in model.graph.initializer}
    nodes = [node for node in model.graph.input if node.name not in weights]
    if not isinstance(job.candidate, nn.Module) and job.example_inputs is None and job.kwargs is None:
        generator = np.random.default_rng(0)
        return {node.name: _random(node, job.batch_size, generator) for node in nodes}
    module = job.candidate if isinstance(job.candidate, nn.Module) else nn.Identity()
    given = tensors(resolve(module, job.example_inputs, job.kwargs, batch_size=job.batch_size))
    if len(given) != len(nodes):
        raise UsageError(f"the model has {len(nodes)} inputs, but {len(given)} tensors were given")
    return {node.name: tensor.detach().cpu().numpy() for node, tensor in zip(nodes, given, strict=True)}


def _random(node: onnx.ValueInfoProto, batch_size: int, generator: np.random.Generator) -> Array:
    """Standard normal values, or zeros for an input of integers, at the batch size where axis 0 is open."""
    kind = node.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else size.dim_param or "?" for size in kind.shape.dim]
    if shape and isinstance(shape[0], int) and shape[0] != batch_size:
        raise UsageError(f"input {node.name!r} is fixed at batch {shape[0]}; {batch_size} was asked for")
    sizes = [size for size in [batch_size, *shape[1:]] if isinstance(size, int)] if shape else []
    if len(sizes) != len(shape):
        raise UsageError(f"input {node.name!r} has open sizes, {shape}: example_inputs must say which to use")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return generator.standard_normal(sizes).astype(dtype) if dtype.kind == "f" else np.zeros(sizes, dtype)


def _session(path: Path, job: Job) -> Any:
    provider, available = _PROVIDERS[job.device], onnxruntime.get_available_providers()
    if provider not in available:
        raise UsageError(f"no {provider}: the installed onnxruntime has only {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised: nothing needs to be printed as well
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    # Idle workers spin for a while in hope of work; left to it, they would spin in another candidate's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise UsageError(f"ONNX Runtime cannot load {path}: {squashed(error)}") from error
    if session.get_providers()[0] != provider:
        raise UsageError(f"no {provider}: ONNX Runtime fell back to {session.get_providers()[0]}")
    return session


def _bound(session: Any, feed: Mapping[str, Array]) -> Callable[[], object]:
    """A run whose inputs and outputs stay on the GPU, as in a pipeline that lives there."""
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for node in session.get_outputs():
        binding.bind_output(node.name, "cuda")

    def run() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding

    return run


def _file_bytes(path: Path, model: onnx.ModelProto) -> int:
    """The file and the external weights it names."""
    outside = {
        entry.value for weight in model.graph.initializer for entry in weight.external_data if entry.key == "location"
    }
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in outside)))


def _noted_paper(model: onnx.ModelProto) -> tuple[int | None, int | None]:
    """MACs and parameters as `export_onnx` noted them; in a file of other make, only the elements of its weights."""
    notes = {entry.key: entry.value for entry in model.metadata_props}
    if "surgery.macs" in notes:
        return int(notes["surgery.macs"]), int(notes["surgery.params"])
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return None, sum(prod(weight.dims) for weight in model.graph.initializer if weight.data_type in floats)


def _shapes(values: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(value.shape) for value in values)


RUNTIMES: Mapping[str, Callable[[Job, ExitStack], Runner]] = {"onnxruntime": _onnxruntime, "torch": _torch_eager}
