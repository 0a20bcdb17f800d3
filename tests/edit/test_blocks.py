"""Whole blocks at the end of a stage: found from the graph, copied, exact, and able to learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

import surgery
from surgery import models as catalogue
from tests.zoo import build_family, randomised, traced_of

EXACT = 1e-10


def torchvision_model(name: str, size: int) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: traced_of(lambda: catalogue.build(name, num_classes=10, seed=0), 2, 3, size, size)


class NarrowResNet(models.ResNet):
    """An eighth of the channels: copies are made of the whole model."""

    def __init__(self, block: Any, layers: list[int]) -> None:
        super().__init__(block, layers)
        self.fc = nn.Linear(self.inplanes, 10)

    def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *rest, **options)


def resnet(block: Any, layers: list[int]) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: traced_of(lambda: NarrowResNet(block, layers), 2, 3, 32, 32)


def small(name: str) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    def make() -> tuple[nn.Module, torch.Tensor]:
        family = build_family(name)
        return traced_of(lambda: family.model, *family.x.shape)

    return make


def encoder() -> tuple[nn.Module, torch.Tensor]:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=True)
        return nn.Sequential(
            nn.Linear(5, 12),
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.LayerNorm(12),
            nn.Linear(12, 4),
        )

    return traced_of(make, 2, 6, 5)


class Written(nn.Module):
    """Residual sums in one ``forward``, without containers: the second one with a gain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.a1, self.a2 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a2(F.gelu(self.a1(x))))
        x += self.gain * self.b2(F.gelu(self.b1(x)))
        return self.head(x.mean((2, 3)))


def deep_maxvit() -> nn.Module:
    return models.MaxVit((56, 56), 8, 7, [8, 16], [1, 2], 4, 0.1, num_classes=10)


