"""Networks run side by side: each of their layers once for each input, whatever waits meanwhile, and where."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import surgery
from surgery.edit import shelf
from surgery.edit.calibration import Calibration
from surgery.edit.ridge import Problems, Sums
from surgery.edit.shelf import Shelf
from tests.edit.test_compensate import EXACT, NETS, error, firsts, images, widened


class Counting(TorchFunctionMode):
    """How many inputs went through convolutions and linear layers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.inputs = size, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, F.conv_transpose2d):
            self.inputs += args[0].numel() / self.size(args[0])
        return func(*args, **(kwargs or {}))


def layers_run(work):
    """In inputs times layers; every input of the nets here is a batch of its first axis."""
    with Counting(lambda x: x[0].numel()) as counting:
        result = work()
    return counting.inputs, result


@pytest.mark.parametrize("name", [name for name in NETS if name != "attention"])
def test_each_layer_of_both_networks_runs_once_for_each_input(name):
    net = surgery.trace(NETS[name]().double().eval(), images(2))
    once, _ = layers_run(lambda: net(images(1)))
    fitted, _ = layers_run(lambda: surgery.slim(net, 0.5, calibration=images(128)))
    further = 2 + 1 + 1 + 2 + 2  # whether inputs can be split, and what is read by what, on a few
    assert fitted <= (2 * 128 + further) * once


def test_a_layer_that_runs_several_times_costs_its_own_part_once_more():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            for _ in range(3):
                x = self.b(x).relu()
            return self.head(x)

    x = torch.randn(128, 4, dtype=torch.float64)
    net = surgery.trace(Net().double().eval(), x[:2])
    once, _ = layers_run(lambda: net(x[:1]))
    fitted, _ = layers_run(lambda: surgery.slim(net, 0.5, calibration=x))
    assert once == 5
    assert fitted <= (2 * 128 + 8) * 5 + 2 * 3 * 128


@pytest.mark.parametrize("name", NETS)
def test_values_that_wait_in_files_are_the_same(name, monkeypatch, tmp_path):
    net = surgery.trace(NETS[name]().double().eval(), images(2))
    expected = surgery.slim(net, 0.5, calibration=images(60))
    monkeypatch.setattr(shelf, "_ROOM", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written = []
    write = Shelf._write
    monkeypatch.setattr(Shelf, "_write", lambda self, *given: written.append(1) or write(self, *given))
    found = surgery.slim(net, 0.5, calibration=images(60))
    assert written
    assert not [*tmp_path.iterdir()]
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in expected.state_dict().items())


class Sharing(nn.Module):
    """Values that share memory, and are written to while others wait."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x).relu()
        flat = x.view(-1)
        y = self.b(x).tanh()
        flat.mul_(0.5)
        y = self.c(y + x)
        x += 1
        return self.head(y.relu() + flat.view(x.shape))


class Writing(nn.Module):
    """Python that decides by values, writes to what it is given, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.part, self.head = nn.Linear(4, 8), self.Part(), nn.Linear(8, 3)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.c(self.b(x).relu()).relu()

    def forward(self, x):
        x = x.mul_(1.5)
        x = self.a(x).relu_()
        if float(x.detach().sum()) > 1e9:
            x = x * 2
        noise = torch.rand((), dtype=x.dtype)
        return self.head(self.part(x).add_(noise))


@pytest.mark.parametrize("room", [0, 2**25])
@pytest.mark.parametrize("make", [Sharing, Writing])
def test_what_is_written_to_while_a_run_waits_is_followed(make, room, monkeypatch):
    monkeypatch.setattr(shelf, "_ROOM", room)
    torch.manual_seed(0)
    x = torch.randn(200, 4, dtype=torch.float64)
    given = x.clone()
    net = surgery.trace(make().double().eval(), x[:2].clone())
    wide, indices = widened(net)
    back = surgery.reindex(wide, {where: firsts(index) for where, index in indices.items()}, calibration=x)
    assert torch.equal(x, given)
    test, outputs = torch.randn(9, 4, dtype=torch.float64), []
    for one in (back, net):
        torch.manual_seed(0)  # as for calibration: a channel that is always 0 there says nothing about other noise
        outputs.append(one(test.clone()))
    assert error(lambda _: outputs[0], lambda _: outputs[1], test) < EXACT


