"""Tensors are found in whatever a model returns."""

import collections
import dataclasses
import types

import torch
from torch import nn

from surgery.graph.outputs import tensors_in

A, B = torch.zeros(1), torch.ones(2)


def paths(value: object) -> list[str]:
    return [path for path, _ in tensors_in(value)]


def test_containers_are_looked_into_in_order() -> None:
    assert paths(A) == [""]
    assert paths((A, [B, None], {"x": A})) == ["[0]", "[1][0]", "[2]['x']"]
    assert paths(collections.deque([A])) == ["[0]"]
    assert paths(collections.namedtuple("Pair", "left right")(A, B)) == [".left", ".right"]


def test_a_tensor_in_two_places_is_listed_twice() -> None:
    shared = [A]
    assert paths((shared, shared, A)) == ["[0][0]", "[1][0]", "[2]"]


def test_objects_of_any_class_are_looked_into() -> None:
    @dataclasses.dataclass
    class Result:
        logits: torch.Tensor
        name: str = "x"

    class Slotted:
        __slots__ = ("__hidden", "absent", "shown")

        def __init__(self) -> None:
            self.__hidden, self.shown = A, B

    class Child(Slotted):
        pass

    child = Child()
    child.more = A  # type: ignore[attr-defined]
    assert paths(Result(A)) == [".logits"]
    assert paths(types.SimpleNamespace(a=Result(B))) == [".a.logits"]
    assert paths(child) == ["._Slotted__hidden", ".shown", ".more"]
    assert paths(torch.distributions.Normal(A, A + 1)) == [".loc", ".scale"]


def test_a_dict_subclass_is_read_by_items_and_by_its_further_attributes() -> None:
    class Output(dict):  # type: ignore[type-arg]
        pass

    output = Output(logits=A)
    output.logits, output.extra = A, B  # type: ignore[attr-defined]
    assert paths(output) == ["['logits']", ".extra"]


def test_cycles_end_and_modules_are_no_outputs() -> None:
    loop: list[object] = [A]
    loop.append(loop)
    node = types.SimpleNamespace(value=B)
    node.itself, node.model, node.cls = node, nn.Linear(1, 1), nn.Linear
    assert paths(loop) == ["[0]"]
    assert paths(node) == [".value"]
    assert tensors_in("text") == tensors_in(3) == []
