"""Models as users write them: structured inputs and outputs, shared and tied weights, bare parameters, layers of one's
own. Each is permuted, widened and slimmed, and the results again, or leaves channels alone for a reason that it gives.

Odd uses of single ops are in `test_odd_models.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery.graph.rule_table import NodeEdit, restore_rules
from tests.zoo import randomised

EXACT = 1e-10
ENDS = {"network input", "network output", "vocabulary"}


@dataclass(frozen=True)
class Own:
    """A user's model and what is expected of it."""

    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    editable: tuple[str, ...] = ()
    """Names that address groups of which every unit can be edited."""
    frozen: tuple[str, ...] = ()
    """Reasons for which other channels than those of the network's ends are left alone."""
    own_norm: bool = False
    """Normalises in a layer of its own, of which `surgery.masked` does not know the statistics."""


OWN: dict[str, Own] = {}


def own(
    *args: Any, editable: str = "", frozen: tuple[str, ...] = (), own_norm: bool = False, **kwargs: Any
) -> Callable[[Any], Any]:
    """Register a class, made without arguments, with the inputs that it is called with."""

    def register(cls: Any) -> Any:
        OWN[cls.__name__] = Own(cls, args, kwargs, tuple(editable.split()), frozen, own_norm)
        return cls

    return register


def t(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0))


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and outputs


@own({"image": t(2, 3, 4, 4), "meta": {"age": t(2, 2)}}, editable="image age")
class DictionaryInDictionaryOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.age, self.head = nn.Conv2d(3, 6, 3), nn.Linear(2, 5), nn.Linear(11, 3)

    def forward(self, batch):
        image = self.image(batch["image"]).relu().mean((2, 3))
        age = self.age(batch["meta"]["age"]).relu()
        logits = self.head(torch.cat([image, age], 1))
        return {"logits": logits, "parts": [{"norm": logits.square()}, (-logits,)]}


@own((t(2, 3), [t(2, 4), t(2, 3)]), editable="a b")
class NestedSequencesAsInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, inputs):
        first, (second, third) = inputs
        return self.c(self.a(first) + self.b(second)), self.c(self.a(third))


@own(t(2, 3), editable="a", scale=2.0, mask=None)
class OptionalInputsThatAreNone(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x, mask=None, *, scale=1.0, extra=None):
        y = self.a(x).relu() * scale
        if mask is not None:
            y = y * mask
        if extra is not None:
            y = y + extra
        return self.b(y)


class Result(NamedTuple):
    value: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


@own(t(2, 5, 4), editable="value", context=t(2, 3, 4))
class NamedTupleOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.value, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x, *, context):
        hidden = self.value(torch.cat([x, context], 1)).tanh()
        return Result(value=self.out(hidden.mean(1)), hidden=(self.out(hidden), self.out(hidden[:, 0])))


# ---------------------------------------------------------------------------------------------------------------------
# Shared and tied


@own(t(2, 3), editable="first step")
class RecurrenceInPython(nn.Module):
    """One layer in every step of a loop, and a state that is added to."""

    def __init__(self):
        super().__init__()
        self.first, self.step, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        state = self.first(x)
        for _ in range(3):
            state = state + self.step(self.norm(state)).tanh()
        return self.last(state)


@own(t(2, 3), t(2, 3), editable="tower.0 tower.2")
class SiameseTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(10, 1)

    def forward(self, x, y):
        a, b = self.tower(x), self.tower(y)
        return self.head(torch.cat([a * b, (a - b).abs()], 1))


