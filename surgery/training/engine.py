"""Where a training runs: on one device or in several processes, in full or mixed precision, through `accelerate`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from surgery.errors import UsageError, unknown_name
from surgery.settings import PRECISIONS

_DATA_PARALLEL = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU, DistributedType.MULTI_MLU, DistributedType.MULTI_HPU,
)  # fmt: skip


class Engine:
    """Where training steps run: on the model's device in a plain process; under ``accelerate launch``, in several
    processes that share every batch (data parallelism).

    Attributes:
        device: of models and batches.
        precision: one of `surgery.settings.PRECISIONS`.
        processes: number of processes.
        rank: number of this process, from 0.
    """

    def __init__(self, device: torch.device, precision: str | None = None) -> None:
        """
        Args:
            device: the device of a plain process; under ``accelerate launch`` each process has its own.
            precision: one of `surgery.settings.PRECISIONS`; by default the one of ``accelerate launch``, or none.

        Raises:
            UsageError: an unknown precision, one that the device lacks, a launch that shards the model, or several
                processes of which accelerate does not know.
        """
        if precision is not None and precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        self.precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self._accelerator = _accelerator(device, self.precision)
        self._prepared = False
        self.processes, self.rank = self._accelerator.num_processes, self._accelerator.process_index
        self.device = self._accelerator.device if self.processes > 1 else device
        if self._accelerator.distributed_type not in _DATA_PARALLEL:
            name = self._accelerator.distributed_type.value
            raise UsageError(f"accelerate launch is set to {name}: only plain data parallelism is supported")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and self.processes == 1:  # each process would train alone, on all images, and report
            raise UsageError(
                f"{launched} processes were launched, but accelerate was set up for one before this call: "
                "on CPUs make its state with accelerate.PartialState(cpu=True), or leave that to surgery"
            )
        if self.precision == "fp16" and self.device.type == "cpu":
            raise UsageError("the precision fp16 needs a GPU: on a CPU use bf16")

    @property
    def main(self) -> bool:
        """Whether this process writes and reports."""
        return bool(self.rank == 0)

    def make_step(self, objective: nn.Module, optimizer: Optimizer) -> Callable[..., float]:
        """Make a function that takes one step: from the arguments of ``objective``, which computes the scalar loss, to
        the mean of this loss over the processes."""
        if self._prepared:  # it collects garbage, which takes longer than a short training
            self._accelerator.free_memory()
        self._prepared = True
        prepared, descent = self._accelerator.prepare(objective, optimizer)

        def step(*args: Any) -> float:
            loss = prepared(*args)
            descent.zero_grad(set_to_none=True)
            self._accelerator.backward(loss)
            descent.step()
            return self.mean(loss.detach())

        return step

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over the processes."""
        return float(self._accelerator.reduce(value, "mean") if self.processes > 1 else value)

    def share(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Return a loader that gives this process its share of each batch of ``loader``."""
        if self.processes == 1:
            return loader
        return cast("DataLoader[Any]", self._accelerator.prepare_data_loader(loader, device_placement=False))

    def gather(self, values: Tensor) -> Tensor:
        """Gather the values of all processes for a batch of `share`, each sample once."""
        return cast(Tensor, self._accelerator.gather_for_metrics(values)) if self.processes > 1 else values

    def wait(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the loss, in float16."""
        return cast("torch.amp.GradScaler | None", self._accelerator.scaler)


def is_main_process() -> bool:
    """Whether this process writes and reports: the only one, or the first under ``accelerate launch``."""
    return bool(PartialState().is_main_process)


def _accelerator(device: torch.device, precision: str) -> Accelerator:
    """Make the accelerator. Its settings are global in a process: earlier ones are reset where they differ."""
    known = PartialState._shared_state
    if known and not PartialState().use_distributed and PartialState().device.type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    elif AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    return Accelerator(
        device_placement=False,
        mixed_precision=precision,
        cpu=device.type == "cpu" and not PartialState._shared_state,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)],
    )
