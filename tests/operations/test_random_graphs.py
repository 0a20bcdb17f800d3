"""Random networks of convolutions, attention and data movement hold the three oracles: permuted, widened, slim against
masked.

``SURGERY_EXAMPLES=1000 pytest tests/test_random_graphs.py`` tries more of them.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from tests.zoo import randomised

EXACT = 1e-10
EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", "80"))
SIZE = 4
"""Every map of a random network is this high and wide."""


class RandomNet(nn.Module):
    """Two inputs and a list of steps, each of which reads maps made before it and makes new ones.

    A step is a kind and two numbers that choose its operands and sizes: any numbers make a valid network, so that
    hypothesis can shrink them.
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.widths = [3, 2]  # channels of each map
        self.calls: list[tuple[str, list[int], object]] = []
        for at, (kind, a, b) in enumerate(steps):
            first, second = self.pick(a), self.pick(b)
            getattr(self, f"plan_{kind}")(f"step{at}", first, second, a // 7 + 1, b // 7 + 1)
        self.heads = [self.pick(0), self.pick(steps[-1][2])]
        for k, head in enumerate(self.heads):
            self.add_module(f"head{k}", nn.Linear(self.widths[head] * (SIZE * SIZE if k else 1), 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = [x, y]
        for name, operands, extra in self.calls:
            kind, _, _ = name.partition("@")
            made = getattr(self, f"run_{kind}")(name.partition("@")[2], [maps[k] for k in operands], extra)
            maps.extend(made if isinstance(made, (list, tuple)) else [made])
        return self.head0(maps[self.heads[0]].mean((2, 3))), self.head1(maps[self.heads[1]].flatten(1))

    # ---- planning

    def pick(self, number: int) -> int:
        """A map, the latest most likely: 0 is the last one."""
        return max(len(self.widths) - 1 - number % 5, 0)

    def call(self, kind: str, name: str, operands: list[int], widths: list[int], extra: object = None) -> int:
        self.calls.append((f"{kind}@{name}", operands, extra))
        self.widths.extend(widths)
        return len(self.widths) - 1

    def layer(self, name: str, module: nn.Module, operand: int, width: int) -> int:
        self.add_module(name, module)
        return self.call("layer", name, [operand], [width])

    def of_width(self, name: str, operand: int, width: int) -> int:
        """A map of that many channels: the operand, or a pointwise convolution of it."""
        if self.widths[operand] == width:
            return operand
        return self.layer(name, nn.Conv2d(self.widths[operand], width, 1), operand, width)

    def multiple(self, name: str, operand: int, of: int) -> int:
        return self.of_width(f"{name}_to", operand, of * max(self.widths[operand] // of, 1))

    def plan_conv(self, name, a, b, m, n):
        width = 1 + n % 8
        block = nn.Sequential(nn.Conv2d(self.widths[a], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer(name, block, a, width)

    def plan_grouped(self, name, a, b, m, n):
        groups = 2 + m % 2
        a = self.multiple(name, a, groups)
        width = groups * (1 + n % 4)
        self.layer(name, nn.Conv2d(self.widths[a], width, 1, groups=groups), a, width)

    def plan_depthwise(self, name, a, b, m, n):
        width = self.widths[a] * (1 + n % 2)
        self.layer(name, nn.Conv2d(self.widths[a], width, 3, padding=1, groups=self.widths[a]), a, width)

    def plan_transposed(self, name, a, b, m, n):
        groups = 1 + m % 2
        a = self.multiple(name, a, groups)
        width = groups * (1 + n % 4)
        self.layer(name, nn.ConvTranspose2d(self.widths[a], width, 3, padding=1, groups=groups), a, width)

    def plan_norm(self, name, a, b, m, n):
        self.layer(name, nn.BatchNorm2d(self.widths[a]), a, self.widths[a])

    def plan_activation(self, name, a, b, m, n):
        self.layer(name, [nn.SiLU(), nn.Sigmoid(), nn.PReLU(self.widths[a])][m % 3], a, self.widths[a])

    def plan_again(self, name, a, b, m, n):
        """A layer that runs twice."""
        layer = nn.Conv2d(self.widths[a], self.widths[a], 1)
        once = self.layer(name, layer, a, self.widths[a])
        self.call("layer", name, [once], [self.widths[a]])

    def plan_add(self, name, a, b, m, n):
        b = self.of_width(f"{name}_to", b, self.widths[a])
        self.call("add", name, [a, b], [self.widths[a]], m % 2)

    def plan_cat(self, name, a, b, m, n):
        if self.widths[a] + self.widths[b] <= 24:
            self.call("cat", name, [a, b], [self.widths[a] + self.widths[b]])

    def plan_split(self, name, a, b, m, n):
        width = self.widths[a]
        if width > 1:
            cut = 1 + n % (width - 1)
            self.call("split", name, [a], [cut, width - cut], (m % 3, cut))

    def plan_shuffle(self, name, a, b, m, n):
        groups = 2 + n % 2
        a = self.multiple(name, a, groups)
        self.call("shuffle", name, [a], [self.widths[a]], (m % 2, groups))

    def plan_gate(self, name, a, b, m, n):
        width, hidden = self.widths[a], 1 + n % 3
        self.add_module(name, nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)))
        self.call("gate", name, [a], [width], m % 2)

    def plan_scale(self, name, a, b, m, n):
        self.register_parameter(name, nn.Parameter(torch.randn(self.widths[a], 1, 1)))
        self.call("scale", name, [a], [self.widths[a]])

    def plan_glu(self, name, a, b, m, n):
        a = self.multiple(name, a, 2)
        self.call("glu", name, [a], [self.widths[a] // 2], m % 2)

    def plan_pixels(self, name, a, b, m, n):
        a = self.multiple(name, a, 4)
        self.call("pixels", name, [a], [self.widths[a]], m % 2)

    def plan_reverse(self, name, a, b, m, n):
        self.call("reverse", name, [a], [self.widths[a]], m % 3)

    def plan_every_other(self, name, a, b, m, n):
        if self.widths[a] > 1:
            self.call("every_other", name, [a], [-(-self.widths[a] // 2), self.widths[a] // 2])

    def plan_stack(self, name, a, b, m, n):
        b = self.of_width(f"{name}_to", b, self.widths[a])
        self.call("stack", name, [a, b], [self.widths[a] * (1 + m % 2)], m % 2)

    # ---- tokens: a map as (batch, positions, channels)

    def plan_attention(self, name, a, b, m, n):
        """A residual self-attention, its heads spelled in one of six ways."""
        width, heads, size = self.widths[a], 1 + n % 3, 1 + n // 3 % 3
        if m % len(ATTENTIONS) == ATTENTIONS.index("layer"):
            a = self.multiple(name, a, heads)
            self.add_module(f"{name}_layer", nn.MultiheadAttention(self.widths[a], heads, batch_first=True))
        else:
            self.add_module(f"{name}_qkv", nn.Linear(width, 3 * heads * size))
            self.add_module(f"{name}_out", nn.Linear(heads * size, width))
            if n % 2:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(heads, 1, SIZE * SIZE)))
        self.call("attention", name, [a], [self.widths[a]], (ATTENTIONS[m % len(ATTENTIONS)], heads, size))

    def plan_stream(self, name, a, b, m, n):
        """A residual block of a transformer: normalised, two layers, added."""
        width, hidden = self.widths[a], 1 + n % 5
        norm = nn.LayerNorm(width, elementwise_affine=m % 3 != 0)
        for parameter in norm.parameters():
            parameter.data.uniform_(0.5, 1.5)
        block = nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.add_module(name, block)
        self.call("stream", name, [a], [width], m % 2)

    def plan_bare(self, name, a, b, m, n):
        """A weight that is no layer's."""
        width = 1 + n % 6
        shape = (self.widths[a], width) if m % 4 == 0 else (width, self.widths[a])
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.call("bare", name, [a], [width], m % 4)

    def plan_tied(self, name, a, b, m, n):
        """Two layers with one weight, and what reads it the other way round."""
        width = self.widths[a]
        first = nn.Linear(width, width if m % 3 else 1 + n % 6)
        self.add_module(name, first)
        if m % 3:
            second = nn.Linear(width, width)
            second.weight = first.weight
            self.add_module(f"{name}_second", second)
        self.call("tied", name, [a], [width], m % 3 > 0)

    def plan_group_norm(self, name, a, b, m, n):
        a = self.multiple(name, a, 2)
        norm = nn.GroupNorm([1, 2, self.widths[a]][m % 3], self.widths[a])
        for parameter in norm.parameters():
            parameter.data.uniform_(0.5, 1.5)
        self.layer(name, norm, a, self.widths[a])

    # ---- running

    def run_layer(self, name, maps, extra):
        return self.get_submodule(name)(maps[0])

    def run_add(self, name, maps, multiply):
        return maps[0] * maps[1] if multiply else maps[0] + maps[1]

    def run_cat(self, name, maps, extra):
        return torch.cat(maps, 1)

    def run_split(self, name, maps, how):
        (form, cut), x = how, maps[0]
        if form == 0:
            front, back = torch.split(x, [cut, x.shape[1] - cut], 1)
            return [front, back]
        return [x[:, :cut], x[:, cut:]] if form == 1 else [x.narrow(1, 0, cut), x[:, cut - x.shape[1] :]]

    def run_shuffle(self, name, maps, how):
        (form, groups), x = how, maps[0]
        if form:
            return F.channel_shuffle(x, groups)
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, -1, h, w)

    def run_gate(self, name, maps, form):
        x = maps[0]
        gate = torch.sigmoid(self.get_submodule(name)(x.mean((2, 3))))
        return x * (gate[:, :, None, None] if form else gate.view(x.size(0), x.size(1), 1, 1).expand_as(x))

    def run_scale(self, name, maps, extra):
        return maps[0] * getattr(self, name) * maps[0].shape[1] ** -0.5

    def run_glu(self, name, maps, form):
        if form:
            return F.glu(maps[0], 1)
        a, b = maps[0].chunk(2, 1)
        return a * torch.tanh(b)

    def run_pixels(self, name, maps, form):
        if form:
            return F.pixel_unshuffle(F.pixel_shuffle(maps[0], 2), 2)
        return F.max_pool2d(F.interpolate(maps[0], scale_factor=2), 2)

    def run_reverse(self, name, maps, form):
        return maps[0].flip(1) if form == 0 else maps[0].roll(1, 1) if form == 1 else maps[0].flip(-1)

    def run_every_other(self, name, maps, extra):
        return [maps[0][:, ::2], maps[0][:, 1::2]]

    def run_stack(self, name, maps, flat):
        both = torch.stack(maps, 1)
        return both.flatten(1, 2) if flat else both.mean(1)

    def run_attention(self, name, maps, how):
        (form, heads, size), x = how, maps[0].flatten(2).transpose(1, 2)
        if form == "layer":
            y = self.get_submodule(f"{name}_layer")(x, x, x, need_weights=False)[0]
        else:
            bias = getattr(self, f"{name}_bias", None)
            y = attend(form, self.get_submodule(f"{name}_qkv")(x), heads, size, bias)
            y = self.get_submodule(f"{name}_out")(y)
        return (x + y).transpose(1, 2).unflatten(2, (SIZE, SIZE))

    def run_stream(self, name, maps, form):
        block = self.get_submodule(name)
        if form:
            return maps[0] + block(maps[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = maps[0].flatten(2).transpose(1, 2)
        return (x + block(x)).transpose(1, 2).reshape(maps[0].shape)

    def run_bare(self, name, maps, form):
        x, w = maps[0].permute(0, 2, 3, 1), getattr(self, name)
        y = [lambda: x @ w, lambda: F.linear(x, w), lambda: x @ w.t(), lambda: torch.einsum("nhwc,dc->nhwd", x, w)]
        return y[form]().permute(0, 3, 1, 2)

    def run_tied(self, name, maps, twice):
        x = maps[0].permute(0, 2, 3, 1)
        first = self.get_submodule(name)
        if twice:
            return self.get_submodule(f"{name}_second")(first(x).relu()).permute(0, 3, 1, 2)
        return (first(x).tanh() @ first.weight).permute(0, 3, 1, 2)


ATTENTIONS = ["permute", "chunk", "views", "einsum", "fused", "layer"]


def attend(form: str, qkv: torch.Tensor, heads: int, size: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Attention of packed queries, keys and values (batch, tokens, 3 * heads * size), in the words of many models."""
    n, tokens = qkv.shape[:2]
    if form == "permute":
        q, k, v = qkv.reshape(n, tokens, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    elif form == "chunk":
        q, k, v = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in qkv.chunk(3, -1))
    else:
        q, k, v = (t.view(n, tokens, heads, -1).transpose(1, 2) for t in torch.split(qkv, heads * size, dim=-1))
    if form == "fused":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        if form == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * size**-0.5
        else:
            scores = torch.matmul(q / size**0.5, k.transpose(-2, -1))
        weights = (scores if bias is None else scores + bias).softmax(-1)
        if form == "einsum":
            return torch.einsum("bhij,bhjd->bihd", weights, v).reshape(n, tokens, -1)
        y = weights @ v
    return (
        y.transpose(1, 2).contiguous().view(n, tokens, heads * size)
        if form == "views"
        else y.transpose(1, 2).flatten(2)
    )


KINDS = [name.removeprefix("plan_") for name in vars(RandomNet) if name.startswith("plan_")]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 69), st.integers(0, 69)),
    min_size=2,
    max_size=9,
)


def built(steps: list[tuple[str, int, int]]) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = randomised(RandomNet(steps)).double().eval()
    inputs = tuple(torch.randn(2, c, SIZE, SIZE, generator=generator, dtype=torch.float64) for c in (3, 2))
    return net, inputs


@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(STEPS)
def test_a_random_network_can_be_permuted_widened_and_slimmed_exactly(steps):
    net, inputs = built(steps)
    traced = surgery.trace(net, inputs)
    assert surgery.verify(traced, net, inputs).max_rel <= EXACT
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    permuted = surgery.reindex(traced, {g.name: g.permutation(seed=1) for g in groups})
    wide = surgery.widen(traced, [1.6, 2.0][len(steps) % 2], seed=2)
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    for train in (False, True):
        assert surgery.verify(permuted, net, inputs, train=train).max_rel <= EXACT
        assert surgery.verify(wide, net, inputs, train=train).max_rel <= EXACT
        assert surgery.verify(slim, masked, inputs, train=train).max_rel <= EXACT
    again = surgery.slim(wide, 0.4)
    masked = surgery.masked(wide, surgery.split_masks(wide, 0.4))
    assert surgery.verify(again, masked, inputs).max_rel <= EXACT


def test_random_networks_are_mostly_editable():
    """Refusing everything would pass the test above."""
    editable = total = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(0, 70, (6, 3), generator=generator).tolist()
        net, inputs = built([(KINDS[k % len(KINDS)], a, b) for k, a, b in numbers])
        for group in surgery.dimension_groups(surgery.trace(net, inputs)):
            if not any(end in group.reason for end in ("network", "no layer contracts", "holds no channels")):
                total += 1
                editable += group.editable
    assert editable > 0.85 * total > 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_step_alone_can_be_edited(kind):
    net, inputs = built([("conv", 1, 48), (kind, 0, 41), ("conv", 0, 20)])
    traced = surgery.trace(net, inputs)
    assert any(g.editable for g in surgery.dimension_groups(traced))
    wide = surgery.widen(traced, 2.0)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in traced.parameters())
    assert surgery.verify(wide, net, inputs).max_rel <= EXACT


@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_is_edited_by_whole_heads(form):
    """Freezing it would pass the tests above."""
    m, n = ATTENTIONS.index(form), 1 + 3  # two heads of two channels
    net, inputs = built([("conv", 1, 7 * 3), ("attention", 7 * (m + 6 - 1), 7 * (n - 1)), ("conv", 0, 7 * 3)])
    traced = surgery.trace(net, inputs)
    name = "step1_layer.in_proj_weight" if form == "layer" else "step1_qkv"
    groups = surgery.dimension_groups(traced)
    (group,) = (g for g in groups if any(name in (m.layer, m.name) and m.role == "producer" for m in g.members))
    assert group.editable, group.reason
    assert (group.units, group.size) == (2, 12)
    wide, slim = surgery.widen(traced, {group.name: 2.0}), surgery.slim(traced, {group.name: 0.5})
    assert surgery.verify(wide, net, inputs).max_rel <= EXACT
    packed = group.members[0].name
    assert [len(edited.get_parameter(packed)) for edited in (wide, slim)] == [24, 6]