BLOCKS: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], str, str, str, set[str]]] = {
    "basic": (resnet(BasicBlock, [2, 2, 2, 2]), "layer3", "layer3.1", "layer3.2", {"bn2.weight", "bn2.bias"}),
    "bottleneck": (resnet(Bottleneck, [1, 4, 1, 1]), "layer2", "layer2.3", "layer2.4", {"bn3.weight", "bn3.bias"}),
    "regnet": (
        torchvision_model("regnet_y_400mf", 32),
        *("trunk_output.block3", "trunk_output.block3.block3-5", "trunk_output.block3.block3-6"),
        {"f.c.1.weight", "f.c.1.bias"},
    ),
    "inverted residual": (
        torchvision_model("mobilenet_v2?width_mult=0.25", 32),
        *("features.16", "features.16", "features.16_copy0"),
        {"conv.3.weight", "conv.3.bias"},
    ),
    "efficientnet": (
        torchvision_model("efficientnet_b0", 32),
        *("features.4", "features.4.2", "features.4.3"),
        {"block.3.1.weight", "block.3.1.bias"},
    ),
    "convnext": (small("convnext"), "features.1", "features.1.1", "features.1.2", {"layer_scale"}),
    "vision transformer": (
        small("vision transformer"),
        *("encoder.layers", "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2"),
        {"self_attention.out_proj.weight", "self_attention.out_proj.bias", "mlp.3.weight", "mlp.3.bias"},
    ),
    "swin": (
        small("swin"),
        *("features.3", "features.3.1", "features.3.2"),
        {"attn.proj.weight", "attn.proj.bias", "mlp.3.weight", "mlp.3.bias"},
    ),
    "swin v2": (
        small("swin v2"),
        *("features.3", "features.3.1", "features.3.2"),
        {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"},
    ),
    "maxvit": (
        lambda: traced_of(deep_maxvit, 2, 3, 56, 56),
        *("blocks.1", "blocks.1.layers.1", "blocks.1.layers.2"),
        {
            f"layers.{layer}.{own}"
            for layer in (
                "MBconv.layers.conv_c",
                *(
                    f"{kind}_attention.{last}"
                    for kind in ("window", "grid")
                    for last in ("attn_layer.1.merge", "mlp_layer.3")
                ),
            )
            for own in ("weight", "bias")
        },
    ),
    "half of a maxvit layer": (
        small("maxvit"),
        *("blocks.1", "blocks.1.layers.0.layers.grid_attention", "blocks.1.layers.0.layers.grid_attention_copy0"),
        {f"{layer}.{own}" for layer in ("attn_layer.1.merge", "mlp_layer.3") for own in ("weight", "bias")},
    ),
    "layers of torch": (
        encoder,
        *("1", "1.layers.1", "1.layers.2"),
        {"self_attn.out_proj.weight", "self_attn.out_proj.bias", "linear2.weight", "linear2.bias"},
    ),
    "no container": (lambda: traced_of(Written, 2, 3, 8, 8), "b2", "", "b2_block0", {"gain"}),
    "no container, an activation behind": (
        lambda: traced_of(Written, 2, 3, 8, 8),
        *("a2", "", "a2_block0"),
        {"a2.weight", "a2.bias"},
    ),
}
"""A model, a place in it, the container that is its block, the copy's name, and what is 0 in the copy."""


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in BLOCKS])
def case(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    make, *rest = BLOCKS[request.param]
    traced, x = make()
    form = "block" if not rest[1] else None
    return traced, x, *rest, surgery.deepen(traced, [rest[0]], form=form), form


def test_the_block_at_the_end_is_copied_and_its_last_layers_are_zero(case):
    traced, _, place, like, name, zeros, deep, _ = case
    (step,) = surgery.recipe(deep).steps
    assert step == surgery.InsertBlock(place, name, like, tuple(sorted(f"{name}.{z}" for z in zeros)))
    for zero in step.zeros:
        assert not deep.get_parameter(zero).any()
    copied = {n: p for n, p in deep.named_parameters() if n.startswith(f"{name}.") and n not in step.zeros}
    assert copied
    for parameter, value in copied.items():
        original = traced.get_parameter(f"{like}{parameter[len(name) :]}".lstrip("."))
        assert torch.equal(original, value)
        assert original.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


@pytest.mark.parametrize("train", [False, True])
def test_blocks_are_exact_in_both_modes_however_often(case, train):
    traced, x, place, _, _, _, deep, form = case
    twice = surgery.deepen(surgery.deepen(deep, [place], form=form), {place: 2}, form=form)
    assert len({step.name for step in surgery.recipe(twice).steps}) == 4
    assert surgery.verify(deep, traced, x, train=train).max_rel <= EXACT
    assert surgery.verify(twice, traced, x, train=train).max_rel <= EXACT


def test_blocks_learn_within_two_steps(case):
    traced, x, *_, deep, _ = case
    old = {n for n, _ in traced.named_parameters()}
    assert untouched_after_two_steps(deep, x, old) == set()


def untouched_after_two_steps(module: nn.Module, x: torch.Tensor, old: set[str]) -> set[str]:
    """New parameters that have not had a gradient."""
    module = copy.deepcopy(module).train()
    new = {n: p for n, p in module.named_parameters() if n not in old}
    assert new
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    left = set(new)
    for _ in range(2):
        optimiser.zero_grad()
        module(x).square().sum().backward()
        left -= {n for n, p in new.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimiser.step()
    return left


def test_blocks_belong_to_dimension_groups(case):
    traced, x, *_, deep, _ = case
    groups = [g for g in surgery.dimension_groups(deep) if g.editable]
    assert len(groups) > len([g for g in surgery.dimension_groups(traced) if g.editable])
    woken = awake(deep)
    for module, reference in ((deep, traced), (woken, woken)):  # a 0 hides what is done to its layer
        permuted = surgery.reindex(module, {g.name: g.permutation(1) for g in groups})
        assert surgery.verify(permuted, reference, x).max_rel <= EXACT
        assert surgery.verify(surgery.widen(module, 1.5), reference, x).max_rel <= EXACT
        masks = surgery.split_masks(module, 0.5)
        slim = surgery.slim(module, 0.5)
        assert surgery.verify(slim, surgery.masked(module, masks), x).max_rel <= EXACT


def awake(module: nn.Module) -> nn.Module:
    """The module with random numbers where a new block has zeros."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for step in surgery.recipe(module).steps:
        for name in step.zeros:
            tensor = module.get_parameter(name)
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) / 4)
    return module


@pytest.mark.parametrize("train", [False, True])
def test_what_was_deepened_is_shortened_to_what_it_was(case, train):
    traced, x, *_, name, _, deep, _ = case
    short = surgery.shorten(deep, [name])
    assert surgery.verify(short, traced, x, train=train).max_rel == 0
    ours, theirs = short.state_dict(), traced.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_blocks_are_replayed_from_json(case):
    traced, *_, deep, _ = case
    again = surgery.apply(traced, surgery.Recipe.from_json(surgery.recipe(deep).to_json()))
    ours, theirs = deep.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_deepened_networks_are_saved_and_loaded(tmp_path):
    traced = surgery.trace(
        catalogue.build("resnet18", seed=0), torch.zeros(2, 3, 32, 32), source="torchvision:resnet18"
    )
    deep = surgery.deepen(traced, {"layer2": 2, "layer3": 1, "conv1": 1})
    again = surgery.load(surgery.save(deep, tmp_path / "deep"))
    assert surgery.verify(again, deep, torch.randn(2, 3, 32, 32)).max_abs == 0


# ---------------------------------------------------------------------------------------------------------------------
# What is no block


class Tied(nn.Module):
    """Zero weights that are read twice would stay zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + F.gelu(self.a(x)) @ self.a.weight)


class Body(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.skip = (nn.Linear(6, 6) for _ in range(3))
        self.norm, self.bare = nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(F.gelu(self.a(x)))
        if self.kind == "no skip":
            return y
        if self.kind == "a skip that changes":
            return y + self.skip(x).tanh()
        if self.kind == "normalised behind":
            return self.norm(x + y)
        if self.kind == "activated behind":
            return F.gelu(x + y)
        if self.kind == "subtracted from":
            return y - x
        if self.kind == "turned":
            return (x + y).flip(1)
        if self.kind == "activated branch":
            return x + F.relu(y)
        if self.kind == "norm without weights":
            return x + self.bare(y)
        if self.kind == "weights of an attention":
            return x + self.attention(x, x, x)[1]
        if self.kind == "overwritten":
            z = x.relu_()
            return x + self.b(z)
        return x + y


class Whole(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 6), Body(kind), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x)))


