"""The networks of FitNets (Romero et al., ICLR 2015) as modules, from their data."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from torch import nn

from surgery.errors import UsageError
from surgery.layers.maxout import Maxout
from surgery.models.fitnets import NETWORKS, Conv, sizes_after


def build_fitnet(name: str, num_classes: int = 10, pieces: int = 2, init_range: float | None = None) -> nn.Sequential:
    """Build a network of the paper; it returns class scores without softmax.

    Args:
        name: a key of `FITNETS`.
        num_classes: width of the last layer.
        pieces: pieces of the maxout layer after the convolutions; the MNIST networks have none, and use them in the
            last one (teacher) or two (student) convolutions. The paper's counts of parameters and multiplications
            follow from 2; its text and the authors' files have 5, and 4 on MNIST.
        init_range: initial weights are uniform between this number and its negative, and biases 0, as in the paper
            (0.005 on CIFAR and SVHN); by default they are those of `torch.nn`.

    Returns:
        the initialised network in training mode.

    Raises:
        UsageError: fewer than 1 piece, or a range that is not positive.

    Example:
        >>> student = surgery.models.build_fitnet("fitnet1", num_classes=100)
    """
    net, maxout = NETWORKS[name], Maxout(pieces)
    if init_range is not None and not init_range > 0:
        raise UsageError(f"init_range must be above 0, not {init_range}")
    channels, size = net.input_size[0], net.input_size[-1]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    convs = net.convs if net.units else _with_last_pieces(net.convs, pieces)
    for number, conv in enumerate(convs, 1):
        layers[f"layer{number}"] = _convolution(channels, conv)
        channels, size = conv.channels, sizes_after(size, conv)[1]
    layers["flatten"] = nn.Flatten()
    features = channels * size * size
    if net.units:
        parts = OrderedDict(linear=nn.Linear(features, net.units * pieces), maxout=maxout)
        layers[f"layer{len(convs) + 1}"] = nn.Sequential(parts)
        features = net.units
    layers["classifier"] = nn.Linear(features, num_classes)
    model = nn.Sequential(layers)
    if init_range is not None:
        for parameter in model.parameters():
            bounds = (-init_range, init_range) if parameter.ndim > 1 else (0.0, 0.0)
            nn.init.uniform_(parameter, *bounds)
    return model


def _with_last_pieces(convs: tuple[Conv, ...], pieces: int) -> tuple[Conv, ...]:
    """Give ``pieces`` to the convolutions that are as narrow as the last."""
    narrow = convs[-1].channels
    return tuple(replace(conv, pieces=pieces) if conv.channels == narrow else conv for conv in convs)


def _convolution(channels: int, conv: Conv) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(channels, conv.channels * conv.pieces, conv.kernel, padding=conv.padding),
        maxout=Maxout(conv.pieces),
    )
    if conv.pool is not None:
        layers["pool"] = nn.MaxPool2d(*conv.pool, ceil_mode=True)
    return nn.Sequential(layers)
