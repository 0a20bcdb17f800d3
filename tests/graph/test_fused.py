"""Transformer encoders of torch, whose fused inference paths do not call their parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from tests.zoo import randomised

D = torch.float64
X = torch.randn(2, 6, 12, dtype=D, generator=torch.Generator().manual_seed(0))
CAUSAL = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
PADDED = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)


def layer(heads: int, **settings: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(12, heads, 20, dropout=0.0, batch_first=True, **settings)


def encoder(heads: int, nested: bool = False, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(layer(heads, **settings), 2, enable_nested_tensor=nested)
    return randomised(net).double().eval()


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize(
    "masks",
    [{"mask": CAUSAL}, {"src_key_padding_mask": PADDED}, {"mask": CAUSAL, "src_key_padding_mask": PADDED}],
    ids=lambda masks: " and ".join(masks),
)
def test_encoders_with_masks_are_edited_exactly_with_and_without_gradients(heads, masks):
    net = encoder(heads)
    traced = surgery.trace(net, X, kwargs=masks)
    wide, slim = surgery.widen(traced, 2.0), surgery.slim(traced, 0.5)
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert wide.layers[0].self_attn.num_heads == 2 * heads
    assert slim.layers[1].linear1.out_features == 10
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for one, other in ((traced, net), (wide, net), (slim, masked)):
                assert torch.allclose(one(X, **masks), other(X, **masks), atol=1e-12)
    for one, other in ((wide, net), (slim, masked)):
        check = surgery.verify(one, other, X, kwargs=masks)
        assert check.ok
        assert check.batches == 2
        assert surgery.verify(one, other, X, kwargs=masks, train=True).ok


def test_layers_between_branches_of_python_call_their_edited_parts_without_gradients():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.layer, self.b = nn.Linear(12, 12), layer(4, activation="gelu"), nn.Linear(12, 3)

        def forward(self, x, mask):
            x = self.a(x)
            if float(x.sum()) > 1e9:
                x = x * 2
            return self.b(self.layer(x, src_mask=mask))

    net = randomised(Branching()).double().eval()
    traced = surgery.trace(net, (X, CAUSAL))
    masked = surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.verify(surgery.widen(traced, {"layer.self_attn": 2.0}), net, (X, CAUSAL)).ok
    assert surgery.verify(surgery.slim(traced, 0.5), masked, (X, CAUSAL)).ok


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_positions_that_torch_zeroes_without_gradients_are_told():
    net = encoder(2, nested=True)
    masks = {"src_key_padding_mask": PADDED}
    with pytest.warns(UserWarning, match="TransformerEncoder returns zeros at padded positions in evaluation without"):
        traced = surgery.trace(net, X, kwargs=masks)
    assert net.use_nested_tensor
    wide = surgery.widen(traced, 2.0)
    assert surgery.verify(wide, net, X, kwargs=masks).ok
    with torch.no_grad():
        mine, theirs = wide(X, **masks), net(X, **masks)
    assert torch.allclose(mine[~PADDED], theirs[~PADDED], atol=1e-12)
    assert theirs[PADDED].abs().max() == 0
    surgery.trace(net, X)  # nothing is padded


def test_a_model_is_left_with_its_fused_paths():
    net = encoder(2, nested=True)
    surgery.verify(net, surgery.trace(net, X), X)
    assert net.use_nested_tensor
    assert net.layers[0].activation_relu_or_gelu == 1
