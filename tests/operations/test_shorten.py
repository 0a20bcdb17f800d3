"""Blocks are removed as if their last layers were 0, and those are chosen that change the outputs least."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import nn
from torchvision import models

import surgery
from tests.zoo import randomised


class Residual(nn.Module):
    """A block; its skip connection is a layer where the number of channels changes."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(ins, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, outs, 1)
        self.skip = nn.Conv2d(ins, outs, 1) if ins != outs else nn.Identity()

    def forward(self, x):
        return (self.b(self.norm(self.a(x)).relu()) + self.skip(x)).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.stage = nn.Sequential(*(Residual(5, 5) for _ in range(3)))
        self.wider = Residual(5, 7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x):
        return self.fc(self.wider(self.stage(self.stem(x).relu())).mean((2, 3)))


class Untraced(Net):
    """Its blocks are parts of their own."""

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.stage:
            x = block(x + 1) if x.max() > 1e9 else block(x)
        return self.fc(self.wider(x).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def traced(kind=Net):
    torch.manual_seed(0)
    return surgery.trace(randomised(kind()).double().eval(), X)


def without(module: nn.Module, *layers: str) -> nn.Module:
    """The module with 0 in the layers."""
    module = copy.deepcopy(module)
    for layer in layers:
        for parameter in operator.attrgetter(layer)(module).parameters():
            parameter.data.zero_()
    return module


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", [Net, Untraced])
def test_a_shorter_network_is_that_with_zeros_at_the_end_of_its_blocks(kind, train):
    module = traced(kind)
    short = surgery.shorten(module, ["stage.0", "stage.2", "wider"])
    reference = without(module, "stage.0.b", "stage.2.b", "wider.b")
    assert surgery.verify(short, reference, X, train=train).max_rel <= 1e-12
    names = {name.rpartition(".")[0] for name, _ in short.named_parameters()}
    assert names == {"stem", "stage.1.a", "stage.1.norm", "stage.1.b", "wider.skip", "fc"}
    assert surgery.verify(module, traced(kind), X).max_rel == 0


def test_a_stage_loses_its_last_blocks_or_those_that_matter_least():
    module = without(traced(), "stage.1.b")
    assert surgery.verify(surgery.shorten(module, {"stage": 2}), surgery.shorten(module, ["stage.1", "stage.2"]), X).ok
    chosen = surgery.recipe(surgery.shorten(module, {"stage": 1}, calibration=X)).steps
    assert chosen == (surgery.RemoveBlock("stage.1", ("stage.1.b.bias", "stage.1.b.weight")),)
    twice = surgery.shorten(module, {"stage": 2}, calibration=(X,))
    other = min(("stage.0", "stage.2"), key=lambda name: difference(surgery.shorten(module, ["stage.1", name]), module))
    assert {step.name for step in surgery.recipe(twice).steps} == {"stage.1", other}


def difference(module: nn.Module, reference: nn.Module) -> float:
    return float((module(X) - reference(X)).square().sum())


def test_of_a_resnet_the_skip_connection_that_changes_the_size_stays():
    torch.manual_seed(0)
    model = models.ResNet(models.resnet.BasicBlock, [2, 2, 1, 1], num_classes=5, width_per_group=64)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    module = surgery.trace(randomised(model).double().eval(), x)
    short = surgery.shorten(module, ["layer1.1", "layer2.0"])
    assert surgery.verify(short, without(module, "layer1.1.bn2", "layer2.0.bn2"), x).max_rel <= 1e-12
    assert short.layer2[0].downsample[0].stride == (2, 2)
    assert surgery.cost(short).macs < surgery.cost(module).macs


def test_a_shorter_network_is_saved_loaded_edited_and_trained(tmp_path):
    module = surgery.shorten(traced(), ["stage.1", "wider"])
    surgery.save(module, tmp_path / "short")
    torch.manual_seed(0)
    loaded = surgery.load(tmp_path / "short", model=Net().double())
    assert surgery.verify(loaded, module, X).max_rel == 0
    again = surgery.apply(traced(), surgery.Recipe.from_json(surgery.recipe(module).to_json()))
    assert surgery.verify(again, module, X).max_rel == 0
    masks = surgery.split_masks(module, 0.5)
    assert surgery.verify(surgery.slim(module, 0.5), surgery.masked(module, masks), X, train=True).max_rel <= 1e-12
    assert surgery.verify(surgery.widen(module, 1.5), module, X).max_rel <= 1e-12
    module.train()(X).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    ("places", "error", "message"),
    [
        (["stem"], surgery.EditError, "'stem' is not a block: that takes a skip connection"),
        (["stage.7"], surgery.UsageError, "stage.7"),
        ({"stage": 4}, surgery.EditError, "'stage' has 3 blocks that can be removed, not 4"),
        ({"stage": 0}, surgery.UsageError, "the number of blocks to remove from 'stage'"),
        ({"wider": 1}, surgery.EditError, "'wider' has 0 blocks"),
    ],
)
def test_what_cannot_be_removed_is_refused(places, error, message):
    with pytest.raises(error, match=message):
        surgery.shorten(traced(), places)


