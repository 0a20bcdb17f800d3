"""Net2DeeperNet: more layers, the same function (Chen, Goodfellow, Shlens 2016, section 3.2)."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import fx, nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.labels import Labelled
from surgery.edit.apply import apply, carry_out
from surgery.edit.blocks import find_block
from surgery.edit.flow import Flow
from surgery.edit.insert_block import InsertBlock, copied_blocks, zero_names
from surgery.edit.insert_dense import InsertDense, dense_edit
from surgery.edit.insert_identity import InsertIdentity, weight_before
from surgery.edit.moments import calibrate, identity_eps
from surgery.edit.names import find_places
from surgery.edit.sites import Site, called_layer, is_called, local_name, op_of, output_sites
from surgery.edit.step import Step
from surgery.errors import EditError, UsageError, unknown_name, whole_number
from surgery.graph.rule_table import rule_of_class
from surgery.graph.tracing import info
from surgery.layers.activation import has_defaults
from surgery.layers.maxout import Maxout
from surgery.selectors import Where

FORMS = ("layer", "residual", "block")


def deepen(
    module: nn.Module,
    places: Mapping[Any, int] | Where,
    *,
    form: str | None = None,
    kernel: int | Sequence[int] | None = None,
    calibration: Any = None,
    seed: int = 0,
) -> nn.Module:
    """Insert layers or blocks that compute the identity, and can learn.

    ``form`` says what is inserted:

    - ``"layer"``: an identity convolution or linear layer, BatchNorm where the place has any, and the activation
      (Net2DeeperNet). Only where the activation changes nothing: behind ReLU and ReLU6, and behind pools and
      concatenations of what they give; maxout, with the identity in each piece, where that is the activation before;
      or without one, where the value is no activation's.
    - ``"residual"``: a block with a skip connection whose last layer is zero. Anywhere.
    - ``"block"``: a copy of the block at the end of a container, its last layers zero (LLaMA-Pro): a ResNet's or an
      inverted residual block, a layer of a Transformer, whatever adds layers to a skip connection. Of a layer, it is
      the smallest block that the layer is in. At the end of a dense block it is one more layer, a copy of the last one
      that reads its output too; what reads the block reads the new channels with weights of 0.

    By default it is a block at the end of containers that have one; else a layer where it can be, else residual. All
    are exact in ``eval()``, and blocks in ``train()`` as well (their dropout draws random numbers of its own). The
    BatchNorm behind an identity convolution normalises by the batch in ``train()``; its weight and bias are set to the
    standard deviation and mean of what it is given, so that little changes there (Net2Net, section 3.2); not in 16
    bits. What is inserted can learn, also where the model is frozen.

    Args:
        module: a traced module.
        places: where to insert (`surgery.selectors`), or how many at each place: ``{"layer3": 2}``, ``{"layer*": 1}``.
            At a container means at its end; at a layer means after the normalisation and activation that follow it.
        form: what is inserted; by default what fits.
        kernel: size of the identity convolutions, odd; one for each direction or the same for all. By default that of
            the named layer where it is odd, else 3. With a kernel the default is to insert layers, no blocks.
        calibration: a batch of the model's inputs (a tensor, or a tuple of positional inputs) whose activations'
            statistics the BatchNorms are set to. By default those that the BatchNorms before them predict.
        seed: of the random first layers of residual blocks.

    Returns:
        a new module.

    Raises:
        UsageError: an unknown name or form, a count below 1, a kernel that is even or has another number of directions
            than the place, a calibration batch without finite statistics.
        EditError: a place without one output, or whose output has no channels; a form that is not exact there.

    Example:
        >>> deep = surgery.deepen(traced, {"layer3": 2})
        >>> surgery.verify(deep, traced).ok
        True
    """
    steps = deepen_plan(module, places, form=form, kernel=kernel, seed=seed)
    result = apply(module, steps)
    if calibration is not None:
        calibrate(result, [norm for step in steps for new in step.inserted() for norm in new.norms], calibration)
    return result


def deepen_plan(
    module: nn.Module,
    places: Mapping[Any, int] | Where,
    *,
    form: str | None = None,
    kernel: int | Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[Step, ...]:
    """The steps that `deepen` takes."""
    info(module)
    if form is not None and form not in FORMS:
        raise unknown_name("form", form, FORMS)
    if form == "block" and kernel is not None:
        raise UsageError("a copied block has the kernels of the block it is a copy of: give a form or a kernel")
    sizes = tuple(kernel) if isinstance(kernel, Sequence) else kernel
    for size in () if sizes is None else sizes if isinstance(sizes, tuple) else (sizes,):
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1 or size % 2 == 0:
            raise UsageError(f"the kernel of an identity must be odd in each direction, not {kernel}")
    taken = {name for name, _ in module.named_modules()}
    steps: list[Step] = []
    wanted = find_places(module, places.items() if isinstance(places, Mapping) else [(places, 1)])
    for number, (name, count) in enumerate(wanted.items(), 1):
        count = whole_number(f"the number of layers behind {name!r}", count, 1)
        analysis, first = analyse(module), len(steps)
        site = next(iter(output_sites(module, name)))
        dense = like = None
        if kernel is None:
            dense = _find_dense(module, analysis, site, name, form)
            like = _find_copied(module, analysis, site, name, form) if dense is None else dense
        for _ in range(count):
            inside = _next_free(f"{name}.layer", 0, taken) if dense is not None and not like else None
            new = inside or _new_name(module, site, name, like, taken)
            taken.add(new)
            if dense is not None:
                steps.append(InsertDense(name, new, dense))
                dense = new
            elif like is None:
                steps.append(_identity_step(module, analysis, site, name, new, form, sizes, seed))
            else:
                steps.append(_copy_step(module, analysis, name, like, new))
        if dense is not None and number < len(wanted):  # what reads the block has more channels now
            module = carry_out(module, steps[first:])
    return tuple(steps)


def _find_dense(module: nn.Module, analysis: Analysis, site: Site, name: str, form: str | None) -> str | None:
    """The container that is the last layer of a dense block at the end of ``name``, or an empty name for one that no
    container is; None where there is no dense block, or by default where it cannot have a further layer."""
    if form not in (None, "block") or is_called(site, name):
        return None
    try:
        edit = dense_edit(module, analysis, name)
    except EditError:
        if form is None:
            return None
        raise
    return None if edit is None else edit.like


def _find_copied(module: nn.Module, analysis: Analysis, site: Site, name: str, form: str | None) -> str | None:
    """What to copy behind ``name``: the name of a container, or an empty one for a block that has none."""
    if form not in (None, "block") or (form is None and is_called(site, name)):
        return None
    like = ""
    if not is_called(site, name):
        found = find_block(Flow(analysis, site), site.node, local_name(name, site.path))
        like = f"{site.path}.{found[0]}".lstrip(".") if found is not None and found[0] else ""
    try:
        copied_blocks(module, analysis, name, like)
    except EditError:
        if form is None:
            return None
        raise
    return like


def _copy_step(module: nn.Module, analysis: Analysis, after: str, like: str, name: str) -> InsertBlock:
    zeros = {zero_names(site, block, like, name) for site, _, block in copied_blocks(module, analysis, after, like)}
    if len(zeros) > 1:
        raise EditError(f"{like or after!r} ends in other layers in training than in evaluation")
    return InsertBlock(after, name, like, zeros.pop())


def _identity_step(
    module: nn.Module,
    analysis: Analysis,
    site: Site,
    after: str,
    name: str,
    form: str | None,
    kernel: int | tuple[int, ...] | None,
    seed: int,
) -> InsertIdentity:
    flow = Flow(analysis, site)
    value = flow.value(site.node)
    where = f"the output of {after!r}"
    if not isinstance(value, Labelled):
        raise EditError(f"{where} is not one tensor")
    spatial, channels = _find_channels(analysis, value, where)
    rule = op_of(site.owner, site.node)
    own = rule.name if rule.activation else ""
    nearest, pieces = _nearest_activation(site)
    again = own if rule.kind == "idempotent" else "ReLU" if not own and flow.range(site.node)[0] >= 0 else ""
    if nearest == "Maxout" and own in ("", "Maxout"):
        again = nearest
    if form == "layer" and own and not again:
        raise EditError(f"{where} is that of a {own}, which changes it when applied again: use form='residual'")
    layer = form == "layer" or (form is None and bool(again))
    activation = again if layer else nearest
    return InsertIdentity(
        after=after,
        name=name,
        form="layer" if layer else "residual",
        kernel=_choose_kernel(site, after, value, spatial, kernel),
        norm=spatial > 0 and _has_batch_norm(site, after),
        activation=activation,
        channels=channels,
        seed=zlib.crc32(f"{seed} {name}".encode()),
        pieces=pieces if activation == "Maxout" else 1,
        eps=identity_eps(weight_before(module, site, spatial).dtype),
    )


def _find_channels(analysis: Analysis, value: Labelled, where: str) -> tuple[int, int]:
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
    return min(places, key=lambda place: bool(analysis.frozen[analysis.unit_of[place[0].ids]].all()))[1]


def _choose_kernel(
    site: Site, after: str, value: Labelled, spatial: int, kernel: int | tuple[int, ...] | None
) -> tuple[int, ...]:
    """As asked for; else the named layer's own kernel where it is odd, else 3, and 1 along axes of size 1."""
    if isinstance(kernel, int):
        return (kernel,) * spatial
    if kernel is not None:
        if len(kernel) != spatial:
            raise UsageError(f"a kernel of {len(kernel)} sizes for the output of {after!r}, which takes {spatial}")
        return kernel
    named = site.owner.get_submodule(local_name(after, site.path))
    own = getattr(named, "kernel_size", None)
    sizes = own if isinstance(own, tuple) and len(own) == spatial else (3,) * spatial
    return tuple(1 if size == 1 else k if k % 2 else 3 for k, size in zip(sizes, value.shape[2:], strict=False))


