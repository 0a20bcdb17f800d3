"""Each layer that contracts is seen as what it is: rows of what it reads, times its weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery.edit.read_rows import gather_rows, split_groups
from surgery.edit.watch import Book, Watch
from surgery.layers.attention import HeadAttention

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (3, 5, 4)),
    "linear on a vector": (lambda: nn.Linear(4, 6), (4,)),
    "1-D": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 11)),
    "2-D": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6)),
    "3-D": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 5)),
    "without a batch": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (2, 4, 7, 9)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 6)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (2, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "transposed, cropped": (lambda: nn.ConvTranspose2d(4, 6, 2, padding=1), (2, 4, 5, 4)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, groups=2, dilation=2), (2, 4, 5)),
}


def reads_of(layer, *inputs):
    found = []
    with torch.no_grad(), Watch(Book(layer), lambda read, _: found.append(read), lambda *_: None):
        layer(*inputs)
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # an even kernel is padded by one more at its end
@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_output(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    (read,) = reads_of(layer, x)
    assert (read.part.name, read.part.first) == ("weight", 0)
    y = read.layer.channels_last(layer(x))
    matrix = read.layer.matrix(layer.weight)
    at = torch.randperm(y[..., 0].numel())
    places = read.layer.places(read.x, tuple(layer.weight.shape[2:]))
    assert read.layer.sizes(places) == y.shape[:-1]
    rows, given = gather_rows(places, y, at)
    product = (split_groups(read.layer, rows) @ matrix).transpose(0, 1).flatten(1) + layer.bias
    torch.testing.assert_close(product, given, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given, y.reshape(-1, y.shape[-1])[at], rtol=0, atol=0)
    assert torch.equal(read.layer.weight(matrix, layer.weight.shape), layer.weight)


def test_functions_and_parts_of_a_packed_weight_are_seen_in_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.packed, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
            self.kernel = nn.Parameter(torch.randn(3, 2, 1))

        def forward(self, x):
            first, second = self.packed.split([2, 4])
            y = F.linear(x, second, self.bias[2:])
            z = F.linear(x, first)
            return torch.conv1d(z.transpose(1, 2), weight=self.kernel), y

    net = Net()
    reads = reads_of(net, torch.randn(2, 5, 4))
    book = Book(net)
    assert [(r.part.name, r.part.first) for r in reads] == [("packed", 2), ("packed", 0), ("kernel", 0)]
    part = book.find(reads[0].bias)
    assert part is not None
    assert (part.name, part.first) == ("bias", 2)
    assert reads[1].bias is None


def test_the_projections_of_an_attention_are_seen():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    attention.__class__ = HeadAttention
    reads = reads_of(attention, *[torch.randn(2, 5, 8)] * 3)
    assert [(r.part.name, r.part.first) for r in reads] == [
        ("in_proj_weight", 0),
        ("in_proj_weight", 8),
        ("in_proj_weight", 16),
        ("out_proj.weight", 0),
    ]


def test_what_is_no_part_of_the_network_is_not_found():
    layer = nn.Linear(4, 3)
    book = Book(layer)
    assert book.find(torch.randn(3, 4)) is None
    assert book.find(layer.weight.t()) is None
    assert book.find(layer.weight[:, 1:]) is None
    assert book.find(torch.zeros(0)) is None
    assert reads_of(layer, torch.randn(2, 4))[0].bias is layer.bias
