"""Run modules in torch: eagerly, compiled, or as a CUDA graph."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch._dynamo
from torch import nn
from torch.utils import _pytree as pytree

from surgery.counting.cost import cost
from surgery.deploy.measure.jobs import Job, Runner, refuse_without_gpu, shapes
from surgery.deploy.measure.memory import Peak, UnmeasuredError, peak_memory
from surgery.deploy.measure.timing import Call
from surgery.errors import UsageError
from surgery.graph.batches import Args, Kwargs, tensors
from surgery.models.inputs import refusing_bad_inputs, resolve, squash

Make = Callable[[nn.Module, Args, Kwargs], Call]


def torch_eager(job: Job, stack: ExitStack) -> Runner:
    """Run the module as it is."""

    def make(module: nn.Module, args: Args, kwargs: Kwargs) -> Call:
        return lambda: module(*args, **kwargs)

    return _runner(job, make, eager=True)


def torch_compiled(job: Job, stack: ExitStack) -> Runner:
    """Run the module by `torch.compile`, for inputs of these sizes only."""
    # Each session compiles again. Past this limit dynamo would run a module of the same class as it is, silently.
    stack.enter_context(
        torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
    )

    def make(module: nn.Module, args: Args, kwargs: Kwargs) -> Call:
        compiled = torch.compile(module, dynamic=False)
        try:
            compiled(*args, **kwargs)
        except Exception as error:  # what it runs without being compiled; the compilers' errors share no base
            raise UsageError(f"torch.compile does not work on this module here: {squash(error)}") from error
        return lambda: compiled(*args, **kwargs)

    return _runner(job, make)


def torch_graphs(job: Job, stack: ExitStack) -> Runner:
    """Run the module's kernels as one CUDA graph, captured once and replayed."""
    refuse_without_gpu(job, "torch-cuda-graphs")

    def make(module: nn.Module, args: Args, kwargs: Kwargs) -> Call:
        aside = cast(Any, torch.cuda.Stream)()  # without type hints in torch
        aside.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(aside):  # what a first run sets up must not be captured
                for _ in range(3):
                    module(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph):
                outputs = module(*args, **kwargs)
        except RuntimeError as error:
            raise UsageError(f"the module cannot be captured as a CUDA graph: {squash(error)}") from error

        def replay() -> object:
            graph.replay()
            return outputs

        return replay

    return _runner(job, make)


def _runner(job: Job, make: Make, *, eager: bool = False) -> Runner:
    if not isinstance(job.candidate, nn.Module):
        raise UsageError(f"the torch runtimes take a module, not the file {os.fspath(job.candidate)}")
    source = copy.deepcopy(job.candidate).eval()
    args, kwargs = _place(job, resolve(source, job.example_inputs, job.kwargs, batch_size=job.batch_size))

    def start() -> Call:
        module = copy.deepcopy(source).to(job.device)
        with torch.inference_mode():
            with refusing_bad_inputs(args, kwargs):
                module(*args, **kwargs)
            made = make(module, args, kwargs)

        def run() -> object:
            with torch.inference_mode():
                outputs = made()
            if job.device == "cuda":
                torch.cuda.synchronize()
            return outputs

        return run

    def memory() -> Peak:
        if not eager:
            raise UnmeasuredError("peak memory is not measured of compiled or captured modules")
        with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
            model_file, inputs_file = Path(folder) / "module.pt", Path(folder) / "inputs.pt"
            try:
                torch.save(source, model_file)
            except Exception as error:  # pickling runs code of the module's own classes, which may raise anything
                reason = f"the module cannot be sent there: {squash(error)}"
                raise UnmeasuredError(f"peak memory is measured in a fresh process, and {reason}") from error
            torch.save(_on("cpu", (args, kwargs)), inputs_file)
            return peak_memory("torch", model_file, inputs_file, job.threads, job.device)

    given = shapes(tensors((args, kwargs)))
    macs, params = _count_costs(source, *_on("cpu", (args, kwargs)))
    return Runner(start, memory, given, None, macs, params)


def _place(job: Job, inputs: tuple[Args, Kwargs]) -> tuple[Args, Kwargs]:
    return _on(job.device, pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs))


def _on(device: str, inputs: tuple[Args, Kwargs]) -> tuple[Args, Kwargs]:
    placed: tuple[Args, Kwargs] = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), inputs)
    return placed


def _count_costs(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[int | None, int | None]:
    """Count the MACs of one sample, and the parameters."""
    try:
        counted = cost(module, args, kwargs=kwargs)
    except UsageError:  # its shapes depend on the values of the inputs, or they do not fit: running it will tell
        return None, sum(parameter.numel() for parameter in module.parameters())
    return counted.macs, counted.params
