"""`InsertIdentity`: new layers behind an existing one that compute the identity (Net2DeeperNet)."""

from __future__ import annotations

import copy
import itertools
import operator
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.edit.layout import memory_format
from surgery.edit.moments import predicted_moments, set_moments
from surgery.edit.sites import Site, local_name, output_sites, place_for
from surgery.edit.step import Inserted, Step
from surgery.errors import UsageError
from surgery.graph.rule_table import activation_named
from surgery.graph.seeding import seed_generators
from surgery.layers.activation import make_activation
from surgery.layers.maxout import Maxout
from surgery.layers.spatial import layer_class


@dataclass(frozen=True)
class InsertIdentity(Step):
    """Insert new layers that compute the identity behind an existing one (Net2DeeperNet).

    Attributes:
        after: qualified name of the layer or container whose output the new layers read.
        name: qualified name of the container of the new layers.
        form: ``"layer"``: an identity layer, and the activation again where it is idempotent; ``"residual"``: a block
            with a skip connection whose last layer is zero.
        kernel: kernel size of the identity convolution, odd in each direction; empty for a linear layer.
        norm: whether a BatchNorm follows the identity layer.
        activation: class name in `torch.nn` of the activation, ``"Maxout"``, or empty.
        channels: number of channels of the value read.
        seed: of the random weights of a residual block's first layer.
        pieces: of a maxout activation, each of them the identity; 1 for any other.
        eps: of the BatchNorm, such that the variance that makes it the identity is a number of the weights' dtype.
    """

    after: str
    name: str
    form: str
    kernel: tuple[int, ...]
    norm: bool
    activation: str
    channels: int
    seed: int = 0
    pieces: int = 1
    eps: float = 2.0**-17

    def apply(self, module: nn.Module) -> nn.Module:
        """Insert the layers in every graph that computes what they read. See `Step.apply`."""
        return self.apply_in_place(copy.deepcopy(module))

    def apply_in_place(self, module: nn.Module) -> nn.Module:
        """See `Step.apply_in_place`."""
        sites = list(output_sites(module, self.after))
        block = _block(self, weight_before(module, sites[0], len(self.kernel)))
        if self.form == "layer" and self.norm:
            moments = predicted_moments(sites[0].owner, sites[0].node)
            if moments is not None:
                set_moments(block.get_submodule("norm"), *moments)
        container, child = place_for(module, self.name)
        container.add_module(child, block)
        block.train(container.training)
        for site in sites:
            _insert(site, self, block)
            site.owner.recompile()
        return module

    def inserted(self) -> tuple[Inserted, ...]:
        """See `Step.inserted`."""
        norms = (f"{self.name}.norm",) if self.form == "layer" and self.norm else ()
        return (Inserted(self.name, self.after, norms=norms),)

    def describe(self) -> str:
        """See `Step.describe`."""
        kind = "x".join(map(str, self.kernel)) + " convolution" if self.kernel else "linear layer"
        what = f"identity {kind}" if self.form == "layer" else f"residual block of {kind}s"
        return f"InsertIdentity: {what} {self.name!r} behind {self.after!r}, {self.channels} channels"


def weight_before(module: nn.Module, site: Site, spatial: int) -> torch.Tensor:
    """What new layers at a place are like in dtype, device and memory format: the nearest weight before it of a
    convolution with as many spatial dims (0: of a linear layer); else any parameter before it, or any at all."""
    last = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    found = None
    for node in itertools.takewhile(lambda n: n is not site.node.next, site.graph.nodes):
        for parameter in site.owner.get_submodule(str(node.target)).parameters() if node.op == "call_module" else ():
            if parameter.is_floating_point():
                last = parameter
                found = parameter if parameter.ndim == spatial + 2 else found
    return last if found is None else found


def _block(step: InsertIdentity, like: torch.Tensor) -> nn.Sequential:
    """The new layers, as a container; their random numbers come from the step's own seed."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    kind = "conv" if step.kernel else "linear"
    with torch.random.fork_rng(devices=[]):
        seed_generators(step.seed)
        first, last = _weights(step, step.channels * step.pieces), _weights(step, step.channels)
    if step.form == "layer":
        _set_identity(first, step.pieces)
        layers[kind] = first
    elif step.form == "residual":
        layers[f"{kind}1"] = first
    else:
        raise UsageError(f"unknown form {step.form!r} of an identity: 'layer' or 'residual'")
    if step.norm:
        norm = layer_class("BatchNorm", max(len(step.kernel), 1))
        layers["norm"] = _identity_norm(norm(step.channels * step.pieces, eps=step.eps))
    if step.activation == "Maxout":
        layers["act"] = Maxout(step.pieces, dim=1 if step.kernel else -1)
    elif step.activation:
        layers["act"] = make_activation(activation_named(step.activation))
    if step.form == "residual":
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        layers[f"{kind}2"] = last
    return nn.Sequential(layers).to(like.device, like.dtype).to(memory_format=memory_format(like))


def _weights(step: InsertIdentity, outs: int) -> nn.Module:
    if not step.kernel:
        return nn.Linear(step.channels, outs)
    padding = tuple(k // 2 for k in step.kernel)
    conv = layer_class("Conv", len(step.kernel))
    return cast(nn.Module, conv(step.channels, outs, step.kernel, padding=padding, bias=not step.norm))


def _set_identity(layer: nn.Module, pieces: int) -> None:
    """A Dirac kernel, or the identity matrix, for each of the ``pieces`` of a unit; no bias."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.zero_()
            if name == "weight":
                centre = parameter.data
                for size in reversed(parameter.shape[2:]):
                    centre = centre[..., size // 2]
                centre.copy_(torch.eye(centre.shape[1]).repeat_interleave(pieces, 0))


def _identity_norm(norm: Any) -> nn.Module:
    """Statistics for which evaluation is the identity: the mean 0, the variance and ``eps`` adding up to 1."""
    norm.running_var.fill_(1.0 - norm.eps)
    return cast(nn.Module, norm)


def _insert(site: Site, step: InsertIdentity, block: nn.Sequential) -> None:
    name = local_name(step.name, site.path)
    users = list(site.node.users)
    value = site.node
    with site.graph.inserting_after(site.node):
        for child, _ in block.named_children():
            value = _after(site.graph, value, "call_module", f"{name}.{child}", (value,), name)
        if step.form == "residual":
            value = _after(site.graph, value, "call_function", operator.add, (site.node, value), name)
    for user in users:
        user.replace_input_with(site.node, value)
    site.graph.lint()


def _after(graph: fx.Graph, at: fx.Node, op: str, target: object, args: tuple[fx.Node, ...], path: str) -> fx.Node:
    with graph.inserting_after(at):
        node = graph.create_node(op, target, args)  # type: ignore[arg-type]
    node.meta["path"] = path
    return node
