"""Functions whose parameters are no layer's: with a single number, or made of sizes in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery

EXACT = 1e-12
Use = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Channels that are written, used in some way, and read."""

    def __init__(self, channels: int, use: Use, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.use = use
        self.write, self.read = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 3, 1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.use(self, self.write(x)))


class Untraced(Net):
    """The use is Python that is not traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(x)
        return self.read(self.use(self, y + 1 if x.abs().max() > 1e9 else y))


def channels_last(use: Use) -> Use:
    return lambda net, y: use(net, y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


ONE_NUMBER: dict[str, tuple[Use, dict[str, tuple[int, ...]]]] = {
    "linear": (channels_last(lambda n, y: F.linear(y, n.w, n.b)), {"w": (1, 1), "b": (1,)}),
    "convolution": (lambda n, y: F.conv2d(y, n.w, n.b, padding=1), {"w": (1, 1, 3, 3), "b": (1,)}),
    "transposed": (lambda n, y: F.conv_transpose2d(y, n.w, n.b), {"w": (1, 1, 3, 3), "b": (1,)}),
    "layer norm": (channels_last(lambda n, y: y + F.layer_norm(y, y.shape[-1:], n.w, n.b)), {"w": (1,), "b": (1,)}),
    "no weight": (channels_last(lambda n, y: y + F.layer_norm(y, (y.shape[-1],), None, n.b)), {"b": (1,)}),
    "rms norm": (channels_last(lambda n, y: y + F.rms_norm(y, y.shape[-1:], n.w)), {"w": (1,)}),
    "group norm": (lambda n, y: y + F.group_norm(y, 1, n.w, n.b), {"w": (1,), "b": (1,)}),
    "batch norm": (lambda n, y: F.batch_norm(y, n.mean, n.var, n.w, n.b), {"w": (1,), "b": (1,)}),
    "weight of two": (
        channels_last(lambda n, y: F.rms_norm(F.rms_norm(y, y.shape[-1:], n.w).tanh() + y, y.shape[-1:], n.w)),
        {"w": (1,)},
    ),
    "embedding": (
        channels_last(lambda n, y: y + F.embedding(torch.zeros(1, 1, 1, dtype=torch.long), n.w)),
        {"w": (4, 1)},
    ),
}
OF_ALL_CHANNELS: dict[str, tuple[Use, dict[str, tuple[int, ...]]]] = {
    "slope": (lambda n, y: F.prelu(y, n.w), {"w": (1,)}),
    "factor": (lambda n, y: y * n.w, {"w": (1, 1, 1)}),
}
BOTH: dict[str, tuple[Use, dict[str, tuple[int, ...]]]] = {
    "weight, then factor": (channels_last(lambda n, y: F.rms_norm(y, y.shape[-1:], n.w) * n.w), {"w": (1,)}),
    "factor, then weight": (channels_last(lambda n, y: F.rms_norm(y * n.w, y.shape[-1:], n.w)), {"w": (1,)}),
    "by mode": (
        channels_last(lambda n, y: y * n.w if n.training else y + F.rms_norm(y, y.shape[-1:], n.w)),
        {"w": (1,)},
    ),
    "by mode, the other way": (
        channels_last(lambda n, y: F.rms_norm(y, y.shape[-1:], n.w) + y if n.training else y * n.w),
        {"w": (1,)},
    ),
}


def numbers(size: Any) -> Tensor:
    return torch.arange(size, dtype=torch.float64).sin() + 1.5


MADE_OF_SIZES: dict[str, Use] = {
    "batch norm": lambda n, y: F.batch_norm(y, numbers(y.shape[1]), numbers(y.shape[1])),
    "batch norm's weight": lambda n, y: F.batch_norm(y, n.mean, n.var, numbers(y.shape[1])),
    "layer norm": channels_last(lambda n, y: y + F.layer_norm(y, y.shape[-1:], numbers(y.shape[-1]))),
    "rms norm": channels_last(lambda n, y: y + F.rms_norm(y, y.shape[-1:], numbers(y.shape[-1]))),
    "group norm": lambda n, y: y + F.group_norm(y, 2, numbers(y.shape[1])),
    "slopes": lambda n, y: F.prelu(y, numbers(y.shape[1])),
    "bias": lambda n, y: F.conv2d(y, y.mean((0, 2, 3))[:, None, None, None], numbers(y.shape[1]), groups=4),
    "linear": channels_last(lambda n, y: F.linear(y, torch.outer(numbers(y.shape[-1]), numbers(y.shape[-1])))),
    "factor": lambda n, y: y * numbers(y.shape[1])[:, None, None],
    "mask": lambda n, y: y.masked_fill(numbers(y.shape[1])[:, None, None] > 1.5, 0.5),
    "order": lambda n, y: y.index_select(1, torch.arange(y.shape[1]).flip(0)),
}


def assert_exact(net: nn.Module) -> nn.Module:
    """Permuted and widened networks are the network, a slim one what `surgery.masked` says, at two batch sizes."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    traced = surgery.trace(net, x)
    order = {g.name: g.permutation(seed=1) for g in surgery.dimension_groups(traced) if g.editable}
    edited = [surgery.reindex(traced, order), *(surgery.widen(traced, factor, seed=1) for factor in (1.5, 2.0))]
    for module in edited:
        assert surgery.verify(module, net, x, train=True).max_rel <= EXACT
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.verify(surgery.slim(traced, 0.5), masked, x, train=True).max_rel <= EXACT
    return edited[-1]


