"""`SwitchOff`: the dense network with its reset-hypothesis switched off, which is what a slim network equals.

Masked weights are 0. That is not all: a LayerNorm or GroupNorm of the dense network sees the channels of the
reset-hypothesis too, and zeros change a mean and a variance. So its statistics leave these channels out.

A mask is stored as text. Where it keeps whole channels, as in KELS, the text has for each axis the positions it keeps
(``"0:32,40 x 0:16 x : x :"``). Any other mask, as in WELS, is its bits, compressed.
"""

from __future__ import annotations

import base64
import copy
import functools
import inspect
import operator
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from surgery.axes.analysis import Analysis, analyse
from surgery.axes.labels import Field, Labelled
from surgery.axes.ledger import Norm
from surgery.edit.sites import add_constant, called_layer, in_copy
from surgery.edit.step import Step
from surgery.errors import EditError, UsageError, unknown_name
from surgery.graph.rule_table import Rule, rule_for, rule_of_class
from surgery.graph.traced import TracedModule, traced_parts
from surgery.layers.norms import restrict_norm


@dataclass(frozen=True)
class SwitchOff(Step):
    """Set entries of parameters to 0, and leave channels that are gone entirely out of statistics and sums.

    Attributes:
        keep: for parameters, by their first name, the entries that are kept, as text (`mask_text`).
    """

    keep: Mapping[str, str]

    def apply(self, module: nn.Module) -> nn.Module:
        """See `Step.apply`."""
        parameters = dict(module.named_parameters())
        masks: dict[str, Tensor] = {}
        memo: dict[int, Any] = {}
        for name, text in self.keep.items():
            parameter = parameters.get(name)
            if parameter is None:
                raise unknown_name("parameter", name, parameters)
            masks[name] = parse_mask(text, parameter.shape, name).to(parameter.device)
            kept = parameter.detach().masked_fill(~masks[name], 0)
            memo[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        _refuse_second(module)
        analysis = analyse(module)
        keep = kept_units(module, analysis, masks)
        result = copy.deepcopy(module, memo)
        normalise_over(result, analysis, keep)
        sum_over(result, analysis, keep)
        keep_off_poles(result, analysis, keep)
        return result

    def describe(self) -> str:
        """See `Step.describe`."""
        whole = sum(set(text) <= set(": x") for text in self.keep.values())
        return f"SwitchOff: masks of {len(self.keep)} parameters, {whole} of them kept whole"


def mask_text(mask: Tensor) -> str:
    """A bool mask as text: for each axis the positions it keeps, or the compressed bits where it is not that."""
    if mask.ndim == 0:
        return "0:1" if mask else "0:0"
    others = [[k for k in range(mask.ndim) if k != axis] for axis in range(mask.ndim)]
    axes = [mask.any(dim=dims) if dims else mask for dims in others]
    if torch.equal(_product(axes), mask):
        return " x ".join(":" if bool(flags.all()) else _runs_text(flags) for flags in axes)
    bits = np.packbits(mask.cpu().numpy().ravel())
    return f"bits {base64.b64encode(zlib.compress(bits.tobytes(), 6)).decode()}"


def parse_mask(text: str, shape: torch.Size, name: str) -> Tensor:
    """The inverse of `mask_text`, on the CPU.

    Raises:
        UsageError: the text does not describe a mask of that shape.
    """
    problem = UsageError(f"the mask of {name!r} is not one for its shape {tuple(shape)}")
    try:
        if text.startswith("bits "):
            bits = np.frombuffer(zlib.decompress(base64.b64decode(text[5:], validate=True)), dtype=np.uint8)
            if len(bits) != -(-shape.numel() // 8):
                raise problem
            return torch.from_numpy(np.unpackbits(bits, count=shape.numel()).astype(bool)).reshape(shape)
        sizes = tuple(shape) or (1,)
        axes = [_flags(part, size) for part, size in zip(text.split(" x "), sizes, strict=True)]
    except (ValueError, zlib.error) as error:
        raise problem from error
    return _product(axes).reshape(shape)


def _flags(text: str, size: int) -> Tensor:
    flags = torch.zeros(size, dtype=torch.bool)
    for run in text.split(","):
        first, colon, last = run.partition(":")
        start = int(first or 0)
        end = (int(last) if last else size) if colon else start + 1
        if not 0 <= start <= end <= size:
            raise ValueError(run)
        flags[start:end] = True
    return flags


def _runs_text(flags: Tensor) -> str:
    """``"0:4,7"`` for the positions that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags.cpu().numpy(), [False]))))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return ",".join(f"{a}:{b}" if b > a + 1 else f"{a}" for a, b in runs) or "0:0"


def _product(axes: list[Tensor]) -> Tensor:
    """The mask that keeps the entries whose positions are kept along each axis."""
    result = torch.ones((), dtype=torch.bool, device=axes[0].device)
    for flags in axes:
        result = result.unsqueeze(-1) & flags
    return result


def _refuse_second(module: nn.Module) -> None:
    """The analysis knows nothing of norms over a part of their channels, so it could not leave out more."""
    for _, part in traced_parts(module):
        for node in (node for graph in part.graphs for node in graph.nodes if node.op.startswith("call")):
            leaf = called_layer(part, node)
            if rule_for(node, leaf).kind == "restricted norm":
                raise EditError(
                    f"channels are already left out of the statistics of {str(node.target if leaf else node.name)!r}: "
                    "mask the module from before"
                )


def kept_units(module: nn.Module, analysis: Analysis, masks: Mapping[str, Tensor]) -> NDArray[np.bool_]:
    """For each unit, whether the masks keep anything of it."""
    names = {id(p): name for name, p in reversed(list(module.named_parameters()))}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    held, keep = np.zeros(analysis.count, dtype=bool), np.zeros(analysis.count, dtype=bool)
    for name, mask in masks.items():
        for axis in range(mask.ndim):
            units = analysis.axis_units.get((names[id(parameters[name])], axis))
            if units is not None:
                others = [k for k in range(mask.ndim) if k != axis]
                some = mask.any(dim=others) if others else mask
                held[units] = True
                keep[units[some.cpu().numpy()]] = True
    return keep | ~held


def normalise_over(module: nn.Module, analysis: Analysis, keep: NDArray[np.bool_]) -> None:
    """Let every normalisation over channels in ``module``, a copy of what ``analysis`` was made from, leave out the
    units that are not kept."""
    by_op: defaultdict[tuple[str, tuple[str, str]], list[Norm]] = defaultdict(list)
    for norm in analysis.norms:
        by_op[norm.path, norm.key].append(norm)
    by_layer: dict[str, Tensor] = {}
    for (path, key), norms in by_op.items():
        entries = _entries(analysis, keep, norms)
        if path and not torch.equal(by_layer.setdefault(path, entries), entries):
            raise EditError(f"{path} normalises over different channels in each of its calls: mask them alike")
        if not path and not entries.all():
            _restrict_call(module, analysis, key, entries)
    for path, entries in by_layer.items():
        if not entries.all():
            layer = module.get_submodule(path)
            over = rule_of_class(layer).over
            if over is None:
                raise EditError(f"{path}: channels cannot be left out of the statistics of a {type(layer).__name__}")
            restrict_norm(layer, entries.to(_device(module)), over)


def _restrict_call(module: nn.Module, analysis: Analysis, key: tuple[str, str], entries: Tensor) -> None:
    """Let a function that normalises compute its statistics over ``entries``."""
    owner, node = in_copy(module, analysis, *key)
    rule = rule_for(node, None)
    if rule.over is None:
        raise EditError(f"{key[1]}: channels cannot be left out of its statistics")
    names = list(inspect.signature(rule.over).parameters)[2:]
    given = rule.arguments(node)
    with node.graph.inserting_before(node):
        mask = _constant(module, owner, node.graph, entries)
    node.op, node.target = "call_function", rule.over
    node.args, node.kwargs = (next(iter(given.values())), mask), {k: v for k, v in given.items() if k in names}
    owner.recompile()


def sum_over(module: nn.Module, analysis: Analysis, keep: NDArray[np.bool_]) -> None:
    """Let what is added up over channels, a product of two activations or a length, leave out those not kept."""
    for (scope, name), ids in analysis.sums:
        units = analysis.unit_of[ids]
        if keep[units].all():
            continue
        owner, node = in_copy(module, analysis, scope, name)
        for source in node.all_input_nodes:
            for f, flags in _flags_of(analysis, keep, scope, source):
                if np.isin(analysis.unit_of[f.ids], units).any():
                    with node.graph.inserting_before(node):
                        mask = _constant(module, owner, node.graph, flags)
                        node.replace_input_with(source, node.graph.call_function(operator.mul, (source, mask)))
        owner.recompile()


def keep_off_poles(module: nn.Module, analysis: Analysis, keep: NDArray[np.bool_]) -> None:
    """Give units that are not kept another value where an op is not finite at 0, as a division by a channel's own
    length is: their weights of 0 behind it would not make that 0 again, nor would those before it the gradient."""
    for scope, (path, graph) in analysis.graphs.items():
        owner = module.get_submodule(path)
        for node in graph.nodes:
            if not node.op.startswith("call"):
                continue
            rule = rule_for(node, called_layer(owner, node))
            pole, operands = rule.pole, (*node.args, *node.kwargs.values())
            if pole is None or pole >= len(operands):
                continue
            gone = [flags for _, flags in _flags_of(analysis, keep, scope, operands[pole]) if not flags.all()]
            if gone:
                kept = functools.reduce(operator.and_, gone)
                _replace_operand(rule, module, analysis, (scope, node.name), kept)


def _replace_operand(rule: Rule, module: nn.Module, analysis: Analysis, key: tuple[str, str], keep: Tensor) -> None:
    """Only in the operand with the pole: another one may be the same tensor. What the op changes in place is what has
    to be changed, for it is read by its old name as well."""
    owner, node = in_copy(module, analysis, *key)
    place = rule.pole or 0
    if place == 0 and node.target in rule.in_place:
        with node.graph.inserting_before(node):
            gone = _constant(module, owner, node.graph, ~keep)
            node.graph.call_method("masked_fill_", (node.args[0], gone, rule.regular))
        owner.recompile()
        return
    name = list(node.kwargs)[place - len(node.args)] if place >= len(node.args) else ""
    source = node.kwargs[name] if name else node.args[place]
    with node.graph.inserting_before(node):
        mask = _constant(module, owner, node.graph, keep)
        other = node.graph.call_function(torch.where, (mask, source, rule.regular))
    if name:
        node.update_kwarg(name, other)
    else:
        node.update_arg(place, other)
    owner.recompile()


def _flags_of(analysis: Analysis, keep: NDArray[np.bool_], scope: str, source: Any) -> list[tuple[Field, Tensor]]:
    """Which units of a node's tensor are kept, for each field of it, in a shape that broadcasts to the tensor's."""
    value = analysis.values.get((scope, source.name)) if isinstance(source, fx.Node) else None
    if not isinstance(value, Labelled):
        return []
    shapes = ([size if d in f.dims else 1 for d, size in enumerate(value.shape)] for f in value.fields)
    kept = (torch.from_numpy(keep[analysis.unit_of[f.ids]]) for f in value.fields)
    return [(f, flags.reshape(shape)) for f, flags, shape in zip(value.fields, kept, shapes, strict=True)]


def _constant(module: nn.Module, owner: TracedModule, graph: fx.Graph, keep: Tensor) -> fx.Node:
    return add_constant(owner, graph, "kept", keep.to(_device(module)))


def _device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)


def _entries(analysis: Analysis, keep: NDArray[np.bool_], norms: list[Norm]) -> Tensor:
    result = torch.ones(norms[0].shape, dtype=torch.bool)
    for norm in norms:
        flags = torch.from_numpy(keep[analysis.unit_of[norm.ids]])
        if norm.shape != norms[0].shape:
            if not flags.all():
                raise EditError(f"{norm.path or norm.key[1]} is called on tensors of several widths: keep all of them")
            continue
        result &= flags.reshape([size if d in norm.dims else 1 for d, size in enumerate(norm.shape)])
    return result
