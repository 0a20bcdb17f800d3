"""The reset-hypothesis is drawn anew as a new model is, and the fit-hypothesis is left alone."""

from __future__ import annotations

import copy
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery import models as catalogue
from surgery.graph.traced import TracedModule, named_tensors
from surgery.operations.initial import seeded_draws
from surgery.operations.reset import reset_hypothesis
from tests.zoo import TiedLayers, randomised

SOURCES = ["resnet18", "efficientnet_b0", "shufflenet_v2_x1_0", "swin_t", "vit_b_16", "fitnet1",
           "fasterrcnn_mobilenet_v3_large_320_fpn"]  # fmt: skip


def traced_source(source, seed=0, random=True):
    source = catalogue.canonical(source)
    model = catalogue.build(source, seed=seed)
    return surgery.trace(randomised(model) if random else model, catalogue.example_inputs(source), source=source)


def nothing(module):
    return {name: torch.zeros_like(p, dtype=torch.bool) for name, p in module.named_parameters()}


def same(a, b):
    a, b = named_tensors(a), named_tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Net(nn.Module):
    """Convolutions and norms of each kind, without a source; ``scale`` is refused where it stands in no layer."""

    def __init__(self, bare=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.last, self.group = nn.Conv2d(8, 8, 1, bias=False), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5)) if bare else None

    def forward(self, x):
        x = self.plain(self.norm(self.conv(x)).relu())
        x = self.group(self.last(x))
        return self.head((x if self.scale is None else x * self.scale).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(Net(**options))
    for norm in (model.norm, model.plain):
        norm.running_mean.add_(3.0)
        norm.num_batches_tracked.fill_(7)
    return surgery.trace(model, X)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_reset_is_what_a_new_model_has_and_the_slim_network_stays_what_it_was(source):
    traced = traced_source(source)
    masks = surgery.split_masks(traced, 0.5)
    with seeded_draws(4):
        new = catalogue.build(source)
    result = reset_hypothesis(traced, masks, seed=4)
    drawn, old = dict(new.named_parameters()), dict(traced.named_parameters())
    for name, parameter in result.named_parameters():
        assert torch.equal(parameter, torch.where(masks[name], old[name], drawn[name])), name
    slim = surgery.slim(result, 0.5)
    assert same(slim, surgery.slim(traced, 0.5))
    assert surgery.recipe(result) == surgery.recipe(traced)


def test_one_seed_draws_one_result_and_leaves_the_input_and_the_global_generator_alone():
    traced = traced_source("shufflenet_v2_x0_5")
    masks, before, state = surgery.split_masks(traced, 0.5), copy.deepcopy(traced), torch.get_rng_state()
    a, b, c = (reset_hypothesis(traced, masks, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(traced, before)
    assert same(a, b)
    first = "conv5.0.weight"
    assert not torch.equal(a.get_parameter(first), c.get_parameter(first))
    again = reset_hypothesis(traced, nothing(traced), seed=0)  # the seed that the model was made with
    assert not torch.equal(again.get_parameter(first), traced.get_parameter(first))
    held = {t.untyped_storage().data_ptr() for t in (*named_tensors(traced).values(), *masks.values())}
    assert held.isdisjoint(t.untyped_storage().data_ptr() for t in named_tensors(a).values())


def test_masks_are_no_part_of_the_result_which_is_a_model_like_any_other(tmp_path):
    traced = traced_source("shufflenet_v2_x0_5")
    result = reset_hypothesis(traced, surgery.split_masks(traced, 0.5))
    assert [*result.state_dict()] == [*traced.state_dict()]
    assert isinstance(result, TracedModule)
    result.graph.lint()
    assert same(copy.deepcopy(result), result)
    surgery.save(result, tmp_path / "model")
    assert same(surgery.load(tmp_path / "model"), result)
    assert surgery.verify(surgery.widen(result, 1.5), result, torch.randn(2, 3, 64, 64), dtype=torch.float64).ok


def test_modes_dtypes_layouts_and_frozen_parameters_survive():
    model = Net().double().to(memory_format=torch.channels_last).train()
    model.conv.weight.requires_grad_(False)
    model.norm.eval()
    traced = surgery.trace(model, X.double())
    result = reset_hypothesis(traced, surgery.split_masks(traced, 0.5))
    assert [m.training for m in result.modules()] == [m.training for m in traced.modules()]
    for (name, p), q in zip(result.named_parameters(), traced.parameters(), strict=True):
        assert (p.dtype, p.stride(), p.requires_grad) == (q.dtype, q.stride(), q.requires_grad), name
    assert result.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_without_a_source_a_layers_class_draws_it_and_the_generation_before_is_gone():
    traced = net()
    result = reset_hypothesis(traced, nothing(traced), seed=1)
    bound = 1 / math.sqrt(27)
    weight = result.conv.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert result.conv.bias.abs().max() <= bound
    for norm in (result.norm, result.group):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
    for norm in (result.norm, result.plain):
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()
        assert norm.num_batches_tracked == 0


def test_norms_and_statistics_are_reset_in_the_channels_that_are():
    traced = net()
    result = reset_hypothesis(traced, surgery.split_masks(traced, 0.5))
    for layer in ("norm", "plain"):
        old, new = traced.get_submodule(layer), result.get_submodule(layer)
        for name, initial in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            if getattr(old, name) is not None:
                assert torch.equal(getattr(new, name)[:4], getattr(old, name)[:4]), name
                assert (getattr(new, name)[4:] == initial).all(), name
        assert new.num_batches_tracked == 0
    assert torch.equal(result.group.weight[[0, 1, 4, 5]], traced.group.weight[[0, 1, 4, 5]])
    assert (result.group.weight[[2, 3, 6, 7]] == 1).all()


@pytest.mark.parametrize(
    ("off", "kept"),
    [
        ("weights", ["conv.weight", "last.weight", "head.weight"]),
        ("biases", ["conv.bias", "head.bias"]),
        ("norms", ["norm.weight", "norm.bias", "group.weight", "group.bias"]),
        ("statistics", [f"{n}.{s}" for n in ("norm", "plain")
                        for s in ("running_mean", "running_var", "num_batches_tracked")]),
    ],
)  # fmt: skip
def test_each_switch_keeps_its_kind_and_no_other(off, kept):
    traced = net()
    result = reset_hypothesis(traced, nothing(traced), **{off: False})
    old = named_tensors(traced)
    assert [name for name, t in named_tensors(result).items() if torch.equal(t, old[name])] == [
        name for name in old if name in kept
    ]


def test_wels_resets_entries_of_weights_and_keeps_vectors_and_statistics_whole():
    traced = net()
    masks = surgery.split_masks(traced, 0.5, kind="wels", seed=2)
    result, old = reset_hypothesis(traced, masks), named_tensors(traced)
    for name, tensor in named_tensors(result).items():
        mask = masks.get(name, torch.tensor(True)).expand(tensor.shape)
        assert torch.equal(tensor == old[name], mask), name


def test_buffers_that_are_no_statistics_stay():
    model = Net()
    model.register_buffer("table", torch.arange(4.0))
    traced = surgery.trace(model, X)
    result = reset_hypothesis(traced, nothing(traced))
    assert torch.equal(result.get_buffer("table"), torch.arange(4.0))


@pytest.mark.parametrize("kind", ["kels", "wels"])
def test_tied_weights_stay_tied_and_have_one_mask(kind):
    traced = surgery.trace(TiedLayers(), torch.zeros(2, 8))
    masks = surgery.split_masks(traced, 0.5, kind=kind)
    assert torch.equal(masks["first.weight"], masks["second.weight"])
    result = reset_hypothesis(traced, masks)
    assert result.first.weight is result.second.weight
    assert torch.equal(result.first.weight == traced.first.weight, masks["first.weight"])
    with pytest.raises(surgery.UsageError, match=r"'second.weight' is tied to another parameter, and their masks"):
        reset_hypothesis(traced, {**masks, "second.weight": ~masks["second.weight"]})


def test_what_nothing_initialises_is_refused_kept_or_taken_from_a_new_model():
    traced = net(bare=True)
    masks = nothing(traced)
    with pytest.raises(surgery.UsageError, match="nothing says how to initialise scale: trace with source=, pass fre"):
        reset_hypothesis(traced, masks)
    kept = reset_hypothesis(traced, masks, unknown="keep")
    assert torch.equal(kept.scale, traced.scale)
    assert not torch.equal(kept.conv.weight, traced.conv.weight)
    new = Net(bare=True)
    for fresh in (new, lambda: new):
        result = reset_hypothesis(traced, masks, fresh=fresh)
        assert all(torch.equal(p, q) for p, q in zip(result.parameters(), new.parameters(), strict=True))
        assert result.conv.weight.data_ptr() != new.conv.weight.data_ptr()
    assert torch.equal(reset_hypothesis(traced, {"scale": masks["scale"]}, weights=False).scale, traced.scale)
    one, two = (reset_hypothesis(traced, masks, seed=s, fresh=lambda: Net(bare=True)) for s in (1, 2))
    assert (one.scale == 0.5).all()
    assert not torch.equal(one.conv.weight, two.conv.weight)


def by_fan_out(layer):
    return math.sqrt(2 / (layer.out_channels * math.prod(layer.kernel_size)))


def by_fan_in(layer):
    return 1 / math.sqrt(3 * layer.weight[0].numel())


@pytest.mark.parametrize(
    ("source", "deviation"),
    [("resnet18", by_fan_out), ("regnet_y_400mf", by_fan_out), ("shufflenet_v2_x1_0", by_fan_in)],
)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_an_edited_model_is_drawn_at_its_own_widths_and_holds_no_copies(source, deviation, factor):
    traced = traced_source(source, random=False)
    edited = surgery.widen(traced, factor) if factor > 1 else surgery.slim(traced, factor)
    result = reset_hypothesis(edited, nothing(edited), seed=3)
    assert {n: p.shape for n, p in result.named_parameters()} == {n: p.shape for n, p in edited.named_parameters()}
    convs = [m for m in result.modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.weight.numel() > 4000]
    assert len(convs) > 8
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(deviation(conv), rel=0.06)
        assert len(torch.unique(conv.weight.flatten(1), dim=0)) == conv.out_channels


def test_attention_tokens_and_tables_of_an_edited_transformer_have_their_deviation():
    traced = traced_source("swin_t", random=False)
    slim = surgery.slim(traced, 0.5)
    result = reset_hypothesis(slim, nothing(slim), seed=3)
    tables = [n for n in dict(result.named_parameters()) if n.endswith("relative_position_bias_table")]
    assert tables
    for name in tables:
        assert result.get_parameter(name).shape == slim.get_parameter(name).shape
        assert result.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.15)


def test_copied_blocks_are_drawn_as_what_they_copy_and_inserted_layers_by_their_class():
    traced = traced_source("resnet18", random=False)
    deep = surgery.deepen(surgery.deepen(surgery.deepen(traced, {"layer3": 1}), {"layer3": 1}), ["layer1.0.conv1"])
    new = [n for n in dict(deep.named_parameters()) if n not in dict(traced.named_parameters())]
    result = reset_hypothesis(deep, nothing(deep), seed=3)
    for name in (n for n in new if n.startswith("layer3") and n.endswith("weight") and deep.get_parameter(n).ndim > 1):
        weight = result.get_parameter(name)
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02), name
        assert not torch.equal(weight, result.get_parameter("layer3.1.conv1.weight"))
    (inserted,) = (n for n in new if n.startswith("layer1.0") and deep.get_parameter(n).ndim == 4)
    assert result.get_parameter(inserted).std().item() == pytest.approx(1 / math.sqrt(3 * 64 * 9), rel=0.05)


def test_zero_initialised_layers_begin_with_zero_again():
    traced = traced_source("resnet18?zero_init_residual=true")
    result = reset_hypothesis(traced, surgery.split_masks(traced, 0.5))
    assert (result.layer1[0].bn2.weight[32:] == 0).all()
    assert (result.layer1[0].bn1.weight[32:] == 1).all()


def test_the_authors_variant_draws_weights_by_their_fan_and_keeps_everything_else():
    traced = net()
    masks = surgery.split_masks(traced, 0.5)
    result, old = reset_hypothesis(traced, masks, initialiser="authors", seed=1), named_tensors(traced)
    fans = {"conv.weight": 27, "last.weight": 8, "head.weight": 8}
    for name, tensor in named_tensors(result).items():
        if name in fans:
            assert torch.equal(tensor == old[name], masks[name])
            assert tensor[~masks[name]].abs().max() <= 1 / math.sqrt(fans[name])
        else:
            assert torch.equal(tensor, old[name]), name
    large = traced_source("resnet18", random=False)
    drawn = reset_hypothesis(large, nothing(large), initialiser="authors").layer4[1].conv2.weight
    assert drawn.std().item() == pytest.approx(1 / math.sqrt(3 * 512 * 9), rel=0.01)
    assert same(reset_hypothesis(traced, masks, initialiser="authors", weights=False), traced)


def test_what_does_not_fit_is_refused(monkeypatch):
    traced = net()
    with pytest.raises(surgery.UsageError, match="unknown initialiser 'author'; did you mean 'authors'"):
        reset_hypothesis(traced, {}, initialiser="author")
    with pytest.raises(surgery.UsageError, match="unknown way with unknown parameters 'drop'"):
        reset_hypothesis(traced, {}, unknown="drop")
    with pytest.raises(surgery.UsageError, match="seed must be a whole number of at least 0, not -1"):
        reset_hypothesis(traced, {}, seed=-1)
    with pytest.raises(surgery.UsageError, match=r"unknown parameter 'conv\.weigth'; did you mean 'conv.weight'"):
        reset_hypothesis(traced, {"conv.weigth": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(surgery.UsageError, match=r"mask of 'conv.bias' has shape \(1,\), not \(8,\)"):
        reset_hypothesis(traced, {"conv.bias": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(surgery.UsageError, match=r"mask of 'conv.bias' must hold bools, not torch.float32"):
        reset_hypothesis(traced, {"conv.bias": torch.ones(8)})
    with pytest.raises(surgery.UsageError, match="not a traced module"):
        reset_hypothesis(Net(), {})
    many = surgery.trace(Bare(), torch.zeros(2, 3))
    with pytest.raises(surgery.UsageError, match="initialise p0, p1, p2, p3, p4, p5, p6, p7 and 1 more: trace with"):
        reset_hypothesis(many, nothing(many))
    slim = surgery.slim(traced, 0.5)
    turns = iter([Net, Bare])
    with pytest.raises(surgery.UsageError, match="what is passed as fresh= must build the same model each time"):
        reset_hypothesis(slim, nothing(slim), fresh=lambda: next(turns)())
    monkeypatch.setitem(sys.modules, "tests_of_reset", sys.modules[__name__])
    sourced = surgery.trace(Net(bare=True), X, source="tests_of_reset:Net?bare=true")
    with pytest.raises(surgery.UsageError, match="would import and run code: pass trust=True"):
        reset_hypothesis(sourced, nothing(sourced))
    assert (reset_hypothesis(sourced, nothing(sourced), trust=True).scale == 0.5).all()


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        for k in range(9):
            self.register_parameter(f"p{k}", nn.Parameter(torch.rand(3)))

    def forward(self, x):
        return x + sum(getattr(self, f"p{k}") for k in range(9))


def test_initialisers_that_draw_by_numpy_or_python_follow_the_seed_and_their_states_stay():
    traced = net()

    def fresh():
        new = Net()
        with torch.no_grad():
            new.head.weight.copy_(torch.from_numpy(np.random.randn(4, 8)))
            new.head.bias.fill_(random.random())
        return new

    numpys, pythons = np.random.get_state(), random.getstate()
    one, again, other = (reset_hypothesis(traced, nothing(traced), seed=seed, fresh=fresh).head for seed in (1, 1, 2))
    assert random.getstate() == pythons
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpys, strict=True))
    assert torch.equal(one.weight, again.weight)
    assert torch.equal(one.bias, again.bias)
    assert not torch.equal(one.weight, other.weight)
    assert not torch.equal(one.bias, other.bias)


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        ("resnet18", "fresh= is a new model or a function that makes one, not 'resnet18'"),
        (lambda: 3, "the function passed as fresh= must return a module, not 3"),
        (nn.Linear(2, 2), "what is passed as fresh= is another model: it has none of the parameters' names"),
    ],
    ids=["a name", "a number", "another model"],
)
def test_what_is_no_new_model_is_refused(fresh, message):
    with pytest.raises(surgery.UsageError, match=message):
        reset_hypothesis(net(), nothing(net()), fresh=fresh)


class ByData(nn.Linear):
    """What it draws depends on the data of a parameter that is kept."""

    def reset_parameters(self):
        super().reset_parameters()
        if self.bias.sum().item() > 0:
            self.weight.data.zero_()


def test_what_a_class_cannot_draw_without_data_is_refused_by_name():
    traced = surgery.trace(nn.Sequential(ByData(4, 4), nn.Linear(4, 2)), torch.zeros(2, 4))
    masks = {name: mask for name, mask in nothing(traced).items() if name.endswith("weight")}
    with pytest.raises(surgery.UsageError, match=r"nothing says how to initialise 0\.weight: trace with"):
        reset_hypothesis(traced, masks)
    result = reset_hypothesis(traced, masks, unknown="keep")
    assert torch.equal(result.get_parameter("0.weight"), traced.get_parameter("0.weight"))
    assert not torch.equal(result.get_parameter("1.weight"), traced.get_parameter("1.weight"))