REFUSED = [
    *("no skip", "a skip that changes", "normalised behind", "activated behind", "subtracted from", "turned"),
    *("activated branch", "norm without weights", "overwritten", "weights of an attention"),
]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_block_is_refused_and_gets_layers_by_default(kind):
    traced, x = traced_of(lambda: Whole(kind), 5, 6, 4)
    with pytest.raises(
        surgery.EditError, match="'body' has no block at its end that could be copied: that takes a skip"
    ):
        surgery.deepen(traced, ["body"], form="block")
    deep = surgery.deepen(traced, ["body"])
    assert [type(s).__name__ for s in surgery.recipe(deep).steps] == ["InsertIdentity"]
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


def test_a_subtracted_branch_is_a_block():
    class Minus(Body):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.b(self.norm(x)) / 2.0

    def make() -> nn.Module:
        whole = Whole("")
        whole.body = Minus("")
        return whole

    traced, x = traced_of(make, 5, 4)
    deep = surgery.deepen(traced, ["body"])
    assert surgery.recipe(deep).steps[0].zeros == ("body_copy0.b.bias", "body_copy0.b.weight")
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


def test_weights_that_are_read_twice_are_not_set_to_zero():
    traced, _ = traced_of(Tied, 5, 6)
    with pytest.raises(surgery.EditError, match="no block"):
        surgery.deepen(traced, ["a"], form="block")


@pytest.mark.parametrize("kind", ["parametrized", "not learned", "hook"])
def test_layers_whose_output_is_not_that_of_their_own_weights_are_not_set_to_zero(kind):
    def make() -> nn.Module:
        whole = Whole("plain")
        if kind == "parametrized":
            torch.nn.utils.parametrizations.weight_norm(whole.body.b)
        elif kind == "not learned":
            weight = whole.body.b.weight.detach()
            del whole.body.b.weight
            whole.body.b.register_buffer("weight", weight)
        else:
            whole.body.b.register_forward_hook(lambda module, given, output: output + 1)
        return whole

    traced, x = traced_of(make, 5, 6, 4)
    with pytest.raises(surgery.EditError, match="no block"):
        surgery.deepen(traced, ["body"], form="block")
    assert surgery.verify(surgery.deepen(traced, ["body"]), traced, x).max_rel <= EXACT


@pytest.mark.parametrize("train", [False, True])
def test_every_graph_that_runs_a_stage_gets_the_block(train):
    class Modal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head, self.aux = nn.Linear(4, 6), Body("plain"), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(self.stem(x))
            return self.head(x) + self.aux(x) if self.training else self.head(x)

    traced, x = traced_of(Modal, 5, 4)
    deep = surgery.deepen(traced, ["body"], form="block")
    assert len(deep.graphs) == 2
    assert surgery.verify(deep, traced, x, train=train).max_rel <= EXACT
    woken = awake(deep).train(train)
    assert not torch.allclose(woken(x), traced.train(train)(x))
    graph = woken.graphs[train]
    assert [n.target for n in graph.nodes if str(n.target).startswith("body_copy0")] == ["body_copy0.a", "body_copy0.b"]


def test_an_inverted_residual_without_a_skip_is_refused():
    traced, _ = torchvision_model("mobilenet_v2?width_mult=0.25", 32)()
    with pytest.raises(surgery.EditError, match=r"'features\.17' has no block at its end"):
        surgery.deepen(traced, ["features.17"], form="block")
    assert surgery.recipe(surgery.deepen(traced, ["features.17"])).steps[0].form == "residual"


