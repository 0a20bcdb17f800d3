"""Rows of the rule table for recurrent layers: RNN, GRU, LSTM and their cells.

A hidden unit is a row in each gate's block of the weights, an entry of the biases and a column of the recurrent
weights. All layers and directions of a module have one width, so they choose their units alike. With ``proj_size`` the
projected units are those that are read, and the units of the cell are a group of their own. A unit whose rows are 0
stays 0 from a state of 0, so switching it off is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from surgery.axes.labels import Field, Labelled, move_field
from surgery.axes.ops import Op
from surgery.graph.rule_table import NodeEdit, oprule


def _gates(layer: nn.Module) -> int:
    return 4 if isinstance(layer, (nn.LSTM, nn.LSTMCell)) else 3 if isinstance(layer, (nn.GRU, nn.GRUCell)) else 1


def _fit_layer(site: NodeEdit) -> None:
    """The sizes that a layer keeps of its weights."""
    layer = site.module
    layer.hidden_size, layer.input_size = layer.weight_ih_l0.shape[0] // _gates(layer), layer.weight_ih_l0.shape[1]
    layer.proj_size = layer.weight_hr_l0.shape[0] if layer.proj_size else 0
    layer._init_flat_weights()


def _fit_cell(site: NodeEdit) -> None:
    cell = site.module
    cell.hidden_size, cell.input_size = cell.weight_ih.shape[0] // _gates(cell), cell.weight_ih.shape[1]


@oprule(nn.RNN, nn.GRU, nn.LSTM, rewrite=_fit_layer)
def _recurrent_layer(op: Op, input: Any, hx: Any = None) -> Any:
    if not isinstance(input, Labelled):
        return op.unknown(input, hx, why="reads a packed sequence")
    layer = op.module
    states = hx if isinstance(hx, tuple) else (hx,)
    read, _ = op.axis(input, -1)
    units: list[Field] = []  # of the outputs, and of the cells
    for number in range(layer.num_layers):
        written = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            found = _weights(op, read, f"_l{number}{suffix}")
            for known, new in zip(units, found, strict=False):
                op.tie(known, new)
            units = units or found
            written.append(found[0])
        op.together(np.stack([f.ids for f in written]))
        read = Field((0,), np.concatenate([f.ids for f in written]), written[0].key)
    for state, f in zip(states, (units[0], units[-1]), strict=False):
        if state is not None:
            op.tie(op.axis(state, -1)[0], f)
    time = input.ndim - 2 if layer.batch_first or input.ndim == 2 else 0
    others = tuple(f for f in op.keep(input, [time]) if input.ndim - 1 not in f.dims)
    batch = tuple(move_field(f, (1,)) for f in others)  # of the last states: (layers and directions, batch, units)
    assert read is not None
    outputs = (*others, _units(read, op.shape))
    last = [(*batch, _units(f, state.shape)) for f, state in zip((units[0], units[-1]), _states(op), strict=False)]
    return (outputs, tuple(last)) if isinstance(op.out[1], tuple) else (outputs, last[0])


@oprule(nn.RNNCell, nn.GRUCell, nn.LSTMCell, rewrite=_fit_cell)
def _recurrent_cell(op: Op, input: Labelled, hx: Any = None) -> Any:
    states = hx if isinstance(hx, tuple) else (hx,)
    hidden = _weights(op, op.axis(input, -1)[0], "")[0]
    for state in states:
        if state is not None:
            op.tie(op.axis(state, -1)[0], hidden)
    others = tuple(f for f in input.fields if input.ndim - 1 not in f.dims)
    return op.alike((*others, _units(hidden, op.shape)))


def _weights(op: Op, read: Field | None, suffix: str) -> list[Field]:
    """Tie one layer's weights in one direction; the units that it gives and, with a projection, those of its cell."""
    weight, recurrent, projection = (op.param(f"weight_{kind}{suffix}") for kind in ("ih", "hh", "hr"))
    assert weight is not None
    assert recurrent is not None
    rows, columns = weight.at(0), recurrent.at(1)
    assert rows is not None
    op.consumes(weight.at(1))
    op.tie(read, weight.at(1))
    for tensor in (weight, recurrent, *(op.param(f"bias_{kind}{suffix}") for kind in ("ih", "hh"))):
        if tensor is not None:
            op.produces(tensor.at(0))
            op.tie(rows, tensor.at(0))
    gates = rows.ids.reshape(_gates(op.module), -1)
    op.together(gates)
    cell = Field((0,), gates[0], rows.key)
    units = [cell]
    if projection is not None:
        op.consumes(projection.at(1))
        op.tie(cell, projection.at(1))
        written = projection.at(0)
        assert written is not None
        op.produces(written)
        units = [written, cell]
    op.consumes(columns)
    op.tie(units[0], columns)
    return units


def _states(op: Op) -> tuple[Labelled, ...]:
    """The last states: hidden, and of an LSTM the cell's."""
    state = op.out[1]
    return state if isinstance(state, tuple) else (state,)


def _units(f: Field, shape: tuple[int, ...]) -> Field:
    return Field((len(shape) - 1,), f.ids, f.key)
