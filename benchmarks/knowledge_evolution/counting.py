"""Operations and parameters as the authors of Knowledge Evolution count them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from surgery.counting.cost import run_on_fakes
from surgery.models.inputs import resolve

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True)
class KECost:
    """What one sample costs by the authors' counting."""

    operations: int
    """Multiplications, additions and comparisons of the layers that are counted; about two to a MAC."""
    params: int
    """Entries of all parameters. The authors' log adds those of the masks, which are parameters in their code."""

    def to_dict(self) -> dict[str, int]:
        """Both figures, as plain JSON data."""
        return asdict(self)


def ke_cost(module: nn.Module, example_inputs: Any = None) -> KECost:
    """Count as the profiler in the code of Knowledge Evolution (Taha, Shrivastava, Davis, CVPR 2021) does.

    Counted is what layers compute that are modules, each time they are called: a convolution ``2 * k * k * C_in - 1``
    and 1 for the bias for each output (C_in: of its group), a linear layer ``2 * C_in - 1`` without its bias, a
    BatchNorm 2, a ReLU 1, max pooling ``k - 1`` and average pooling ``k``, where ``k`` is the side of the window and
    not its area. Adaptive pooling, functions, sums and other layers are not counted.

    Args:
        module: any module, traced or not; it is neither run nor changed.
        example_inputs: a tensor or a tuple of positional inputs, cut to one sample; a traced module needs none.
    """
    args, kwargs = resolve(module, example_inputs, batch_size=1)
    total = 0

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        nonlocal total
        total += _per_output(layer) * output.numel() if isinstance(output, Tensor) else 0

    @contextmanager
    def watching(fake: nn.Module) -> Iterator[None]:
        for layer in filter(_per_output, fake.modules()):
            layer.register_forward_hook(note)  # on a copy that is thrown away
        yield

    run_on_fakes(module, args, kwargs, watching)
    return KECost(total, sum(parameter.numel() for parameter in module.parameters()))


def _per_output(layer: nn.Module) -> int:
    """Operations for each entry of a layer's output; 0 for what is not counted."""
    return next((count(layer) for classes, count in _RULES if isinstance(layer, classes)), 0)


def _conv(layer: Any) -> int:
    return 2 * int(layer.weight[0].numel()) - 1 + (layer.bias is not None)


def _side(layer: Any) -> int:
    size = layer.kernel_size
    return int(size[0] if isinstance(size, tuple) else size)


_RULES: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], int]], ...] = (
    (_CONVS, _conv),
    (nn.Linear, lambda layer: 2 * int(layer.in_features) - 1),
    (_BatchNorm, lambda layer: 2),
    (nn.ReLU, lambda layer: 1),
    (_MAX_POOLS, lambda layer: _side(layer) - 1),
    (_AVG_POOLS, _side),
)
