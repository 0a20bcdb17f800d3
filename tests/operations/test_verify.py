"""`verify` finds differences wherever they are, and fails where it could not find one."""

import dataclasses
import json
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import surgery
from tests.random_graphs.python import Reversal

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EXACT = 1e-10


class Net(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.wrap = wrap
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(self.norm(self.conv(x)).relu().mean((2, 3))))


def test_equal_modules_agree_at_two_batch_sizes_and_in_gradients() -> None:
    check = surgery.verify(Net(), Net(), X, train=True)
    assert check.ok
    assert check.problem == ""
    assert (check.max_abs, check.max_grad, check.batches, check.gradients, check.outputs) == (0, 0, 2, 7, 1)
    assert surgery.Verification(**{k: v for k, v in check.to_dict().items() if k != "ok"}) == check


def test_a_difference_at_another_batch_size_is_found() -> None:
    def only_at_two(y: Tensor) -> Tensor:
        return y if y.shape[0] == 2 else y + 1

    check = surgery.verify(Net(only_at_two), Net(), X)
    assert not check.ok
    assert check.max_abs == 1


def test_a_module_that_takes_one_batch_size_alone_does_not_agree() -> None:
    check = surgery.verify(Net(lambda y: y.view(2, 4)), Net(), X)
    assert not check.ok
    with pytest.raises(surgery.VerificationError, match="it cannot be called with a batch of 3: shape"):
        check.raise_if_different()


def test_a_reference_that_takes_one_batch_size_alone_is_compared_at_it() -> None:
    check = surgery.verify(Net(), Net(lambda y: y.view(2, 4)), X)
    assert check.ok
    assert check.batches == 1


@pytest.mark.parametrize("change", [Reversal.apply, Tensor.detach, lambda y: y + (y - y.detach())])
def test_a_difference_of_gradients_alone_is_found(change: Callable[[Tensor], Tensor]) -> None:
    assert surgery.verify(Net(change), Net(), X).ok
    check = surgery.verify(Net(change), Net(), X, train=True)
    assert check.max_abs == 0
    assert check.max_grad > 0.1
    assert not check.ok
    with pytest.raises(surgery.VerificationError, match="gradients differ by"):
        check.raise_if_different()


def test_a_difference_in_the_gradients_of_inputs_alone_is_found() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.detach())

    check = surgery.verify(Cut(), Net(), X, train=True)
    assert check.max_abs == 0
    assert check.max_grad == 1


@pytest.mark.parametrize(
    ("wrap", "problem"),
    [
        (lambda y: y * 0, "all zero"),
        (lambda y: y * 0 + 2, "all 2 on"),
        (lambda y: y / 0, "not finite"),
        (lambda y: y[:0], "empty"),
        (lambda y: None, "empty"),
        (lambda y: "text", "empty"),
    ],
)
def test_a_comparison_that_could_not_fail_is_a_failure(wrap: Callable[[Tensor], Any], problem: str) -> None:
    check = surgery.verify(Net(wrap), Net(wrap), X)
    assert not check.ok
    assert problem in check.problem
    with pytest.raises(surgery.VerificationError, match="there is nothing to compare"):
        check.raise_if_different()


@dataclasses.dataclass
class Output:
    logits: Tensor


class Plain:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Mapped(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    "wrap", [Output, Plain, lambda y: types.SimpleNamespace(a=[y]), lambda y: Mapped(y=y), lambda y: {"a": (y, None)}]
)
def test_tensors_are_found_in_outputs_of_any_kind(wrap: Callable[[Tensor], Any]) -> None:
    check = surgery.verify(Net(wrap), Net(wrap), X, train=True)
    assert check.ok
    assert check.outputs == 1
    assert check.gradients == 7
    assert surgery.verify(Net(lambda y: wrap(y + 1)), Net(wrap), X).max_abs == pytest.approx(1)
    with pytest.raises(surgery.UsageError, match="different shapes"):
        surgery.verify(Net(lambda y: wrap(y[:, 1:])), Net(wrap), X)


def test_inputs_are_those_that_were_traced() -> None:
    traced = surgery.trace(Net(), X)
    wide = surgery.widen(traced, 2.0)
    assert surgery.verify(wide, traced).max_rel <= EXACT
    assert surgery.verify(Net(), traced).max_rel == 0
    with pytest.raises(surgery.UsageError, match="not a traced module"):
        surgery.verify(Net(), Net())


@pytest.mark.parametrize("edit", ["widen", "deepen", "permute", "slim"])
def test_gradients_agree_after_every_exact_operation(edit: str) -> None:
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=10).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim < 2 else None
    traced = surgery.trace(model, torch.randn(2, 3, 33, 33, dtype=torch.float64))
    reference = traced
    if edit == "widen":
        edited = surgery.widen(traced, 1.5)
    elif edit == "deepen":
        edited = surgery.deepen(traced, {"layer[23]": 1})
    elif edit == "slim":
        edited, reference = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    else:
        group = next(g for g in surgery.dimension_groups(traced) if g.name == "conv1")
        edited = surgery.reindex(traced, {group.name: group.permutation(1)})
    check = surgery.verify(edited, reference, dtype=torch.float64, train=True)
    assert check.max_rel <= EXACT
    assert check.max_grad <= EXACT
    assert check.ok
    assert check.gradients >= 2
    assert check.batches == 2


def test_nothing_that_is_given_changes() -> None:
    a, b = Net().train(), Net()
    x = X.clone()
    before = {k: v.clone() for k, v in a.state_dict().items()}
    state = torch.random.get_rng_state()
    surgery.verify(a, b, x, train=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())
    assert all(p.grad is None for p in a.parameters())
    assert a.training
    assert not x.requires_grad


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_no_bound_holds_for_a_difference_that_outputs_could_not_show(value: float) -> None:
    class Constant(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), value)

    check = surgery.verify(Constant(), Constant(), torch.rand(2, 4))
    assert check.problem
    assert not check.max_rel <= math.inf
    assert json.loads(json.dumps(check.to_dict()))["max_rel"] is None
    with pytest.raises(surgery.VerificationError, match="there is nothing to compare"):
        check.raise_if_different()