def make(kind: type[Net], channels: int, use: Use, **shapes: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return kind(channels, use, **shapes).double().eval()


@pytest.mark.filterwarnings("ignore::surgery.errors.NothingChangedWarning")
@pytest.mark.parametrize("kind", [Net, Untraced])
@pytest.mark.parametrize("name", ONE_NUMBER)
def test_a_parameter_of_one_number_grows_with_its_channel(name, kind):
    use, shapes = ONE_NUMBER[name]
    wide = assert_exact(make(kind, 1, use, **shapes))
    if kind is Net:
        assert {2} <= {size for key in shapes for size in wide.get_parameter(key).shape[:2]} <= {2, 4}
        assert wide.write.out_channels == 2


@pytest.mark.parametrize("name", OF_ALL_CHANNELS)
def test_a_number_for_all_channels_stays_one(name):
    use, shapes = OF_ALL_CHANNELS[name]
    wide = assert_exact(make(Net, 1, use, **shapes))
    assert (wide.w.numel(), wide.write.out_channels) == (1, 2)


@pytest.mark.filterwarnings("ignore::surgery.errors.NothingChangedWarning")
@pytest.mark.parametrize("name", BOTH)
def test_a_number_that_is_used_in_two_ways_stays_one(name):
    use, shapes = BOTH[name]
    wide = assert_exact(make(Net, 1, use, **shapes))
    assert wide.w.numel() == 1


class Parts(nn.Module):
    """One attribute in two parts."""

    def __init__(self, first: Use, second: Use) -> None:
        super().__init__()
        self.a, self.b = Net(1, first, w=(1,)), Net(1, second)
        self.b.w = self.a.w

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e9:
            x = x + 1
        return self.b(self.a(x))


@pytest.mark.filterwarnings("ignore::surgery.errors.NothingChangedWarning")
@pytest.mark.parametrize("swap", [False, True])
def test_a_number_that_two_parts_use_in_two_ways_stays_one(swap):
    uses = [BOTH["weight, then factor"][0], OF_ALL_CHANNELS["factor"][0]]
    uses[0] = channels_last(lambda n, y: F.rms_norm(y, y.shape[-1:], n.w))
    torch.manual_seed(0)
    wide = assert_exact(Parts(*uses[:: -1 if swap else 1]).double().eval())
    assert wide.a.w.numel() == 1


@pytest.mark.filterwarnings("ignore::surgery.errors.NothingChangedWarning")
@pytest.mark.parametrize("kind", [Net, Untraced])
@pytest.mark.parametrize("name", MADE_OF_SIZES)
def test_parameters_made_of_sizes_hold_their_channels_in_place(name, kind):
    assert_exact(make(kind, 4, MADE_OF_SIZES[name]))
