"""Modules that compute values of a traced module: cut off behind them, or whole and handing them out in training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from surgery.graph.traced import TracedModule, TraceInfo, info, set_info
from surgery.taps.network import Tap, TappedNetwork, output_of
from surgery.taps.truncate import copy_graph, truncate


def truncate_to(network: TappedNetwork, taps: Sequence[Tap]) -> TracedModule:
    """A module that computes these values and nothing else, and returns a tuple of them."""
    result = truncate(network.module, [(f, [t.nodes[k] for t in taps]) for k, f in enumerate(network.flows)])
    for graph in result.graphs:
        end = graph.output_node()
        values: Any = end.args[0]
        with graph.inserting_before(end):
            end.args = (tuple(t.emit(graph, value) for t, value in zip(taps, values, strict=True)),)
        graph.lint()
    result.recompile()
    return result


def freeze_to(network: TappedNetwork, taps: Sequence[Tap]) -> TracedModule:
    """The same as a teacher: in evaluation mode, without gradients for its parameters or through its outputs."""
    detached = [t.through((torch.detach, ())) for t in taps]
    return truncate_to(network, detached).requires_grad_(False).eval()


def observe_taps(
    network: TappedNetwork, groups: Sequence[Sequence[Tap]], heads: Sequence[nn.Module | None]
) -> TracedModule:
    """A copy of the module that returns ``(output, values)`` in training: for each group of values a tuple of them,
    or, where there is a head, what that gives for them.

    The heads are in a container ``heads`` (or with a name like it that is free), each by the number of its group.
    """
    (flow,) = network.flows
    result = copy.deepcopy(network.module)
    ends = [t.nodes[0] for group in groups for t in group]
    graph, new, values = copy_graph(flow, ends, set(flow.graph.nodes))
    held = {str(k): head for k, head in enumerate(heads) if head is not None}
    at = attach(result, "heads", nn.ModuleDict(held), result) if held else ""
    outputs = []
    for k, (group, head) in enumerate(zip(groups, heads, strict=True)):
        given = tuple(t.emit(graph, values[t.nodes[0]]) for t in group)
        outputs.append(given if head is None else graph.call_module(f"{at}.{k}", given))
    graph.output((fx.map_arg(output_of(flow), new.__getitem__), tuple(outputs)))
    graph.lint()
    result.__dict__["train_graph"] = graph
    result.recompile()
    set_info(result, TraceInfo(None, info(network.module).args, info(network.module).kwargs))
    return result


def attach(module: TracedModule, name: str, part: nn.Module, whole: nn.Module) -> str:
    """Add a part to a module, in its dtype, mode and device, and return its name: ``name``, or one like it that
    ``whole`` does not have."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    names = (name, *(f"{name}_{k}" for k in range(len(whole._modules) + 1)))
    free = next(n for n in names if not hasattr(whole, n))
    module.add_module(free, part.to(like.device, like.dtype).train(module.training))
    return free