def _has_batch_norm(site: Site, after: str) -> bool:
    """Whether convolutions at the place are followed by BatchNorm: those inside a container, or around a layer."""
    local = local_name(after, site.path)
    named = site.owner.get_submodule(local)
    if any(True for _ in named.children()):
        return any(rule_of_class(m).kind == "batch norm" for m in named.modules())
    seen: fx.Node | None = site.node
    for _ in range(3):  # activation, normalisation, layer
        if seen is None:
            return False
        rule = op_of(site.owner, seen)
        if seen.op == "call_module" and seen.target == local and not rule.activation:
            return False
        if rule.kind == "batch norm":
            return True
        seen = next((a for a in seen.args if isinstance(a, fx.Node)), None)
    return False


def _nearest_activation(site: Site) -> tuple[str, int]:
    """The last activation computed before the place, and its pieces if it is a maxout; ReLU where there is none."""
    found, pieces = "ReLU", 1
    for node in site.graph.nodes:
        rule = op_of(site.owner, node)
        layer = called_layer(site.owner, node)
        plain = rule.activation and rule.kind not in ("gate", "learned activation")
        if plain and (isinstance(layer, Maxout) or has_defaults(rule)):
            found = rule.name
            pieces = layer.pieces if isinstance(layer, Maxout) else 1
        if node is site.node:
            break
    return found, pieces


