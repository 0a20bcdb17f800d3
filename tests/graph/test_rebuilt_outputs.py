"""Objects that a model returns keep their class, and their tensors are outputs of the network."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import types

import pytest
import torch
from torch import nn

import surgery
from surgery.graph.outputs import tensors_in

D = torch.float64


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    features: list
    label: str = "x"
    count: int = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(frozen=True)
class Frozen:
    __slots__ = ("features", "logits")
    logits: torch.Tensor
    features: torch.Tensor


class Plain:
    def __init__(self, logits, features):
        self.logits, self.features, self.config = logits, {"deep": (features, features.mean())}, object
        self.maker = Plain

    def top(self):
        return self.logits.argmax(-1)


class Outputs(collections.OrderedDict):
    """Like a ``ModelOutput``: items are attributes too."""

    def __init__(self, **items):
        super().__init__(items)
        for key, value in items.items():
            setattr(self, key, value)
        self.name = "outputs"


class Listed(list):
    pass


MAKERS = {
    "dataclass": lambda logits, features: Out(logits, [features, None]),
    "frozen": Frozen,
    "plain": Plain,
    "namespace": lambda logits, features: types.SimpleNamespace(logits=logits, features=features, n=1),
    "nested": lambda logits, features: (Out(logits, [Plain(logits, features)]), 3),
    "model output": lambda logits, features: Outputs(logits=logits, features=features),
    "ordered": lambda logits, features: collections.OrderedDict(logits=logits, features=features),
    "default": lambda logits, features: collections.defaultdict(list, logits=logits, features=features),
    "list": lambda logits, features: Listed((logits, features)),
}


class Net(nn.Module):
    def __init__(self, kind, python=False):
        super().__init__()
        self.kind, self.python = kind, python
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        features = self.b(self.a(x).relu()).relu()
        if self.python and float(features.detach().sum()) > 1e9:
            features = features * 2
        return MAKERS[self.kind](self.c(features).mean((2, 3)), features)


def shape(value):
    """Classes and paths, without tensors."""
    if isinstance(value, (tuple, list)):
        return type(value), [shape(v) for v in value]
    if isinstance(value, dict):
        return type(value), {k: shape(v) for k, v in value.items()}, sorted(getattr(value, "__dict__", {}))
    return type(value), sorted(getattr(value, "__dict__", {}))


@pytest.mark.parametrize("python", [False, True], ids=["traced", "python"])
@pytest.mark.parametrize("kind", MAKERS)
def test_tensors_in_any_object_are_outputs_that_no_edit_changes(kind, python):
    torch.manual_seed(0)
    model = Net(kind, python).double()
    traced = surgery.trace(model, torch.rand(2, 3, 4, 4, dtype=D))
    assert isinstance(traced, torch.fx.GraphModule) is not python
    wide = surgery.widen(traced, 2.0)
    assert (wide.a.out_channels, wide.b.out_channels) == (16, 8)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 4, 4, dtype=D)
        expected = model(x)
        for module in (traced, wide, copy.deepcopy(traced)):
            found = module(x)
            assert shape(found) == shape(expected)
            names, theirs = zip(*tensors_in(expected), strict=True)
            ours_names, ours = zip(*tensors_in(found), strict=True)
            assert ours_names == names
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert any("network output" in g.reason for g in surgery.dimension_groups(traced))


def test_an_object_that_a_part_returns_keeps_its_class_and_couples_channels():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.a(x).relu()
            return Outputs(features=self.b(x), hidden=x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.c = Head(), nn.Linear(8, 3)

        def forward(self, x):
            found = self.head(x)
            assert type(found) is Outputs
            assert found.name == "outputs"
            y = found.features + found["hidden"]
            if float(y.detach().sum()) > 1e9:
                y = y * 2
            return self.c(y)

    torch.manual_seed(0)
    model, x = Outer().double(), torch.randn(3, 4, dtype=D)
    traced = surgery.trace(model, x)
    torch.testing.assert_close(traced(x), model(x), atol=1e-12, rtol=0)
    wide = surgery.widen(traced, 2.0)
    torch.testing.assert_close(wide(x), model(x), atol=1e-12, rtol=0)
    for group in (g for g in surgery.dimension_groups(traced) if g.editable):
        permuted = surgery.reindex(traced, {group.name: group.permutation(1)})
        torch.testing.assert_close(permuted(x), model(x), atol=1e-12, rtol=0)


def test_rebuilt_outputs_are_pickled():
    model = Net("model output").double()
    traced = surgery.trace(model, torch.rand(2, 3, 4, 4, dtype=D))
    assert type(pickle.loads(pickle.dumps(traced))(torch.rand(2, 3, 4, 4, dtype=D))) is Outputs