@own(words(2, 5), editable="up down")
class LanguageModelWithTiedHead(nn.Module):
    """The output layer's weight is the table of words."""

    def __init__(self):
        super().__init__()
        self.word, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.word.weight

    def forward(self, tokens):
        x = self.word(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(self.norm(x))


@own(t(2, 6), editable="encode")
class AutoencoderWithTransposedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.bias = nn.Linear(6, 4), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return F.linear(self.encode(x).sigmoid(), self.encode.weight.t(), self.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Bare parameters and functional calls


@own(t(2, 3), editable="w1 w2 b1")
class PerceptronOfParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.b1, self.w2, self.w3 = table(3, 6), table(6), table(5, 6), table(5, 2)

    def forward(self, x):
        hidden = torch.relu(x @ self.w1 + self.b1)
        return torch.matmul(F.linear(hidden, self.w2).tanh(), self.w3)


@own(t(2, 3), editable="w2")
class TransposedParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = table(6, 3), table(5, 6), table(2, 5)

    def forward(self, x):
        hidden = torch.relu(x @ self.w1.t())
        return torch.einsum("nc,dc->nd", hidden, self.w2).tanh() @ self.w3.transpose(0, 1)


@own(t(2, 3, 5, 5), editable="w1 v.scale", frozen=("kernel size",))
class FunctionalConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.b1, self.w2 = table(6, 3, 3, 3), table(6), table(8, 6, 1, 1)
        self.w3, self.depth, self.head = table(4, 8, 1, 1), table(8, 1, 3, 3), table(2, 4)
        self.v = nn.ParameterDict({"scale": table(6), "shift": table(6)})
        for name, values in (("mean", torch.randn(6)), ("var", torch.rand(6) + 0.5)):
            self.register_buffer(name, values)

    def forward(self, x):
        x = F.conv2d(x, self.w1, self.b1, padding=1)
        x = F.batch_norm(x, self.mean, self.var, self.v["scale"], self.v["shift"], self.training).relu()
        x = F.conv2d(F.conv2d(x, self.w2), self.depth, groups=8, padding=1)
        x = F.conv2d(F.group_norm(x, 2), self.w3).relu()
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.head)


@own(words(2, 5), editable="scale out")
class FunctionalTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.scale, self.shift, self.last = nn.Linear(6, 4), table(6), table(6), nn.Linear(4, 2)
        self.word = nn.Embedding(7, 6)

    def forward(self, tokens):
        x = F.layer_norm(self.word(tokens), (6,), self.scale, self.shift)
        return self.last(F.gelu(self.out(F.dropout(x, 0.0, self.training))))


# ---------------------------------------------------------------------------------------------------------------------
# Containers


@own(t(2, 3), editable="stem branches.left branches.right.0 deep.0.0 deep.1.1.inner")
class ContainersOfContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.branches = nn.ModuleDict({"left": nn.Linear(6, 4), "right": nn.Sequential(nn.Linear(6, 5), nn.ReLU())})
        inner = nn.ModuleDict({"inner": nn.Linear(9, 7)})
        self.deep = nn.ModuleList([nn.ModuleList([nn.Linear(9, 9)]), nn.ModuleList([nn.ReLU(), inner])])
        self.gains = nn.ParameterList([nn.ParameterList([table(6)]), table(1)])
        self.head = nn.Linear(7, 2)

    def forward(self, x):
        x = self.stem(x) * self.gains[0][0] + self.gains[1]
        x = torch.cat([self.branches[name](x) for name in ("left", "right")], 1)
        for (layer,) in [self.deep[0]]:
            x = x + layer(x)
        act, rest = self.deep[1]
        return self.head(act(rest["inner"](x)))


# ---------------------------------------------------------------------------------------------------------------------
# Buffers as tables


@own(
    words(2, 4),
    editable="position qkv up",
    frozen=(
        "values of a buffer",
        "softmax works along it",
        "no layer contracts over it",
        "add combines it with an axis that holds no channels",
        "matmul contracts it with an axis that does not change",
    ),
)
class CausalTransformer(nn.Module):
    """A small GPT: tables of words and positions, a mask and waves as buffers."""

    def __init__(self):
        super().__init__()
        self.word, self.position = nn.Embedding(7, 6), table(1, 8, 6)
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 7)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.register_buffer("mask", torch.ones(8, 8).tril().view(1, 1, 8, 8) == 0, persistent=False)
        self.register_buffer("waves", torch.sin(torch.arange(48.0).view(8, 6)))

    def forward(self, tokens):
        n, length = tokens.shape
        x = self.word(tokens) + self.position[:, :length] + self.waves[:length, :1]
        q, k, v = self.qkv(self.norms[0](x)).view(n, length, 3, 2, 3).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(self.mask[:, :, :length, :length], float("-inf"))
        x = x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, -1))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


@own(t(2, 4, 6), editable="qkv", frozen=("getitem picks positions of it",))
class RelativePositions(nn.Module):
    """A table of biases for each head, read at positions that a buffer holds."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(6, 18), nn.Linear(6, 5), nn.Linear(5, 2)
        self.bias = table(7, 3)
        at = torch.arange(4)
        self.register_buffer("index", at[:, None] - at[None, :] + 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        y = ((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.proj(y).relu())


# ---------------------------------------------------------------------------------------------------------------------
# Layers of one's own


class RootMeanSquare(nn.Module):
    """RMSNorm over the last axis."""

    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain


class Reading(nn.Module):
    """Attention-pooled reading of tokens: a weight that is contracted, one that is written, and a size."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.query, self.write, self.outputs = table(inputs), table(inputs, outputs), outputs

    def forward(self, x):
        weights = (x @ self.query).softmax(-1)
        return (torch.einsum("nt,ntc->nc", weights, x) @ self.write).view(-1, self.outputs)


