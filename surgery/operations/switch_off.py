"""Normalisation whose statistics are computed over some of its channels: the reference that a slim network equals.

A LayerNorm or GroupNorm of the dense network sees the channels of the reset-hypothesis too, and zeros change a mean and
a variance. Switching these channels off means leaving them out of the statistics as well.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from surgery.axes.groups import Analysis
from surgery.axes.labels import Labelled
from surgery.axes.ledger import Norm
from surgery.edit.sites import in_copy
from surgery.errors import EditError
from surgery.graph.table import rule_for, rule_of_class
from surgery.graph.tracing import TracedModule
from surgery.layers.norms import restrict_norm


def kept_units(module: nn.Module, dims: Analysis, masks: Mapping[str, Tensor]) -> NDArray[np.bool_]:
    """For each unit, whether the masks keep anything of it."""
    names = {id(p): name for name, p in reversed(list(module.named_parameters()))}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    held, keep = np.zeros(dims.count, dtype=bool), np.zeros(dims.count, dtype=bool)
    for name, mask in masks.items():
        for axis in range(mask.ndim):
            units = dims.axis_units.get((names[id(parameters[name])], axis))
            if units is not None:
                others = [k for k in range(mask.ndim) if k != axis]
                some = mask.any(dim=others) if others else mask
                held[units] = True
                keep[units[some.cpu().numpy()]] = True
    return keep | ~held


def normalise_over(module: nn.Module, dims: Analysis, keep: NDArray[np.bool_]) -> None:
    """Let every normalisation over channels in ``module``, a copy of what ``dims`` was made from, leave out the
    units that are not kept."""
    by_op: defaultdict[tuple[str, tuple[str, str]], list[Norm]] = defaultdict(list)
    for norm in dims.findings.norms:
        if not keep[dims.unit_of[norm.ids]].all():
            by_op[norm.path, norm.key].append(norm)
    for (path, (scope, name)), norms in by_op.items():
        entries = _entries(dims, keep, norms)
        if path:
            layer = module.get_submodule(path)
            over = rule_of_class(layer).over
            if over is None:
                raise EditError(f"{path}: channels cannot be left out of the statistics of a {type(layer).__name__}")
            restrict_norm(layer, entries.to(next((p.device for p in module.parameters()), None)), over)
            continue
        owner, node = in_copy(module, dims, scope, name)
        rule = rule_for(node, None)
        if rule.over is None:
            raise EditError(f"{name}: channels cannot be left out of its statistics")
        names = list(inspect.signature(rule.over).parameters)[2:]
        given = rule.arguments(node)
        with node.graph.inserting_before(node):
            mask = _constant(module, owner, node.graph, entries)
        node.target = rule.over
        node.args, node.kwargs = (next(iter(given.values())), mask), {k: v for k, v in given.items() if k in names}
        owner.recompile()


def sum_over(module: nn.Module, dims: Analysis, keep: NDArray[np.bool_]) -> None:
    """Let what is added up over channels, a product of two activations or a length, leave out those not kept."""
    for (scope, name), ids in dims.findings.sums:
        units = dims.unit_of[ids]
        if keep[units].all():
            continue
        owner, node = in_copy(module, dims, scope, name)
        for source in node.all_input_nodes:
            value = dims.findings.nodes.get((scope, source.name))
            if not isinstance(value, Labelled):
                continue
            for f in value.fields:
                if np.isin(dims.unit_of[f.ids], units).any():
                    flags = torch.from_numpy(keep[dims.unit_of[f.ids]])
                    shape = [size if d in f.dims else 1 for d, size in enumerate(value.shape)]
                    with node.graph.inserting_before(node):
                        mask = _constant(module, owner, node.graph, flags.reshape(shape))
                        node.replace_input_with(source, node.graph.call_function(operator.mul, (source, mask)))
        owner.recompile()


def _constant(module: nn.Module, owner: TracedModule, graph: fx.Graph, keep: Tensor) -> fx.Node:
    """A node that reads ``keep`` from a buffer outside the state dict."""
    number = 0
    while hasattr(owner, f"_kept_{number}"):
        number += 1
    owner.register_buffer(
        f"_kept_{number}", keep.to(next((p.device for p in module.parameters()), None)), persistent=False
    )
    return graph.get_attr(f"_kept_{number}")


def _entries(dims: Analysis, keep: NDArray[np.bool_], norms: list[Norm]) -> Tensor:
    result = torch.ones(norms[0].shape, dtype=torch.bool)
    for norm in norms:
        flags = torch.from_numpy(keep[dims.unit_of[norm.ids]])
        result &= flags.reshape([size if d in norm.dims else 1 for d, size in enumerate(norm.shape)])
    return result
