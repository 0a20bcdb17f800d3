"""Net2DeeperNet: more layers, the same function (Chen, Goodfellow, Shlens 2016, section 3.2)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import fx, nn

from surgery.errors import EditError, UsageError, unknown_name
from surgery.graph.dims import Dimensions, dimensions
from surgery.graph.labels import Labelled
from surgery.graph.tracing import TracedModule, info
from surgery.passes.apply import apply
from surgery.passes.insert import Site, activation_of, output_sites
from surgery.passes.recipe import InsertIdentity

IDEMPOTENT = frozenset({"ReLU", "ReLU6"})
"""Activations with phi(phi(x)) = phi(x), behind which an identity layer and the same activation change nothing."""

_GATES = frozenset({"Sigmoid", "Hardsigmoid"})
"""Activations that scale something else rather than feed a layer."""


def deepen(module: nn.Module, places: Mapping[str, int] | Iterable[str] | str, *, seed: int = 0) -> nn.Module:
    """Insert layers that compute the identity, and can learn.

    Behind an idempotent activation (ReLU, ReLU6) this is an identity convolution or linear layer with BatchNorm, where
    the place has any, and the activation: Net2DeeperNet. Anywhere else it is a residual block whose last layer is zero.
    With BatchNorm the function is kept in ``eval()``; in ``train()`` the new layer normalises by batch statistics.

    Args:
        module: a traced module.
        places: layers and containers, or how many layers behind each: ``{"layer3": 2}``. Behind a container means at
            its end; behind a layer means behind the normalisation and activation that follow it. Globs match layers.
        seed: of the random first layers of residual blocks.

    Raises:
        UsageError: an unknown name or a count below 1.
        EditError: a place without one output, or whose output has no channels.
    """
    return apply(module, deepen_plan(module, places, seed=seed))


def deepen_plan(
    module: nn.Module, places: Mapping[str, int] | Iterable[str] | str, *, seed: int = 0
) -> tuple[InsertIdentity, ...]:
    """The steps that `deepen` takes."""
    info(module)
    dims = dimensions(module)
    taken = {name for name, _ in module.named_modules()}
    steps = []
    for name, count in _expanded(module, places).items():
        if count < 1:
            raise UsageError(f"the number of layers behind {name!r} must be at least 1, not {count}")
        site = next(iter(output_sites(module, name)))
        for _ in range(count):
            new = _free_name(module, name, taken)
            taken.add(new)
            steps.append(_step(dims, site, name, new, seed))
    return tuple(steps)


def _expanded(module: nn.Module, places: Mapping[str, int] | Iterable[str] | str) -> dict[str, int]:
    if isinstance(places, str):
        places = [places]
    counts = dict(places) if isinstance(places, Mapping) else dict.fromkeys(places, 1)
    layers = [n for n, m in module.named_modules() if n and not any(True for _ in m.children())]
    result: dict[str, int] = {}
    for name, count in counts.items():
        if any(c in name for c in "*?["):
            matched = [n for n in layers if fnmatchcase(n, name)]
            if not matched:
                raise unknown_name("layer", name, layers)
            result.update(dict.fromkeys(matched, count))
        else:
            result[name] = count
    return result


def _step(dims: Dimensions, site: Site, after: str, name: str, seed: int) -> InsertIdentity:
    scope = next(s for s, (path, graph) in dims.books.graphs.items() if path == site.path and graph is site.graph)
    value = dims.books.nodes[scope, site.node.name]
    where = f"the output of {after!r}"
    if not isinstance(value, Labelled):
        raise EditError(f"{where} is not one tensor")
    spatial, channels = _kind(dims, value, where)
    activation = activation_of(site.owner, site.node)
    idempotent = activation in IDEMPOTENT
    norm = spatial > 0 and _normalised(site, after)
    return InsertIdentity(
        after=after,
        name=name,
        form="layer" if idempotent else "residual",
        kernel=_kernel(site, after, value, spatial),
        norm=norm,
        activation=activation if idempotent else _nearest_activation(site),
        channels=channels,
        seed=zlib.crc32(f"{seed} {name}".encode()),
    )


def _kind(dims: Dimensions, value: Labelled, where: str) -> tuple[int, int]:
    """Number of spatial dims (0: the channels are last, for a linear layer) and of channels.

    Of two axes that hold something, as in (batch, tokens, channels), it is the one that can be edited.
    """
    last, second = value.at(-1), value.at(1) if value.ndim > 2 else None
    places = []
    if second is not None and second.dims == (1,) and 3 <= value.ndim <= 5:
        places.append((second, (value.ndim - 2, value.shape[1])))
    if last is not None and last.dims == (value.ndim - 1,):
        places.append((last, (0, value.shape[-1])))
    if not places:
        raise EditError(f"{where} has no channel axis to put a layer behind")
    return min(places, key=lambda place: bool(dims.frozen[dims.unit_of[place[0].ids]].all()))[1]


def _kernel(site: Site, after: str, value: Labelled, spatial: int) -> tuple[int, ...]:
    """The named layer's own kernel where it is odd, else 3; 1 along axes of size 1."""
    named = site.owner.get_submodule(after[len(site.path) + 1 :] if site.path else after)
    own = getattr(named, "kernel_size", None)
    sizes = own if isinstance(own, tuple) and len(own) == spatial else (3,) * spatial
    return tuple(1 if size == 1 else k if k % 2 else 3 for k, size in zip(sizes, value.shape[2:], strict=False))


def _normalised(site: Site, after: str) -> bool:
    """Whether convolutions at the place are followed by BatchNorm: those inside a container, or around a layer."""
    local = after[len(site.path) + 1 :] if site.path else after
    named = site.owner.get_submodule(local)
    norms = nn.modules.batchnorm._BatchNorm
    if any(True for _ in named.children()):
        return any(isinstance(m, norms) for m in named.modules())
    seen: fx.Node | None = site.node
    for _ in range(3):  # activation, normalisation, layer
        if seen is None or (seen.op == "call_module" and seen.target == local):
            return False
        if seen.op == "call_module" and isinstance(site.owner.get_submodule(str(seen.target)), norms):
            return True
        seen = next((a for a in seen.args if isinstance(a, fx.Node)), None)
    return False


def _nearest_activation(site: Site) -> str:
    """The last activation computed before the place; ReLU where there is none."""
    found = "ReLU"
    for node in site.graph.nodes:
        activation = activation_of(site.owner, node)
        if activation and activation not in _GATES:
            found = activation
        if node is site.node:
            break
    return found


def _free_name(module: nn.Module, after: str, taken: set[str]) -> str:
    """The next number in a container of numbered children; else a name of its own beside the layer."""
    named = module.get_submodule(after)
    children = [n for n, _ in named.named_children()]
    number = 0
    if children and all(n.isdigit() for n in children):
        number = max(map(int, children)) + 1
        pattern = f"{after}.{{}}"
    elif isinstance(named, TracedModule) and after:  # Python calls it: what is beside it is not in its graph
        pattern = f"{after}.identity{{}}"
    else:
        pattern = f"{after}_identity{{}}"
    while pattern.format(number) in taken:
        number += 1
    return pattern.format(number)
