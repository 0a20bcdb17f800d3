"""Executes `InsertIdentity`: new layers behind an existing one that compute the identity."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from surgery.errors import EditError, UsageError, unknown_name
from surgery.graph.traced import TracedModule, traced_parts
from surgery.passes.recipe import InsertIdentity

ACTIVATIONS: dict[object, str] = {
    **dict.fromkeys((torch.relu, F.relu, "relu", "relu_"), "ReLU"),
    F.relu6: "ReLU6",
    **{getattr(F, name.lower()): name for name in ("GELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid", "ELU", "SELU")},
    F.leaky_relu: "LeakyReLU",
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), "Sigmoid"),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), "Tanh"),
}
"""Functions and methods, by the layer of `torch.nn` that does the same."""
_LAYERS = {*ACTIVATIONS.values(), "CELU", "Softplus", "Softsign", "RReLU", "Hardtanh"}
_NORMS = (nn.modules.batchnorm._BatchNorm,)
_CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_EPS = 2.0**-17
"""Near the usual 1e-5, and such that ``1 - eps`` is a float32: the identity is exact in every wider dtype."""
_BATCH_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def insert_identity(module: nn.Module, step: InsertIdentity) -> None:
    """Insert the layers of ``step`` into ``module``, in every graph that computes what they read."""
    sites = list(output_sites(module, step.after))
    block = _block(step, _like(module))
    parent, _, child = step.name.rpartition(".")
    container = module.get_submodule(parent)
    if hasattr(container, child):
        raise EditError(f"{step.name!r} is taken")
    container.add_module(child, block)
    block.train(container.training)
    for site in sites:
        _insert(site, step, block)
        site.owner.recompile()


class Site:
    """A value in a graph: the traced module that owns the graph, its path, and the node."""

    def __init__(self, owner: TracedModule, path: str, graph: fx.Graph, node: fx.Node) -> None:
        self.owner, self.path, self.graph, self.node = owner, path, graph, node


def output_sites(module: nn.Module, name: str) -> Iterator[Site]:
    """Where the output of a layer or container is computed: once in each graph that runs it.

    The output of a layer is taken behind the normalisation and the activation that follow it alone.

    Raises:
        UsageError: no such layer or container.
        EditError: it runs more than once, or has several outputs.
    """
    found = False
    for path, owner in traced_parts(module):
        if path and not f"{name}.".startswith(f"{path}."):
            continue
        local = name[len(path) + 1 :] if path else name
        for graph in owner.graphs:
            node = _output_node(owner, graph, local)
            if node is not None:
                found = True
                yield Site(owner, path, graph, node)
    if not found:
        names = [n for n, _ in module.named_modules() if n]
        if name in names:
            raise EditError(f"{name!r} is not run by any graph")
        raise unknown_name("layer", name, names)


def activation_of(owner: TracedModule, node: fx.Node) -> str:
    """The class in `torch.nn` of an activation node; empty for any other node."""
    if node.op == "call_module":
        kind = type(owner.get_submodule(str(node.target))).__name__
        return kind if kind in _LAYERS else ""
    try:
        return ACTIVATIONS.get(node.target, "") if node.op in ("call_function", "call_method") else ""
    except TypeError:
        return ""


def _output_node(owner: TracedModule, graph: fx.Graph, name: str) -> fx.Node | None:
    if not name:  # all of the graph
        result = graph.output_node().args[0]
        if not isinstance(result, fx.Node):
            raise EditError("it has no single output: name a layer")
        return result
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == name]
    if len(calls) > 1:
        raise EditError(f"{name!r} runs {len(calls)} times: a layer behind it would be shared")
    if calls:
        return _behind(owner, calls[0])
    inside = [n for n in graph.nodes if n.op != "output" and _is_inside(n, name)]
    outputs = [n for n in inside if any(not _is_inside(user, name) for user in n.users)]
    if len(outputs) > 1:
        raise EditError(f"{name!r} has {len(outputs)} outputs ({', '.join(n.name for n in outputs)}): name a layer")
    return outputs[0] if outputs else None


def _is_inside(node: fx.Node, name: str) -> bool:
    path = str(node.target) if node.op == "call_module" else str(node.meta.get("path", ""))
    return path == name or path.startswith(f"{name}.")


def _behind(owner: TracedModule, node: fx.Node) -> fx.Node:
    for wanted in (_is_norm, activation_of):
        if len(node.users) == 1:
            user = next(iter(node.users))
            if wanted(owner, user):
                node = user
    return node


def _is_norm(owner: TracedModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(owner.get_submodule(str(node.target)), _NORMS)


def _like(module: nn.Module) -> torch.Tensor:
    return next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))


def _block(step: InsertIdentity, like: torch.Tensor) -> nn.Sequential:
    """The new layers, as a container; their random numbers come from the step's own seed."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    kind = "conv" if step.kernel else "linear"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step.seed)
        first, last = (_weights(step) for _ in range(2))
    if step.form == "layer":
        _set_identity(first)
        layers[kind] = first
    elif step.form == "residual":
        layers[f"{kind}1"] = first
    else:
        raise UsageError(f"unknown form {step.form!r} of an identity: 'layer' or 'residual'")
    if step.norm:
        layers["norm"] = _identity_norm(_BATCH_NORMS[max(len(step.kernel), 1)](step.channels, eps=_EPS))
    if step.activation:
        layers["act"] = getattr(nn, step.activation)()
    if step.form == "residual":
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        layers[f"{kind}2"] = last
    return nn.Sequential(layers).to(like.device, like.dtype)


def _weights(step: InsertIdentity) -> nn.Module:
    if not step.kernel:
        return nn.Linear(step.channels, step.channels)
    padding = tuple(k // 2 for k in step.kernel)
    conv = _CONVS[len(step.kernel)]
    return conv(step.channels, step.channels, step.kernel, padding=padding, bias=not step.norm)


def _set_identity(layer: nn.Module) -> None:
    """A Dirac kernel, or the identity matrix; no bias."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.zero_()
            if name == "weight":
                centre = parameter.data
                for size in reversed(parameter.shape[2:]):
                    centre = centre[..., size // 2]
                centre.fill_diagonal_(1.0)


def _identity_norm(norm: nn.Module) -> nn.Module:
    """Statistics for which evaluation is the identity: the mean 0, the variance and ``eps`` adding up to 1."""
    assert isinstance(norm.running_var, torch.Tensor)
    norm.running_var.fill_(1.0 - _EPS)
    return norm


def _insert(site: Site, step: InsertIdentity, block: nn.Sequential) -> None:
    name = step.name[len(site.path) + 1 :] if site.path else step.name
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
