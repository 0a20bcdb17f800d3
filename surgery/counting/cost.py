"""Count what a module costs without running it: multiply-accumulates, parameters and bytes."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.module_tracker import ModuleTracker

from surgery.counting.products import ProductCounter, attention_as_matrix_products
from surgery.graph.batches import Args, Kwargs, is_list_of_images
from surgery.models.detectors import image_batch, is_detector, raw_outputs
from surgery.models.inputs import refusing_bad_inputs, resolve


@dataclass(frozen=True)
class Cost:
    """What one sample costs.

    ``macs`` are multiply-accumulates of one forward pass of one sample, in eval mode; ``params`` is the number of
    parameters; ``bytes`` is what parameters and buffers occupy in memory.
    """

    macs: int
    params: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """The three figures, as plain JSON data."""
        return asdict(self)


def cost(module: nn.Module, example_inputs: Any = None, *, kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Count what ``module`` costs, without running it and without touching it.

    A MAC is one multiplication and one addition: half of what `torch.utils.flop_counter` calls FLOPs. The count covers
    convolutions, linear layers, matrix products and attention, at one sample (axis 0 of the inputs is cut to length 1)
    and in evaluation mode. It leaves out biases, norms, activations and pooling, as the papers and torchvision do. A
    tensor that is used twice, or shares its memory with another, counts once in ``params`` and ``bytes``.

    How much of a detection model runs depends on what it finds. The count is for a fixed number of regions: the
    backbone and the head, or the region proposal head, the box head on 1,000 regions of the image, and mask and
    keypoint heads on 100. The model's transform resizes a list of images first; a tensor of images is taken as it is.

    Args:
        module: any module; it is not modified.
        example_inputs: a tensor or a tuple of positional inputs; a traced module needs none.
        kwargs: named inputs.

    Returns:
        MACs and parameters as counts, memory in bytes.

    Raises:
        UsageError: the inputs do not fit, an untraced module comes without inputs, shapes inside the model depend on
            the values of the inputs, or an operator multiplies matrices and has no formula.

    Example:
        >>> surgery.cost(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224)).macs
        1814073344
    """
    args, named = resolve(module, example_inputs, kwargs, batch_size=1)
    return Cost(
        macs=sum(_macs(module, args, named).values()),
        params=sum(count for count, _ in _footprints(module.parameters())),
        bytes=sum(count * size for count, size in _footprints([*module.parameters(), *module.buffers()])),
    )


def weight_macs(
    module: nn.Module, example_inputs: Any = None, *, kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Count the MACs of each weight.

    Args:
        module, example_inputs, kwargs: as in `cost`.

    Returns:
        The MACs of one sample by the name of the parameter that multiplies, in the order of the forward pass. Products
        of activations with each other, as in attention, are under ``""``.

    Raises:
        UsageError: as in `cost`.

    Example:
        >>> surgery.weight_macs(traced)["layer1.0.conv1.weight"]
    """
    args, named = resolve(module, example_inputs, kwargs, batch_size=1)
    return _macs(module, args, named)


def _macs(module: nn.Module, args: Args, kwargs: Kwargs) -> dict[str, int]:
    macs: dict[str, int] = {}

    @contextmanager
    def counting(fake: nn.Module) -> Iterator[None]:
        with ModuleTracker() as layers, ProductCounter(fake, layers) as counter:
            yield
        macs.update(counter.macs)

    run_on_fakes(module, args, kwargs, counting)
    return macs


def run_on_fakes(
    module: nn.Module, args: Args, kwargs: Kwargs, watching: Callable[[nn.Module], AbstractContextManager[object]]
) -> None:
    """Run a copy of ``module`` in evaluation mode on tensors without data, inside the context ``watching(copy)``."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)  # such as tensors that a function has cached
    with FakeCopyMode(fake_mode):  # a copy without weights: nothing is allocated, and the original stays as it is
        fake = copy.deepcopy(module).eval().requires_grad_(False)  # views of fakes that need gradients mind `no_grad`
    call: Callable[..., Any] = fake
    if is_detector(module):
        call = functools.partial(raw_outputs, fake)
        if is_list_of_images(args):
            with refusing_bad_inputs(args, kwargs):
                args, kwargs = (image_batch(module, args[0]),), {}
    fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, fake_mode.from_tensor, (args, kwargs))
    with (
        refusing_bad_inputs(args, kwargs),
        attention_as_matrix_products(),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        fake_mode,
        watching(fake),
    ):
        call(*fake_args, **fake_kwargs)


def _footprints(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield elements and bytes per element of each storage of ``tensors``: never more than the storage holds."""
    used: defaultdict[tuple[int, int], int] = defaultdict(int)
    held: dict[tuple[int, int], int] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        storage, size = tensor.untyped_storage(), tensor.element_size()
        used[storage._cdata, size] += tensor.numel()
        held[storage._cdata, size] = storage.nbytes() // size
    for (storage_id, size), count in used.items():
        yield min(count, held[storage_id, size]), size
