"""Rows of the rule table for tables of words, and for recurrent layers, which are left alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surgery.graph import rewrites
from surgery.graph.labels import Field, Fields, Labelled
from surgery.graph.ops import Op, oprule, unknown

_RESCALES = "rescales the rows that it reads"


def _looked_up(op: Op, weight: Labelled, *read: Labelled | None) -> Fields:
    """Rows of ``weight``, as ``read`` picks, counts or weighs them."""
    op.freeze(weight.at(0), "vocabulary")
    for x in read:
        if x is not None:
            op.lose(list(x.fields), f"{op.name} reads positions from it")
    written = weight.at(1)
    op.produces(written)
    return () if written is None else (Field((len(op.shape) - 1,), written.ids, written.key),)


@oprule(F.embedding, linear="writes")
def _embedding_function(
    op: Op, input: Labelled, weight: Labelled, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **named: Any
) -> Fields:
    if max_norm is not None:
        return unknown(op, input, weight, why=_RESCALES)  # type: ignore[no-any-return]
    return _looked_up(op, weight, input)


@oprule(torch.embedding, linear="writes")
def _embedding_kernel(op: Op, weight: Labelled, indices: Labelled, *rest: Any, **named: Any) -> Fields:
    return _looked_up(op, weight, indices)


@oprule(nn.EmbeddingBag, rewrite=rewrites.embedding)
def _embedding_bag(
    op: Op, input: Labelled, offsets: Labelled | None = None, per_sample_weights: Labelled | None = None
) -> Fields:
    """Sums, means or maxima of rows, each channel on its own."""
    weight = op.param("weight")
    assert weight is not None
    if op.module.max_norm is not None:
        return unknown(op, input, why=_RESCALES)  # type: ignore[no-any-return]
    return _looked_up(op, weight, input, offsets, per_sample_weights)


@oprule(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def _recurrent(op: Op, *args: Any, **named: Any) -> Any:
    return unknown(op, *args, why="is a recurrent layer, which is left alone", **named)