def test_a_layer_that_not_every_batch_reaches_is_fitted_to_those_that_do():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            positive = float(x.detach()[0, 0]) > 0
            x = self.a(x).relu()
            y = self.b(x)
            if positive:
                y = y + self.d(self.c(x).relu())
            return self.head(y.relu())

    torch.manual_seed(0)
    batches = [torch.randn(8, 4, dtype=torch.float64) for _ in range(40)]
    batches[0][0, 0] = 1
    net = surgery.trace(Net().double().eval(), batches[0])
    wide, indices = widened(net)
    back = surgery.reindex(wide, {where: firsts(index) for where, index in indices.items()}, calibration=batches)
    for batch in batches[:6]:
        assert error(back, net, batch) < EXACT


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 8)

    def forward(self, x):
        return self.a(x - x.mean(0))


def test_inputs_are_split_where_each_is_computed_on_its_own():
    x = torch.randn(40, 4)
    counts = []
    for make in (lambda: nn.Linear(4, 8), Mixing):
        net = surgery.trace(make().eval(), x[:2])
        inputs = Calibration(net, x)
        inputs.split_if_alike(net)
        counts.append((inputs.count, [len(args[0]) for _, (args, _) in inputs.batches()]))
    assert counts == [(4, [10, 10, 10, 10]), (1, [40])]


@pytest.mark.parametrize("room", [0, 2**25])
@pytest.mark.parametrize("constant", [True, False])
def test_least_squares_in_blocks_are_those_of_the_normal_equations(constant, room, monkeypatch):
    monkeypatch.setattr("surgery.edit.ridge._BLOCK", 5)
    monkeypatch.setattr(shelf, "_ROOM", room)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    g, n, p, o = 2, 60, 13, 3
    x, y, carved = draw(g, n, p) + 1, draw(g, n, o) + 2, draw(g, p, o)
    if constant:
        x[:, :, 7] = 3  # says what the constant says
    sums = Sums.zeros(g, p, o, x.device)
    for part in (slice(0, 10), slice(10, n)):
        sums.add(x[:, part], y[:, part])
    damping = torch.tensor([1e-2, float("inf")], dtype=torch.float64)
    with Shelf() as where:
        problems = Problems(sums, carved, constant=constant, shelf=where)
        first = problems.solve(damping)
        problems.put_back()
        sums.add(x[:, :0], y[:, :0])
        again = Problems(sums, carved, constant=constant, shelf=where).solve(damping, last=True)
    shift_x, shift_y = (x.mean(1, keepdim=True), y.mean(1, keepdim=True)) if constant else (0, 0)
    u, v = (x - shift_x)[0], (y - shift_y)[0]
    vary = u.square().sum(0) > 1e-9
    gram = u.T @ u
    ridge = 1e-2 * gram.diagonal()[vary].mean() * torch.eye(p, dtype=torch.float64)
    expected = carved[0] + torch.linalg.solve(gram + ridge, u.T @ (v - u @ carved[0]))
    for fit in (first, again):
        assert torch.allclose(fit.weight[0], expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(fit.weight[1], carved[1])
        offset = (y - x @ fit.weight).mean(1) if constant else torch.zeros(g, o, dtype=torch.float64)
        assert torch.allclose(fit.constant, offset, atol=1e-10)


def test_a_module_with_a_hook_is_fitted_to_what_the_hook_makes_of_it():
    torch.manual_seed(0)
    x = torch.randn(200, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    net = surgery.trace(model, x[:2])
    net.get_submodule("2").register_forward_hook(lambda module, given, result: result * 2 - 0.3)
    net.register_forward_hook(lambda module, given, result: result + 1)
    wide, indices = widened(net)
    back = surgery.reindex(wide, {where: firsts(index) for where, index in indices.items()}, calibration=x)
    assert error(back, copy.deepcopy(net), x[:9]) < EXACT
