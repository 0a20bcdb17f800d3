"""ONNX files as ONNX Runtime runs them, by the execution provider of the CPU, of CUDA, or of TensorRT."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
import onnx
import onnxruntime
from torch import nn

from surgery.deploy.measure.jobs import Job, Runner, refuse_without_gpu, shapes
from surgery.deploy.measure.memory import Peak, peak_memory
from surgery.deploy.measure.timing import Call
from surgery.deploy.onnx.export import export_onnx
from surgery.errors import UsageError
from surgery.graph.batches import tensors
from surgery.models.inputs import resolve, squash
from surgery.storage.documents import check_type

Array: TypeAlias = np.ndarray[Any, Any]
Options: TypeAlias = Mapping[str, str]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def onnxruntime_plain(job: Job, stack: ExitStack) -> Runner:
    """Run by the provider of the device; on a GPU, inputs and outputs are bound there."""
    return _runner(job, stack, [(_PROVIDERS[job.device], {})])


def onnxruntime_tensorrt(job: Job, stack: ExitStack) -> Runner:
    """Run by TensorRT, and by CUDA what TensorRT does not take."""
    refuse_without_gpu(job, "onnxruntime-tensorrt")
    return _runner(job, stack, [("TensorrtExecutionProvider", {}), (_PROVIDERS["cuda"], {})])


def onnxruntime_graphs(job: Job, stack: ExitStack) -> Runner:
    """Run by CUDA as one CUDA graph, which needs inputs and outputs at fixed places in memory."""
    refuse_without_gpu(job, "onnxruntime-cuda-graphs")
    return _runner(job, stack, [(_PROVIDERS["cuda"], {"enable_cuda_graph": "1"})], fixed_outputs=True)


def _runner(job: Job, stack: ExitStack, providers: list[tuple[str, Options]], *, fixed_outputs: bool = False) -> Runner:
    if isinstance(job.candidate, nn.Module):
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="surgery-"))) / "model.onnx"
        args, kwargs = resolve(job.candidate, job.example_inputs, job.kwargs, batch_size=job.batch_size)
        export_onnx(job.candidate, path, example_inputs=args, kwargs=kwargs, verify=False)
    else:
        path = Path(job.candidate)
    model = _load(path)
    feed = _feed(model, job)

    def start() -> Call:
        session = _session(path, job, providers)
        try:
            run = (
                _bind(session, feed, path if fixed_outputs else None) if job.device == "cuda" else _plain(session, feed)
            )
            run()
        except Exception as error:  # ONNX Runtime's errors share no base of their own
            raise UsageError(f"{path} cannot be run on inputs {shapes(feed.values())}: {squash(error)}") from error
        return run

    def memory() -> Peak:
        with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
            inputs_file = Path(folder) / "inputs.npz"
            np.savez(inputs_file, *feed.values())
            return peak_memory(providers[0][0], path, inputs_file, job.threads, job.device)

    return Runner(start, memory, shapes(feed.values()), _file_bytes(path, model), *_read_costs(model))


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError, of whichever of its implementations is installed
        raise UsageError(f"{path} is not an ONNX model: {squash(error)}") from error


def _feed(model: onnx.ModelProto, job: Job) -> dict[str, Array]:
    """Return the inputs by name: the example inputs, a module's own, or random ones of the shapes in the file."""
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
    """Draw standard normal values, or zeros for an input of integers, at the batch size if axis 0 is open."""
    kind = node.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else size.dim_param or "?" for size in kind.shape.dim]
    if shape and isinstance(shape[0], int) and shape[0] != batch_size:
        raise UsageError(f"input {node.name!r} is fixed at batch {shape[0]}; {batch_size} was asked for")
    sizes = [size for size in [batch_size, *shape[1:]] if isinstance(size, int)] if shape else []
    if len(sizes) != len(shape):
        raise UsageError(f"input {node.name!r} has open sizes, {shape}: example_inputs must say which to use")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return generator.standard_normal(sizes).astype(dtype) if dtype.kind == "f" else np.zeros(sizes, dtype)


def _session(path: Path, job: Job, providers: list[tuple[str, Options]]) -> Any:
    provider, available = providers[0][0], onnxruntime.get_available_providers()
    if provider not in available:
        raise UsageError(f"no {provider}: the installed onnxruntime has only {', '.join(available)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised: nothing needs to be printed as well
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    # Idle workers spin for a while in hope of work; left to it, they would spin in another candidate's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base of their own
        raise UsageError(f"ONNX Runtime cannot load {path}: {squash(error)}") from error
    if session.get_providers()[0] != provider:
        raise UsageError(f"no {provider}: ONNX Runtime fell back to {session.get_providers()[0]}")
    return session


def _plain(session: Any, feed: Mapping[str, Array]) -> Call:
    return lambda: session.run(None, feed)


def _bind(session: Any, feed: Mapping[str, Array], fixed: Path | None) -> Call:
    """Make a run whose inputs and outputs stay on the GPU.

    With ``fixed``, the file, the outputs have a fixed place: that of the outputs of a run on the CPU.
    """
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    names = [node.name for node in session.get_outputs()]
    if fixed is None:
        for name in names:
            binding.bind_output(name, "cuda")
    else:
        here = onnxruntime.InferenceSession(fixed, providers=[_PROVIDERS["cpu"]])
        for name, array in zip(names, here.run(names, feed), strict=True):
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))

    def run() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding

    return run


def _file_bytes(path: Path, model: onnx.ModelProto) -> int:
    """Add up the sizes of the file and of the external weights that it names."""
    outside = {
        entry.value for weight in model.graph.initializer for entry in weight.external_data if entry.key == "location"
    }
    return sum(file.stat().st_size for file in (path, *(path.parent / name for name in outside)))


_Whole = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,18}$")]


class _Notes(msgspec.Struct, frozen=True):
    """The properties that say what a file costs; it has others."""

    macs: _Whole = msgspec.field(name="surgery.macs")
    params: _Whole = msgspec.field(name="surgery.params")


def _read_costs(model: onnx.ModelProto) -> tuple[int | None, int | None]:
    """Read the MACs and parameters that `export_onnx` noted; for other files, count the elements of the weights."""
    notes = {entry.key: entry.value for entry in model.metadata_props}
    if "surgery.macs" in notes:
        found = check_type(notes, _Notes, "the properties of the ONNX file")
        return int(found.macs), int(found.params)
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    return None, sum(prod(weight.dims) for weight in model.graph.initializer if weight.data_type in floats)
