"""Export of models that return objects of classes that torch's pytrees do not know."""

from __future__ import annotations

import collections
import dataclasses

import onnx
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import surgery


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    features: tuple[torch.Tensor, ...]


class Items(collections.OrderedDict):
    pass


class Registered(collections.OrderedDict):
    """As libraries register theirs: pytrees look into it, and have no names for what they find."""


pytree.register_pytree_node(
    Registered,
    lambda found: (list(found.values()), list(found)),
    lambda values, names: Registered(zip(names, values, strict=True)),
)


class Plain:
    def __init__(self, *found):
        self.found = list(found)


KINDS = {
    "a dataclass": (lambda y, f: Out(y, (f, f * 2)), ["logits", "features_0", "features_1"]),
    "a subclass of dict": (lambda y, f: Items(logits=y, features=f), ["logits", "features"]),
    "a registered class": (lambda y, f: Registered(logits=y, features=f), ["logits", "features"]),
    "an object": (lambda y, f: Plain(y, f), ["found_0", "found_1"]),
    "inside of others": (lambda y, f: {"a": y, "b": [Out(f, ())]}, ["a", "b_0_logits"]),
}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.c, self.kind = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 3), kind

    def forward(self, x):
        features = self.b(self.a(x).relu()).relu()
        return KINDS[self.kind][0](self.c(features), features)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_in_outputs_of_any_class_are_exported_by_their_paths(kind, traced, exporter, tmp_path):
    torch.manual_seed(0)
    model, x = Net(kind), torch.randn(2, 4)
    given = surgery.widen(surgery.trace(model, x), 2.0) if traced else model
    done = surgery.export_onnx(given, tmp_path / "m.onnx", example_inputs=x, exporter=exporter)
    assert done.max_rel < 1e-5
    assert [node.name for node in onnx.load(tmp_path / "m.onnx").graph.output] == KINDS[kind][1]
    assert type(given(x)) is type(model(x))
