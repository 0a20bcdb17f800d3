"""The networks of FitNets (Romero et al., ICLR 2015) as data: convolutions and layers of maxout units.

Layers are numbered as in the paper: ``layer1`` and so on are the convolutions, the next is the maxout layer, where
there is one, and ``classifier`` the last. The output of ``layer6`` is taken after its pooling, like
the paper's hints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from surgery.models.catalogue import Entry


@dataclass(frozen=True)
class Conv:
    """A maxout convolution, and the pooling after it, if any: window and stride."""

    channels: int
    kernel: int = 3
    padding: int = 1
    pool: tuple[int, int] | None = None
    pieces: int = 2


@dataclass(frozen=True)
class Architecture:
    """A network of the paper."""

    convs: tuple[Conv, ...]
    units: int
    """Units of the maxout layer after the convolutions; 0: none."""
    input_size: tuple[int, int, int] = (3, 32, 32)
    notes: str = ""


def _student(text: str) -> tuple[Conv, ...]:
    """Parse ``"16 16 | 32 32 | 48"``: widths of convolutions, with 2 x 2 pooling at each bar and 8 x 8 at the end."""
    blocks = [[int(width) for width in block.split()] for block in text.split("|")]
    pools = [(2, 2)] * (len(blocks) - 1) + [(8, 8)]
    return tuple(
        Conv(width, pool=pool if k == len(block) - 1 else None)
        for block, pool in zip(blocks, pools, strict=True)
        for k, width in enumerate(block)
    )


def _rows() -> Iterator[tuple[str, Architecture]]:
    """Yield the networks.

    Widths are those of the paper's table 7, section 4.1 and appendix A. Kernels and paddings of the teachers and of the
    MNIST student are those of the configuration files in the teachers' and the authors' own code.
    """
    cifar = (Conv(96, 8, 4, (4, 2)), Conv(192, 8, 3, (4, 2)), Conv(192, 5, 3, (2, 2)))
    yield (
        "fitnet_cifar_teacher",
        Architecture(cifar, 500, notes="teacher of fitnet1 to fitnet4"),
    )
    yield "fitnet1", Architecture(_student("16 16 16 | 32 32 32 | 48 48 64"), 500)
    yield "fitnet2", Architecture(_student("16 32 32 | 48 64 80 | 96 96 128"), 500)
    third = _student("32 48 64 64 | 80 80 80 80 | 128 128 128")
    yield "fitnet3", Architecture(third, 500)
    fourth = "32 32 32 48 48 | 80 80 80 80 80 80 | 128 128 128 128 128 128"
    yield "fitnet4", Architecture(_student(fourth), 500)
    svhn = (Conv(64, 5, 4, (3, 2)), Conv(128, 5, 3, (3, 2)), Conv(128, 5, 3, (3, 2)))
    yield "fitnet_svhn_teacher", Architecture(svhn, 400)
    yield "fitnet_svhn", Architecture(third, 500, notes="the layers of fitnet3, as in the paper's table 3")
    mnist = (Conv(48, 8, 0, (4, 2)), Conv(48, 8, 3, (4, 2)), Conv(24, 5, 3, (2, 2)))
    yield "fitnet_mnist_teacher", Architecture(mnist, 0, (1, 28, 28))
    thin = (
        *(Conv(16, 5, 0), Conv(16, 3, 0, (4, 2)), Conv(16, 5, 3), Conv(16, 3, 0, (4, 2))),
        *(Conv(12, 3, 3), Conv(12, 3, 0, (2, 2))),
    )
    yield "fitnet_mnist", Architecture(thin, 0, (1, 28, 28))
    small = ("64 | 64 | 64", "16 32 | 32 64 | 64", "16 32 | 32 32 32 | 48 64", "16 16 16 | 32 32 32 | 48 48 64")
    large = ("128 | 128 | 128", "32 64 | 80 80 | 128", "32 32 | 64 80 80 | 96 128", "16 32 32 | 48 64 80 | 96 96 128")
    for budget, nets in ((30, small), (107, large)):
        for depth, widths in zip((5, 7, 9, 11), nets, strict=True):
            notes = f"{depth} layers of {budget} million multiplications in all"
            yield f"fitnet_{budget}m_{depth}", Architecture(_student(widths), 500, notes=notes)


NETWORKS: Mapping[str, Architecture] = dict(_rows())


def _entry(name: str, net: Architecture) -> Entry:
    side = net.input_size[-1]
    return Entry(name, "FitNets", net.input_size, smallest=side, minimum=side, notes=net.notes, fixed=True)


FITNETS: Mapping[str, Entry] = {name: _entry(name, net) for name, net in NETWORKS.items()}
"""The networks as rows of the catalogue."""


def fitnet_cost(name: str) -> tuple[int, int]:
    """Count parameters, biases included, and multiplications of one sample, of a network with 10 classes."""
    net = NETWORKS[name]
    channels, size = net.input_size[0], net.input_size[-1]
    weights = biases = multiplications = 0
    for conv in net.convs:
        own = channels * conv.kernel**2 * conv.channels * conv.pieces
        positions, size = sizes_after(size, conv)
        channels = conv.channels
        weights += own
        biases += conv.channels * conv.pieces
        multiplications += own * positions**2
    features = channels * size**2
    linear = [(features, 2 * net.units), (net.units, 10)] if net.units else [(features, 10)]
    weights_of_linear = sum(ins * outs for ins, outs in linear)
    biases += sum(outs for _, outs in linear)
    return weights + weights_of_linear + biases, multiplications + weights_of_linear


def sizes_after(size: int, conv: Conv) -> tuple[int, int]:
    """Return the side in pixels after a convolution, and after its pooling.

    The pooling also takes windows that reach over the edge (ceil mode).
    """
    size += 2 * conv.padding - conv.kernel + 1
    if conv.pool is None:
        return size, size
    window, stride = conv.pool
    windows = math.ceil((size - window) / stride) + 1
    return size, windows - ((windows - 1) * stride >= size)
