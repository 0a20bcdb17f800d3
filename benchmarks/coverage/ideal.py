"""What a model would cost if every axis that holds channels were cut (or grown) in full: the figure to measure against.

It is read off the model as torchvision builds it, before anything is traced, and owes nothing to the analysis that is
measured. An axis of n channels gets ``change(n)`` of them, except for

* the network's input and output. A layer reads the input if nothing but the input leads to it without another layer in
  between, and writes the output if it leads to one without another layer in between; both are read off autograd's
  graph. Only the axis concerned stays whole.
* axes without channels: what is computed from constants alone (the coordinates behind Swin v2's position biases,
  RAFT's detached flow), tables over positions, and RAFT's correlation features, named in `_POSITIONS`.
* the heads of an attention layer, of which there are ``change(heads)`` whole ones: of head_dim channels each, in the
  queries, keys and values that are written and in the values that are read. Products of activations in it, and
  what is computed in each head alone (MViT's pools), go with the number of heads.

Products of activations outside of attention (RAFT's correlation) contract over channels, and go with them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from surgery.counting.cost import weight_macs
from surgery.models.detectors import is_detector, raw_outputs

_POSITIONS = {"update_block.motion_encoder.convcorr1.*weight": 1}
"""Axes whose positions are not channels: RAFT's correlations with the pixels around."""

_WRITTEN = ("in_proj_weight", "in_proj_bias", "qkv.weight", "qkv.bias", "to_qkv.weight", "to_qkv.bias")
_READ = ("out_proj.weight", "proj.weight", "merge.weight", "project.0.weight")
_PER_HEAD = {"relative_position_bias_table": 1, "logit_scale": 0, "cpb_mlp.2.weight": 0}


@dataclass(frozen=True)
class Ideal:
    """MACs in evaluation and parameters, of the model as it is and with every channel axis changed."""

    macs: float
    params: float
    dense_macs: int
    dense_params: int


def ideals(model: nn.Module, inputs: tuple[Any, ...], changes: Mapping[str, Callable[[int], int]]) -> dict[str, Ideal]:
    """The ideal cost of an untraced model under each of the ``changes``.

    ``inputs`` are tensors, of a batch of two; of a detection model, one batch of images, and its network is what is
    meant (see `surgery.models.detectors`).
    """
    whole = _whole_axes(model, inputs)
    heads = dict(_attention(model))
    macs = weight_macs(model, inputs)
    products = _products(model, inputs, heads, macs)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def under(change: Callable[[int], int]) -> Ideal:
        cut = {name: _cut(name, shape, whole, heads, change) for name, shape in shapes.items()}
        of_weights = sum(
            count * math.prod(cut[name]) / math.prod(shapes[name]) * _per_head(name, heads, change)
            for name, count in macs.items()
            if name
        )
        of_heads = sum(count * change(heads[path]) / heads[path] for path, count in products.items() if path)
        others = products.get("", 0) * change(1000) / 1000
        params = sum(map(math.prod, cut.values()))
        return Ideal(of_weights + of_heads + others, params, sum(macs.values()), sum(map(math.prod, shapes.values())))

    return {name: under(change) for name, change in changes.items()}


