"""Recurrent layers: hidden units, inputs and projections are edited exactly, in every form of the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import EditError, NothingChangedWarning


class Reader(nn.Module):
    """A recurrent layer between linear ones; what is read of it varies."""

    def __init__(self, cls: type[nn.Module], reads: str, width: int, **options: object) -> None:
        super().__init__()
        self.reads = reads
        self.a, self.layer = nn.Linear(4, 6), cls(6, 8, **options)
        self.b, self.c = nn.Linear(width, 10), nn.Linear(10, 3)

    def forward(self, x):
        out, last = self.layer(self.a(x).tanh())
        hidden = last[0] if isinstance(self.layer, nn.LSTM) else last
        value = out if self.reads == "outputs" else hidden[-1]
        return self.c(self.b(value).relu())


FORMS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "no bias": {"bias": False},
}


def check(model: nn.Module, shape: tuple[int, ...], frozen: frozenset[str] = frozenset()) -> nn.Module:
    """Permuted, widened and slimmed, at another length and batch size too; returns the slim module."""
    model = model.double().eval()
    traced = surgery.trace(model, torch.rand(shape, dtype=torch.float64))
    groups = surgery.dimension_groups(traced)
    ends = {g.name for g in groups if "network" in g.reason}
    assert {g.name for g in groups if not g.editable} - ends == frozen
    permuted = surgery.reindex(traced, {g.name: g.permutation(0) for g in groups if g.editable})
    slim, wide = surgery.slim(traced, 0.5), surgery.widen(traced, 1.5, seed=1)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    for first in (shape[0], shape[0] + 1):
        x = torch.rand(first, *shape[1:], dtype=torch.float64)
        for got, want in ((permuted(x), model(x)), (wide(x), model(x)), (slim(x), masked(x))):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    slim.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slim.parameters())
    return slim


@pytest.mark.parametrize("reads", ["outputs", "last state"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_hidden_units_are_cut_and_copied_exactly(cls, form, reads):
    options = FORMS[form]
    width = 8 * (2 if options.get("bidirectional") and reads == "outputs" else 1)
    slim = check(Reader(cls, reads, width, **options), (3, 2, 4))
    assert (slim.layer.hidden_size, slim.layer.input_size) == (4, 3)


def test_projected_units_and_cells_are_groups_of_their_own():
    slim = check(Reader(nn.LSTM, "outputs", 12, proj_size=6, bidirectional=True, num_layers=2), (3, 2, 4))
    assert (slim.layer.hidden_size, slim.layer.proj_size) == (4, 3)


def test_a_slim_recurrent_layer_is_saved_and_loaded(tmp_path):
    model = Reader(nn.LSTM, "outputs", 8).double().eval()
    x = torch.rand(3, 2, 4, dtype=torch.float64)
    slim = surgery.slim(surgery.trace(model, x), 0.5)
    surgery.save(slim, tmp_path / "slim")
    loaded = surgery.load(tmp_path / "slim", model=Reader(nn.LSTM, "outputs", 8).double().eval())
    assert torch.equal(loaded(x), slim(x))


class Stepped(nn.Module):
    """A cell that is called for each of three steps."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(4, 6), cls(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for step in range(3):
            state = self.cell(self.a(x[:, step]).tanh(), state)
        return self.b(state[0] if isinstance(self.cell, nn.LSTMCell) else state)


@pytest.mark.parametrize("cls", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_that_are_called_step_by_step_are_edited(cls):
    slim = check(Stepped(cls), (2, 3, 4))
    assert slim.cell.hidden_size == 4


def test_a_state_that_comes_from_outside_keeps_the_hidden_units():
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.b = nn.GRU(4, 8), nn.Linear(8, 3)

        def forward(self, x, state):
            return self.b(self.layer(x, state)[0])

    traced = surgery.trace(Stateful(), (torch.rand(3, 2, 4), torch.rand(1, 2, 8)))
    with pytest.raises(EditError, match="network input"):
        surgery.reindex(traced, {"layer.weight_ih_l0": [0, 1]})


def test_a_state_made_of_constants_follows_the_hidden_units():
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.b = nn.GRU(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.layer(x, torch.ones(1, x.shape[1], 8, dtype=x.dtype))[0])

    x = torch.rand(3, 2, 4, dtype=torch.float64)
    traced = surgery.trace(Started().double(), x)
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert slim.get_parameter("layer.weight_hh_l0").shape == (12, 4)
    for edited, reference in ((slim, masked), (surgery.widen(traced, 2.0), traced)):
        surgery.verify(edited, reference, x, train=True).raise_if_different()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bias": False}], ids=["plain", "two layers", "no bias"])
@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_one_unit_in_each_direction_is_left_alone(cls, options):
    """Copies of the two would not be told apart where their outputs lie side by side."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.read = cls(3, 1, bidirectional=True, **options), nn.Linear(2, 2)

        def forward(self, x):
            return self.read(self.layer(x)[0])

    net, x = Net().double(), torch.rand(4, 2, 3, dtype=torch.float64)
    with pytest.warns(NothingChangedWarning, match="cannot be told apart"):
        wide = surgery.widen(surgery.trace(net, x), 3.0, seed=1)
    assert (wide.layer.hidden_size, wide.read.in_features) == (1, 2)
    assert surgery.verify(wide, net, x, train=True).max_rel <= 1e-12
