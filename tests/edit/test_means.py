"""Average expansion: LayerNorm streams at widths that are no multiples."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from tests.zoo import traced_of

EXACT = 1e-10


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=0.1), nn.LayerNorm(width, eps=0.1)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.drop(self.attention(y, y, y, need_weights=False)[0])
        return self.down(F.gelu(self.up(self.norm2(x)))) * 0.5 + x


class Transformer(nn.Module):
    """Tokens from a convolution, a class token, a position table, a functional norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 5, 12))
        self.blocks = nn.Sequential(Block(12, 3), Block(12, 2))
        self.weight, self.bias = nn.Parameter(torch.rand(12) + 0.5), nn.Parameter(torch.randn(12))
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = self.blocks(x)
        return self.head(F.layer_norm(x, (12,), self.weight, self.bias, 0.2)[:, 0])


@pytest.fixture
def traced():
    torch.manual_seed(0)
    net = Transformer().double().eval()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    for parameter in net.blocks.parameters():
        if parameter.ndim == 1 and not parameter.any():
            parameter.data.uniform_(-0.5, 0.5)  # attention starts without biases
    return surgery.trace(net, torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.fixture
def x():
    return torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("width", [13, 17, 23, 24, 29, 40])
def test_a_normalised_stream_widens_exactly_to_any_width(traced, x, width):
    wide = surgery.widen(traced, {"patches": width})
    assert wide.get_parameter("positions").shape == (1, 5, width)
    assert surgery.verify(wide, traced, x).max_rel <= EXACT


def test_everything_widens_by_a_factor_that_is_no_integer(traced, x):
    wide = surgery.widen(traced, 1.5)
    assert wide.get_parameter("patches.weight").shape[0] == 18
    assert wide.get_submodule("blocks.1.attention").num_heads == 3
    assert surgery.verify(wide, traced, x).max_rel <= EXACT


def test_a_widened_stream_can_be_widened_and_slimmed_again(traced, x):
    wide = surgery.widen(traced, {"patches": 17})
    assert surgery.verify(surgery.widen(wide, {"patches": 27}), traced, x).max_rel <= EXACT
    masks = surgery.split_masks(wide, 0.5)
    assert surgery.verify(surgery.slim(wide, 0.5), surgery.masked(wide, masks), x).max_rel <= EXACT


def test_means_are_part_of_the_recipe(traced, x):
    wide = surgery.widen(traced, {"patches": 14})
    recipe = surgery.Recipe.from_json(surgery.recipe(wide).to_json())
    assert recipe.steps[0].indices["patches"][-2:] == (-1, -1)
    again = surgery.apply(traced, recipe)
    assert surgery.verify(again, wide, x).max_abs == 0


def test_the_original_norms_keep_their_eps(traced):
    surgery.widen(traced, {"patches": 17})
    assert traced.get_submodule("blocks.0.norm1").eps == 0.1


def test_a_mean_trains(traced, x):
    wide = surgery.widen(traced, {"patches": 15}).train()
    wide(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wide.parameters())


class Scaled(nn.Module):
    """Something between the writers and the norm that treats channels differently."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.bare = nn.LayerNorm(6, elementwise_affine=False)

    def forward(self, x):
        y = self.a(x)
        if self.kind == "gain":
            y = y * self.gain
        elif self.kind == "relu":
            y = torch.relu(y)
        elif self.kind == "norm":
            y = y + self.norm(y)
        elif self.kind == "square":
            y = y * y
        elif self.kind == "reciprocal":
            y = 1.0 / (y + 20.0)
        elif self.kind == "rounding":
            y = torch.div(y, 0.1, rounding_mode="floor")
        elif self.kind == "rounding in place":
            y = (y * 10).divide_(1.5, rounding_mode="trunc")
        elif self.kind == "cast":
            y = (y * 10).to(torch.int64).double()
        return self.b(self.bare(y) if self.kind == "bare" else self.norm(y))


@pytest.mark.parametrize(
    "kind", ["gain", "relu", "norm", "square", "reciprocal", "bare", "rounding", "rounding in place", "cast"]
)
def test_a_stream_that_is_not_linear_is_refused_or_left_alone(kind):
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    traced = surgery.trace(Scaled(kind).double(), x)
    with pytest.raises(surgery.EditError, match="only whole factors are exact, not 6 to 9 units"):
        surgery.widen(traced, {"a": 1.5})
    assert surgery.verify(surgery.widen(traced, 1.5), traced, x).max_rel <= EXACT
    assert list(surgery.unwidened(traced, 1.5)) == ["a"]
    assert surgery.unwidened(traced, 2.0) == {}
    assert surgery.verify(surgery.widen(traced, {"a": 12}), traced, x).max_rel <= EXACT


def test_a_norm_over_positions_too_is_left_alone_at_other_widths():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm((5, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    traced = surgery.trace(Both().double(), x)
    with pytest.raises(surgery.EditError, match="only whole factors are exact, not 6 to 9 units"):
        surgery.widen(traced, {"a": 1.5})
    assert surgery.verify(surgery.widen(traced, {"a": 12}), traced, x).max_rel <= EXACT


@pytest.mark.parametrize(
    ("count", "named"),
    [(3, r"norms\.0, norms\.1, norms\.2: only"), (4, r"norms\.0, norms\.1 and 2 more: only")],
)
def test_of_many_norms_the_refusal_names_the_first(count, named):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.norms = nn.ModuleList(nn.LayerNorm(6, elementwise_affine=False) for _ in range(count))

        def forward(self, x):
            x = self.a(x)
            return self.b(sum(norm(x * k) for k, norm in enumerate(self.norms, 1)))

    traced = surgery.trace(Many().double(), torch.randn(5, 4, dtype=torch.float64))
    with pytest.raises(surgery.EditError, match=f"is normalised over by {named} whole"):
        surgery.widen(traced, {"a": 1.5})


def test_a_plain_linear_stream_is_not_refused():
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    traced = surgery.trace(Scaled("").double(), x)
    wide = surgery.widen(traced, {"a": 1.5})
    assert wide.get_parameter("a.weight").shape == (9, 4)
    assert surgery.verify(wide, traced, x).max_rel <= EXACT


def test_an_index_of_means_alone_is_refused(traced):
    with pytest.raises(surgery.UsageError, match="outside"):
        surgery.reindex(copy.deepcopy(traced), {"patches": [-1, -1]})


@pytest.mark.parametrize("kind", ["a layer", "layers"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_stream_through_layers_of_torch_widens_to_any_width(kind):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, activation="gelu", batch_first=True, norm_first=True)
    inner = layer if kind == "a layer" else nn.TransformerEncoder(layer, 2)
    net = nn.Sequential(nn.Linear(5, 12), inner, nn.LayerNorm(12), nn.Linear(12, 4)).double().eval()
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    traced = surgery.trace(net, x)
    wide = surgery.widen(traced, 1.5)
    assert wide.get_parameter("0.weight").shape == (18, 5)
    assert surgery.verify(wide, traced, x).max_rel <= EXACT


def test_a_depthwise_convolution_does_not_write_the_mean_of_the_channels():
    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.norm(self.depthwise(self.stem(x)).permute(0, 2, 3, 1)).mean((1, 2)))

    traced, x = traced_of(Spatial, 2, 3, 6, 6)
    assert surgery.verify(surgery.widen(traced, 1.5), traced, x).max_rel <= EXACT
    assert "stem" in surgery.unwidened(traced, 1.5)
    assert surgery.widen(traced, 2.0).stem.out_channels == 16