@own(t(2, 4, 3), editable="a gate.gain reading.write", own_norm=True)
class LayersWithRules(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gate, self.reading, self.b = nn.Linear(3, 6), RootMeanSquare(6), Reading(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(self.reading(self.gate(self.a(x))).relu())


@pytest.fixture
def own_rules():
    """Rules for the two layers above, taken back after the test."""
    with restore_rules():

        @surgery.oprule(RootMeanSquare)
        def root_mean_square(op, x):
            op.mixes(op.per_position(x, 2, op.param("gain").at(0)), 2, 2)
            return x.fields

        def follow(site: NodeEdit) -> None:
            site.module.outputs = site.module.write.shape[1]

        @surgery.oprule(Reading, rewrite=follow)
        def reading(op, x):
            query, write = op.param("query"), op.param("write")
            channels, _ = op.axis(x, 2)
            for weight in (query, write):
                op.consumes(weight.at(0))
                op.tie(channels, weight.at(0))
            op.produces(write.at(1))
            op.keep(x, [0, 1])
            return (type(write.at(1))((1,), write.at(1).ids),)

        yield


# ---------------------------------------------------------------------------------------------------------------------


def built(name: str) -> tuple[Own, nn.Module]:
    model = OWN[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = randomised(model.make())
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                for parameter in module.parameters():
                    parameter.data.uniform_(0.5, 1.5)
    return model, net.double()


def groups_of(traced: nn.Module) -> list[surgery.DimensionGroup]:
    return [g for g in surgery.dimension_groups(traced) if g.editable]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.filterwarnings("ignore")
def test_models_as_users_write_them_are_edited_exactly_and_again(name, own_rules):
    model, net = built(name)
    traced = surgery.trace(net, model.args, kwargs=model.kwargs)

    def same(a, b):
        for train in (False, True):
            check = surgery.verify(a, b, model.args, kwargs=model.kwargs, train=train)
            assert check.max_rel <= EXACT, (train, check)

    def hold(module):
        same(surgery.reindex(module, {g.name: g.permutation(seed=1) for g in groups_of(module)}), module)
        wide = surgery.widen(module, 2.0, seed=1)
        same(wide, module)
        slim = surgery.slim(module, 0.5)
        if not model.own_norm:
            same(slim, surgery.masked(module, surgery.split_masks(module, 0.5)))
        return wide, slim

    same(traced, net)
    for edited in hold(traced):
        hold(copy.deepcopy(edited))
    same(surgery.widen(traced, 1.5, seed=2), traced)


@pytest.mark.parametrize("name", OWN)
def test_models_as_users_write_them_leave_channels_alone_for_known_reasons_only(name, own_rules):
    model, net = built(name)
    groups = surgery.dimension_groups(surgery.trace(net, model.args, kwargs=model.kwargs))
    by_name = {n: g for g in reversed(groups) for m in g.members if m.role != "consumer" for n in (m.layer, m.name)}
    for layer in model.editable:
        assert by_name[layer].editable, by_name[layer].reason
        assert not by_name[layer].frozen.any(), by_name[layer].reason
    reasons = {r for g in groups for r in g.reason.split("; ") if r} - ENDS
    assert {r for r in reasons if "relates it to an axis that holds no channels" not in r} == set(model.frozen)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_a_transformer_of_torch_is_operated_on_inside(norm_first):
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 4)
            self.core = nn.Transformer(12, 3, 1, 1, 20, batch_first=True, norm_first=norm_first)

        def forward(self, source, target):
            return self.b(self.core(self.a(source), self.a(target)))

    torch.manual_seed(0)
    net = Translator().double()
    for name, parameter in net.named_parameters():
        if "norm" in name or parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5)
    x = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    traced = surgery.trace(net, x)
    for train in (False, True):
        assert surgery.verify(traced, net, x, train=train).max_abs == 0
    groups = surgery.dimension_groups(traced)
    assert {g.reason for g in groups} == {"", "network input", "network output"}
    assert {g.units for g in groups if g.name.endswith(("self_attn", "multihead_attn"))} == {3}
    moved = surgery.reindex(traced, {g.name: g.permutation(1) for g in groups if g.editable})
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    for one, other in ((moved, traced), (surgery.widen(traced, 2.0), traced), (slim, masked)):
        assert surgery.verify(one, other, x).max_rel <= 1e-10