class Ends(nn.Module):
    """A branch beside a skip connection with a layer of its own, which end in some way."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b, self.skip = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(3, 5, 1)

    def forward(self, x):
        x = x * 1.5
        return self.how(self, x)


def in_place(net, x):
    branch = net.b(net.a(torch.relu_(x)).relu())
    return branch + net.skip(x)


ENDS = {
    "sum": (lambda n, x: n.b(n.a(x).relu()) + n.skip(x), True),
    "sum, the other way": (lambda n, x: n.skip(x) + n.b(n.a(x).relu()), True),
    "less the branch": (lambda n, x: n.skip(x) - n.b(n.a(x).relu()), True),
    "unused sizes": (lambda n, x: n.skip(x) + n.b(n.a(x).relu() * 1.0).reshape(*x.shape[:1], -1, *x.shape[2:]), True),
    "less the skip": (lambda n, x: n.b(n.a(x).relu()) - n.skip(x), False),
    "a multiple of the skip": (lambda n, x: torch.add(n.b(n.a(x).relu()), n.skip(x), alpha=2), False),
    "a skip that is spread": (lambda n, x: n.b(n.a(x).relu()) + n.skip(x).mean((2, 3), keepdim=True), False),
    "a branch that writes to what the skip reads": (in_place, False),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_branch_goes_where_zeros_leave_the_skip_connection_alone(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.read = Ends(ENDS[name][0]), nn.Conv2d(5, 2, 1)

        def forward(self, x):
            return self.read(self.body(x).tanh())

    torch.manual_seed(0)
    module = surgery.trace(Net().double().eval(), X)
    if not ENDS[name][1]:
        with pytest.raises(surgery.EditError, match="'body' is not a block"):
            surgery.shorten(module, ["body"])
        return
    short = surgery.shorten(module, ["body"])
    assert surgery.verify(short, without(module, "body.b"), X, train=True).max_rel <= 1e-12
    assert {n for n, _ in short.body.named_children()} == {"skip"}


def test_calibration_may_be_what_slim_takes():
    module = without(traced(), "stage.1.b")
    batches = [X, X[:1]]
    data = torch.utils.data.TensorDataset(X, torch.arange(2))
    for calibration in (batches, data, {"x": X}):
        steps = surgery.recipe(surgery.shorten(module, {"stage": 1}, calibration=calibration)).steps
        assert [step.name for step in steps] == ["stage.1"]
    with pytest.raises(surgery.UsageError, match="calibration"):
        surgery.shorten(module, {"stage": 1}, calibration=[])


def test_a_block_that_others_look_into_is_refused():
    class Looks(Net):
        def forward(self, x):
            x = self.stem(x).relu()
            block = self.stage[0]
            inner = block.norm(block.a(x)).relu()
            y = (block.b(inner) + x).relu()
            return self.fc(self.wider(y).mean((2, 3))) + inner.mean((1, 2, 3))[:, None]

    with pytest.raises(surgery.EditError):
        surgery.shorten(traced(Looks), ["stage.0"])
