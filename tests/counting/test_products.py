"""Products are counted by formulas of our own, whatever kernel torch picks; one without a formula is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from surgery.counting.cost import cost, weight_macs
from surgery.errors import UsageError

BACKENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]  # those that torch has for CPUs


class Attends(nn.Module):
    def __init__(self, attend, pinned=None) -> None:
        super().__init__()
        self.attend = attend
        self.pinned = pinned

    def forward(self, q, k, v):
        if self.pinned is None:
            return self.attend(q, k, v)
        with sdpa_kernel(self.pinned):
            return self.attend(q, k, v)


class Calls(nn.Module):
    """A weight, and a function of the input and of it."""

    def __init__(self, call, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.call = call

    def forward(self, *inputs):
        return self.call(*inputs, self.weight)


def heads(count: int, length: int, dim: int) -> torch.Tensor:
    return torch.randn(2, count, length, dim)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("pinned", [False, True], ids=["asked for outside", "pinned by the model"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_costs_query_by_key_and_weights_by_value_with_every_kernel(backend, pinned, causal):
    model = Attends(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), backend if pinned else None
    )
    inputs = heads(3, 7, 5), heads(3, 11, 5), heads(3, 11, 5)
    with sdpa_kernel(backend):
        assert cost(model, inputs).macs == 3 * 7 * 11 * (5 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_query_heads_and_wider_values_count_with_their_own_sizes(dtype):
    model = Attends(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    inputs = [x.to(dtype) for x in (heads(6, 7, 5), heads(2, 11, 5), heads(2, 11, 9))]
    assert cost(model, tuple(inputs)).macs == 6 * 7 * 11 * (5 + 9)


def test_a_fused_attention_that_torch_may_bring_later_is_counted_by_its_name():
    name = "_scaled_dot_product_coming_attention"
    with torch.library._scoped_library("aten", "FRAGMENT") as library:
        library.define(f"{name}(Tensor query, Tensor key, Tensor value, Tensor? bias=None) -> (Tensor, Tensor)")
        library.impl(name, lambda q, k, v, bias=None: (q.new_empty(*q.shape[:-1], v.shape[-1]), q.sum(-1)), "Meta")
        model = Attends(lambda q, k, v: torch.ops.aten._scaled_dot_product_coming_attention(q, k, v)[0])
        assert cost(model, (heads(6, 7, 5), heads(2, 11, 5), heads(2, 11, 9))).macs == 6 * 7 * 11 * (5 + 9)


def test_products_in_inference_mode_count_the_same():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.inference_mode():
                return self.layer(x)

    x = torch.randn(3, 5, 8)
    assert cost(Inference(), x).macs == cost(layer, x).macs == 5 * 8 * 32 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_costs_its_weights_at_each_step(kind):
    layer = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 6, 3)
    matrices = {name: 6 * w.numel() for name, w in layer.named_parameters() if w.ndim == 2}
    assert weight_macs(layer, x) == matrices
    assert cost(layer, x).macs == sum(matrices.values())


PRODUCTS = {
    "matrix by vector": (Calls(torch.matmul, 4), (torch.randn(2, 3, 4),), 12),
    "vector by vector": (Calls(lambda x, w: torch.dot(x[0], w), 4), (torch.randn(2, 4),), 4),
    "added, in place": (Calls(lambda x, w: x.new_zeros(1, 5).addmm_(x, w), 4, 5), (torch.randn(2, 4),), 20),
    "einsum": (Calls(lambda x, w: torch.einsum("nij,jk->nik", x, w), 4, 5), (torch.randn(2, 3, 4),), 60),
    "bilinear": (nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4)), 60),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (torch.randn(2, 4, 5, 5),), 25 * 108),
    "deformable convolution": (
        Calls(lambda x, offset, w: torchvision.ops.deform_conv2d(x, offset, w), 6, 4, 3, 3),
        (torch.randn(2, 4, 5, 5), torch.randn(2, 18, 3, 3)),
        9 * 216,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_kind_of_product_is_counted(name):
    model, inputs, macs = PRODUCTS[name]
    assert cost(model, inputs).macs == macs


def test_a_product_without_a_formula_is_refused_by_name_and_place():
    model = nn.Sequential(nn.Linear(4, 4), Calls(lambda x, w: torch.conv_tbc(x, w, x.new_zeros(5)), 1, 4, 5))
    with pytest.raises(UsageError, match=r"the MACs of aten::conv_tbc in Sequential\.1: there is no formula"):
        cost(model, torch.randn(2, 3, 4))


def test_an_operator_of_the_user_that_takes_a_weight_matrix_needs_a_formula():
    with torch.library._scoped_library("surgery_tests", "FRAGMENT") as library:
        library.define("blend(Tensor x, Tensor w) -> Tensor")
        library.impl("blend", lambda x, w: x @ w, "Meta")
        blend = torch.ops.surgery_tests.blend
        model, x = Calls(lambda x, w: blend(x, w), 4, 5), torch.randn(2, 4)
        with pytest.raises(UsageError, match="cannot count the MACs of surgery_tests::blend in Calls: "):
            cost(model, x)
        register_flop_formula(blend)(lambda x, w, **_: 2 * x[0] * x[1] * w[1])
        try:
            assert weight_macs(model, x) == {"weight": 20}
        finally:
            del flop_registry[blend]
        assert cost(Calls(lambda x, w: blend(x, x.new_ones(4, 5)) * w.sum(), 4, 5), x).macs == 0


def test_operators_without_products_cost_nothing():
    model = Calls(lambda x, w: F.embedding(x.argmax(-1), w).cummax(-1).values.lgamma(), 4, 5)
    assert cost(model, torch.randn(2, 3, 4)).macs == 0
