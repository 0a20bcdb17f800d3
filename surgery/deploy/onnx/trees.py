"""Outputs of classes that exporters do not know, as dicts of the tensors in them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.graph.outputs import tensors_in
from surgery.graph.traced import TracedModule


def open_outputs(model: nn.Module) -> None:
    """Let ``model`` return, for each object that torch's pytrees do not look into, a dict of the tensors in it, by
    their paths."""
    if not isinstance(model, TracedModule):
        model.register_forward_hook(lambda _module, _inputs, output: known_tree(output))
        return
    for graph in model.graphs:  # which exporters run without hooks
        end = graph.output_node()
        with graph.inserting_before(end):
            end.args = (graph.call_function(known_tree, (end.args[0],)),)
    model.recompile()


def known_tree(value: Any) -> Any:
    """``value``, with a dict of the tensors in it for each object in it that pytrees do not look into, or whose parts
    they have no names for, as exporters need them."""
    return pytree.tree_map(_opened, value, is_leaf=_is_nameless)


def _is_nameless(value: Any) -> bool:
    kind = pytree.SUPPORTED_NODES.get(type(value))
    return kind is not None and kind.flatten_with_keys_fn is None


def _opened(leaf: Any) -> Any:
    found = [] if isinstance(leaf, torch.Tensor) else tensors_in(leaf)
    return {re.sub(r"\W+", "_", path).strip("_"): tensor for path, tensor in found} if found else leaf