def _attention(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The path of each attention layer, and its number of heads."""
    for path, module in model.named_modules():
        count = getattr(module, "num_heads", getattr(module, "n_heads", None))
        if isinstance(count, int) and any(True for _ in module.parameters()):
            yield path, count


def _within(name: str, heads: dict[str, int]) -> tuple[str, str] | None:
    """The attention layer that a parameter is of, and the parameter's name in it."""
    path = next((p for p in heads if name.startswith(p + ".")), None)
    return None if path is None else (path, name[len(path) + 1 :])


def _per_head(name: str, heads: dict[str, int], change: Callable[[int], int]) -> float:
    """By how much less a layer runs that runs once in each head."""
    found = _within(name, heads)
    return change(heads[found[0]]) / heads[found[0]] if found and found[1].startswith("pool_") else 1.0


def _cut(
    name: str,
    shape: tuple[int, ...],
    whole: dict[str, set[int]],
    heads: dict[str, int],
    change: Callable[[int], int],
) -> list[int]:
    """The shape of a parameter after the change."""
    sizes = list(shape)
    special: dict[int, int] = {}
    found = _within(name, heads)
    if found is not None:
        path, own = found
        count = heads[path]
        if own.startswith(("pool_", "rel_pos_")):
            return sizes  # over head_dim
        for axis, names in ((0, _WRITTEN), (1, _READ)):
            if own in names:
                special[axis] = sizes[axis] // count * change(count)
        if own in _PER_HEAD:
            special[_PER_HEAD[own]] = change(count)
    axes = [0, 1] if name in whole else [0] if math.prod(shape[1:]) == 1 else [len(shape) - 1]
    for axis in axes[: len(shape)]:
        if axis in special:
            sizes[axis] = special[axis]
        elif axis not in whole.get(name, ()) and sizes[axis] > 1:
            sizes[axis] = change(sizes[axis])
    for axis, size in special.items():
        sizes[axis] = size
    bias_of = name.removesuffix("bias") + "weight"
    if name.endswith("bias") and 0 in whole.get(bias_of, ()) and len(shape) == 1:
        return list(shape)
    return sizes


def _whole_axes(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, set[int]]:
    """For each weight of a layer, the axes that stay whole."""
    whole: dict[str, set[int]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if name.endswith("weight") and parameter.ndim > 1 and not isinstance(module, nn.Embedding):
                whole[name] = {axis for pattern, axis in _POSITIONS.items() if fnmatchcase(name, pattern)}
    for training in (False,) if is_detector(model) else (False, True):
        for name, axes in _ends(model, inputs, training, set(whole)).items():
            whole[name] |= axes
    return whole


def _ends(model: nn.Module, inputs: tuple[Any, ...], training: bool, layers: set[str]) -> dict[str, set[int]]:
    """The axes that read the network's input, or nothing, and those that write its output."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model).train(training)
    transposed = {f"{path}.weight".lstrip(".") for path, m in fake.named_modules() if getattr(m, "transposed", False)}
    given = tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t).requires_grad_(), inputs)
    with mode, torch.random.fork_rng(devices=[]):
        outputs = raw_outputs(fake, *given) if is_detector(model) else fake(*given)
    names = {id(p): n for n, p in fake.named_parameters() if n in layers}
    graph = _Graph(names, {id(t) for t in tree_leaves(given)})
    starts = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    whole: dict[str, set[int]] = {}
    for node in graph.reached(starts)[0]:
        name = graph.weight(node)
        assert name is not None
        whole.setdefault(name, set()).add(1 if name in transposed else 0)
    for node in graph.layers(starts):
        name = graph.weight(node)
        assert name is not None
        if not graph.reached(graph.activations(node))[0]:
            whole.setdefault(name, set()).add(0 if name in transposed else 1)
    return whole


class _Graph:
    """Autograd's graph, as layers and what lies between them."""

    def __init__(self, names: dict[int, str], inputs: set[int]) -> None:
        self.names = names
        self.weights = set(names.values())
        self.inputs = inputs

    def reached(self, starts: list[Any]) -> tuple[list[Any], bool]:
        """The layers behind some nodes without another in between, and whether the network's input is among them."""
        found, seen, stack, leads_to_input = [], set(), list(starts), False
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.weight(node) is not None:
                found.append(node)
            elif hasattr(node, "variable"):
                leads_to_input |= id(node.variable) in self.inputs
            else:
                stack += [parent for parent, _ in node.next_functions if parent is not None]
        return found, leads_to_input

    def layers(self, starts: list[Any]) -> list[Any]:
        """All layers behind some nodes."""
        found: dict[Any, None] = {}
        queue = list(starts)
        while queue:
            nodes, _ = self.reached(queue)
            fresh = [node for node in nodes if node not in found]
            found |= dict.fromkeys(fresh)
            queue = [parent for node in fresh for parent in self.activations(node)]
        return list(found)

    def weight(self, node: Any) -> str | None:
        """The weight of a node that multiplies with one."""
        if not node.name().startswith(("Convolution", "Addmm", "Mm", "Bmm", "Linear")):
            return None
        return next((n for n in (self._parameter(p) for p, _ in node.next_functions) if n in self.weights), None)

    def activations(self, node: Any) -> list[Any]:
        """What a layer reads."""
        return [p for p, _ in node.next_functions if p is not None and not self._is_parameter(p)]

    def _parameter(self, node: Any) -> str | None:
        leaf = _leaf(node)
        return None if leaf is None else self.names.get(id(leaf.variable))

    def _is_parameter(self, node: Any) -> bool:
        leaf = _leaf(node)
        return leaf is not None and id(leaf.variable) not in self.inputs


def _leaf(node: Any) -> Any:
    """The leaf that a node only reshapes, if it does."""
    while node is not None and not hasattr(node, "variable"):
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1 or not node.name().startswith(
            ("T", "View", "UnsafeView", "Permute", "Expand", "Unsqueeze")
        ):
            return None
        node = parents[0]
    return node


def _products(
    model: nn.Module, inputs: tuple[Any, ...], heads: dict[str, int], macs: dict[str, int]
) -> dict[str, float]:
    """MACs of products of activations in each attention layer, by its path, and elsewhere, under ``""``."""
    total = macs.get("", 0)
    if not total:
        return {}
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model).eval()
    one = tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t[:1]), inputs)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
            fake(*one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    by_module = {path.partition(".")[2]: sum(ops.values()) / 2 for path, ops in counter.get_flop_counts().items()}
    found = {}
    for path in heads:
        found[path] = by_module.get(path, 0) - sum(n for name, n in macs.items() if name.startswith(path + "."))
    found[""] = total - sum(found.values())
    return found