def test_a_block_that_others_look_into_is_refused():
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = F.gelu(self.a(x))
            return self.head(torch.cat([x + self.b(inner), inner], 1))

    traced, _ = traced_of(Tapped, 5, 6)
    with pytest.raises(surgery.EditError, match="no block"):
        surgery.deepen(traced, ["b"], form="block")


def test_a_block_that_reads_other_activations_is_refused():
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.tanh(self.stem(x))
            return self.head(y + self.b(F.gelu(self.a(y)) * x))

    traced, _ = traced_of(Conditioned, 5, 6)
    with pytest.raises(surgery.EditError, match="no block"):
        surgery.deepen(traced, ["b"], form="block")


def test_what_is_tied_elsewhere_is_not_tied_to_the_copy():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6))
            self.stem, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x) + self.table
            return self.head(x + self.body(x + self.table))

    traced, x = traced_of(Shared, 5, 4)
    deep = surgery.deepen(traced, ["body"], form="block")
    assert {n for n, _ in deep.named_parameters()} - {n for n, _ in traced.named_parameters()} == {
        "body_block0.table",
        "body_block0.body.weight",
        "body_block0.body.bias",
    }
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


def test_behind_a_frozen_norm_the_convolution_is_zero_and_learns():
    def make() -> nn.Module:
        model = models.resnet18(norm_layer=FrozenBatchNorm2d)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.running_var.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        return model

    traced, x = traced_of(make, 2, 3, 32, 32)
    deep = surgery.deepen(traced, ["layer2"])
    names = [f"layer2.2.{n}" for n in ("bn2.bias", "bn2.running_mean", "conv2.weight")]
    assert list(surgery.recipe(deep).steps[0].zeros) == names
    assert surgery.verify(deep, traced, x).max_rel <= EXACT
    assert untouched_after_two_steps(deep, x, {n for n, _ in traced.named_parameters()}) == set()


def test_a_detection_backbone_gets_blocks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=5)
        model = randomised(model).double().eval()
        images = [torch.rand(3, 60, 70, dtype=torch.float64)]
    traced = surgery.trace(model, images)
    deep = surgery.deepen(traced, ["backbone.body.15"])
    assert surgery.recipe(deep).steps[0].like == "backbone.body.15"
    features = [m.get_submodule("backbone")(torch.stack([images[0]] * 2)) for m in (deep, traced)]
    for ours, theirs in zip(*(f.values() for f in features), strict=True):
        assert torch.equal(ours, theirs)


def test_a_word_for_how_an_op_is_linear_must_be_known():
    with pytest.raises(surgery.UsageError, match="unknown word 'affin' for how an op is linear: one of 'sum', 'first'"):
        surgery.oprule(torch.special.expit, linear="affin")


def test_a_copy_of_a_frozen_block_learns():
    traced = surgery.trace(
        catalogue.build("resnet18?num_classes=10", seed=0).requires_grad_(False), torch.randn(2, 3, 32, 32)
    )
    deep = surgery.deepen(traced, ["layer2", "layer1.0.conv1"], form="block")
    learns = {name for name, p in deep.named_parameters() if p.requires_grad}
    assert learns == {name for name, origin in surgery.origins(traced, deep).items() if origin is None} & {
        name for name, _ in deep.named_parameters()
    }
    assert any(name.startswith("layer2.2.") for name in learns)


def test_a_recipe_whose_zeros_are_not_those_of_the_block_is_refused():
    traced = surgery.trace(catalogue.build("resnet18?num_classes=10", seed=0), torch.randn(2, 3, 32, 32))
    (step,) = surgery.recipe(surgery.deepen(traced, ["layer3"])).steps
    for zeros in ((), ("conv1.weight",), ("layer3.2.none",)):
        with pytest.raises(surgery.EditError, match=r"a copy of 'layer3\.1' is not the identity where"):
            surgery.apply(traced, replace(step, zeros=zeros))


@pytest.mark.parametrize("pre", [False, True])
def test_a_block_whose_way_through_has_a_hook_is_refused(pre):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x):
            return self.act(x + self.b(self.a(x).relu()))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer = nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block())
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.layer(self.stem(x).relu()))

    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    model = Net().double().eval()
    plain = surgery.deepen(surgery.trace(model, x), {"layer": 1})
    assert isinstance(surgery.recipe(plain).steps[-1], surgery.InsertBlock)
    act = model.layer[1].act
    if pre:
        act.register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    else:
        act.register_forward_hook(lambda module, given, out: out + 1)
    with pytest.raises(surgery.EditError, match="the output of 'layer' has no channel axis to put a layer behind"):
        surgery.deepen(surgery.trace(model, x), {"layer": 1})