def _free_name(module: nn.Module, site: Site, after: str, what: str, taken: set[str]) -> str:
    """The next number in a container of numbered children; else a name derived from the layer's."""
    named = module.get_submodule(after)
    children = [n for n, _ in named.named_children()]
    if children and all(n.isdigit() for n in children):
        return _next_free(f"{after}.".lstrip("."), max(map(int, children)) + 1, taken)
    if site.path == after and after:  # Python calls it: its siblings are not in its graph
        return _next_free(f"{after}.{what}", 0, taken)
    return _next_free(f"{after}_{what}" if after else what, 0, taken)


def _new_name(module: nn.Module, site: Site, after: str, like: str | None, taken: set[str]) -> str:
    """The name of a copy: the next number after the last of numbered siblings, else the original's with a suffix."""
    if not like:
        return _free_name(module, site, after, "identity" if like is None else "block", taken)
    parent, _, child = like.rpartition(".")
    number = re.search(r"\d+$", child)
    if number is None:
        return _next_free(f"{like}_copy", 0, taken)
    stem = child[: number.start()]
    siblings = [n for n, _ in module.get_submodule(parent).named_children()]
    last = max(int(n[len(stem) :]) for n in siblings if re.fullmatch(re.escape(stem) + r"\d+", n))
    if int(number[0]) < last:
        return _next_free(f"{like}_copy", 0, taken)
    return _next_free(f"{parent}.{stem}".lstrip("."), last + 1, taken)


def _next_free(stem: str, first: int, taken: set[str]) -> str:
    return next(name for n in itertools.count(first) if (name := f"{stem}{n}") not in taken)
