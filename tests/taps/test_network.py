"""Taps: values out of a training graph as hooks see them, what classifiers read, and where stages end."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery import models as catalogue
from surgery.errors import EditError, UsageError
from surgery.graph.traced import info
from surgery.taps.network import TappedNetwork, names_of
from surgery.taps.stages import align_stages
from surgery.taps.tapped_modules import observe_taps, truncate_to
from tests.zoo import BranchesOnMode, build_family, randomised, traced_of


def tap(module, where):
    """A copy of a traced module that returns ``(output, values)`` in training, with the outputs of some layers."""
    network = TappedNetwork(module, "module", mode="training")
    result = observe_taps(network, [[network.tap(name) for name in names_of(module, where)]], [None])
    end = result.graphs[-1].output_node()
    output, (values,) = end.args[0]
    end.args = ((output, values),)
    result.recompile()
    return result


def hooked(model: nn.Module, names: list[str], x: Any) -> tuple[Any, list[torch.Tensor]]:
    """The output of a model in training, and copies of its modules' outputs."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: found.update({name: out.clone()})
        )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        output = model.train()(x)
    return output, [found[name] for name in names]


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items()}


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer1", "layer2.0", "layer4", "avgpool"]),
        ("mobilenet_v3_small", ["features.3", "features.4.block.2", "features", "avgpool"]),
        ("densenet121", ["features.denseblock1.denselayer1", "features.transition2", "features.pool0"]),
        ("vision transformer", ["encoder.layers.encoder_layer_0", "encoder"]),
        ("swin", ["features.0", "features.2", "features.1.1"]),
        ("googlenet", ["inception4a", "inception5b", "aux1.conv"]),
    ],
)
def test_values_and_outputs_in_training_are_those_that_hooks_see(name, layers):
    family = build_family(name)
    plain = copy.deepcopy(family.model)
    output, values = hooked(plain, layers, family.x)
    tapped = tap(family.traced, layers)
    assert not tapped.training
    assert torch.equal(tapped(family.x), family.traced(family.x))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        own_output, own_values = tapped.train()(family.x)
    assert type(own_output) is type(output)
    for a, b in zip(own_output, output, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert [v.shape for v in own_values] == [v.shape for v in values]
    for a, b in zip(own_values, values, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()
    assert list(tapped.state_dict()) == list(family.traced.state_dict())
    for a, b in zip(tapped.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Overwritten(nn.Module):
    """Values that later ops change in place, and a layer behind norm and activation."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)
        self.norm, self.act, self.head = nn.BatchNorm2d(4), nn.GELU(), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        a, b = self.a(x), self.act(self.norm(self.b(x)))
        c = a * 3.0
        a.mul_(2.0)
        b += c
        return self.head((a + b).mean((2, 3)))


def test_a_value_is_handed_out_before_it_is_changed_in_place():
    model, x = Overwritten(), torch.randn(2, 3, 4, 4)
    tapped = tap(surgery.trace(model, x), ["a", "b"]).train()
    model.train()
    output, (a, b) = tapped(x)
    read = model.stem(x).relu()
    assert torch.equal(a, model.a(read))
    assert torch.equal(b, F.gelu(model.norm(model.b(read))))
    torch.testing.assert_close(output, model(x))
    (a.sum() + b.square().sum() + output.sum()).backward()
    assert all(p.grad is not None for p in tapped.parameters())


def test_nothing_that_is_given_is_changed_or_shared():
    traced, x = traced_of(Overwritten, 2, 3, 4, 4)
    traced.norm.train()
    before, graph, modes = tensors_of(traced), str(traced.graph), [m.training for m in traced.modules()]
    state = torch.get_rng_state()
    tapped = tap(traced, "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in tapped.modules()] == modes
    tapped.train()(x)
    assert all(torch.equal(t, before[n]) for n, t in traced.state_dict().items())
    assert (str(traced.graph), traced.train_graph) == (graph, None)
    assert [m.training for m in traced.modules()] == modes
    assert not storages(traced) & storages(tapped)


def test_a_tapped_module_is_copied_saved_and_operated_on():
    model = randomised(Overwritten()).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    tapped = tap(surgery.trace(model, x, source="own:Overwritten"), "b").train()
    expected = tapped(x)[1][0]
    file = io.BytesIO()
    torch.save(tapped, file)
    file.seek(0)
    for other in (copy.deepcopy(tapped), torch.load(file, weights_only=False), torch.compile(tapped, backend="eager")):
        assert torch.equal(other(x)[1][0], expected)
    for graph in tapped.graphs:
        graph.lint()
    assert info(tapped).source is None  # saved, it would be rebuilt without its taps
    (_, (first,)), (second,) = tap(tapped, "stem").train()(x)
    assert torch.equal(first, expected)
    assert torch.equal(second, tapped.stem(x).relu())
    wide = surgery.widen(tapped.eval(), {"stem": 8})
    torch.testing.assert_close(wide(x), tapped(x))
    torch.testing.assert_close(wide.train()(x)[1][0], expected)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    tapped = tap(surgery.trace(Tied(), torch.randn(2, 4)), "a")
    assert tapped.a.weight is tapped.b.weight


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("covn", UsageError, "unknown layer 'covn'; did you mean 'conv'?"),
        ("late", EditError, "the output of 'late' in the module is not computed in training"),
        (
            "part.conv",
            EditError,
            "the output of 'part.conv' in the module is inside of a part that is traced on its own: name a layer or "
            "container around it",
        ),
    ],
)
def test_a_layer_that_cannot_be_tapped_is_an_error_that_says_why(name, error, text):
    with pytest.raises(error) as raised:
        tap(surgery.trace(BranchesOnMode("late"), torch.randn(2, 3, 4, 4)), name)
    assert str(raised.value) == text


def test_a_part_with_graphs_of_its_own_is_tapped_in_its_training_graph():
    x = torch.randn(2, 3, 4, 4)
    tapped = tap(surgery.trace(BranchesOnMode("late"), x), "part").train()
    assert torch.equal(tapped(x)[1][0], tapped.part.conv(x))


# ---------------------------------------------------------------------------------------------------------------------
# What the classifier reads


def computed(network: TappedNetwork, value: Any, x: Any) -> torch.Tensor:
    (result,) = truncate_to(network, [value])(x)
    return result


@pytest.mark.parametrize(
    ("name", "classifier", "before"),
    [
        ("resnet18", "fc", None),
        ("mobilenet_v3_small", "classifier.3", "classifier.2"),
        ("densenet121", "classifier", None),
        ("vision transformer", "heads.head", None),
        ("swin", "head", None),
        ("googlenet", "fc", "dropout"),
        ("squeezenet1_1", "classifier.1", "classifier.0"),
        ("swin 3d", "head", None),
        ("convnext", "classifier.2", None),
    ],
)
def test_the_embedding_is_what_the_classifier_reads_before_dropout(name, classifier, before):
    family = build_family(name)
    read = {}
    whole = copy.deepcopy(family.model)
    whole.get_submodule(before or classifier).register_forward_pre_hook(lambda _, args: read.update(x=args[0].clone()))
    for mode in ("evaluation", "training"):
        network = TappedNetwork(family.traced.train(mode == "training"), "student", mode=mode)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            logits = whole.train(mode == "training")(family.x)
            torch.manual_seed(3)
            found = computed(network, network.embedding(), family.x)
        expected = read["x"] if read["x"].ndim == 2 else read["x"].mean((2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert network.shape(network.embedding()) == tuple(expected.shape)
        assert network.shape(network.logits()) == tuple(logits[0].shape if isinstance(logits, tuple) else logits.shape)


def test_tokens_are_averaged_into_an_embedding():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.patches(x).flatten(2).mT).mean(1)

    traced, x = traced_of(Tokens, 2, 3, 8, 8)
    network = TappedNetwork(traced, "student", mode="evaluation")
    torch.testing.assert_close(computed(network, network.embedding(), x), traced.patches(x).mean((2, 3)))


def test_networks_without_logits_or_classifier_say_so():
    dense = build_family("lraspp_mobilenet_v3_large").traced
    with pytest.raises(UsageError, match=r"^the output of the teacher is not one tensor of logits \(N, classes\)$"):
        TappedNetwork(dense, "teacher", mode="evaluation").embedding()
    maps = surgery.trace(nn.Conv2d(3, 4, 1), torch.randn(2, 3, 8, 8))
    with pytest.raises(UsageError, match=r"^the output of the teacher is \(2, 4, 8, 8\): logits are \(N, classes\)$"):
        TappedNetwork(maps, "teacher", mode="evaluation").logits()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x):
            return self.a(x) + self.b(x)

    message = "no layer that everything passes through stands last, so there is no classifier: name layers"
    with pytest.raises(EditError, match=f"^{message}$"):
        TappedNetwork(surgery.trace(Two(), torch.randn(2, 4)), "student", mode="training").embedding()


# ---------------------------------------------------------------------------------------------------------------------
# Stages

STAGES = {
    "resnet18": [("layer1", 16), ("layer2", 8), ("layer3", 4), ("layer4", 2)],
    "densenet121": [
        ("features.transition1.conv", 16),
        ("features.transition2.conv", 8),
        ("features.transition3.conv", 4),
        ("features.norm5", 2),
    ],
    "shufflenet_v2_x0_5": [("stage2", 8), ("stage3", 4), ("conv5", 2)],
    "googlenet": [("conv3", 24), ("inception3b", 12), ("inception4e", 6), ("inception5b", 3)],
    "fitnet1": [("layer3.conv", 32), ("layer6.conv", 16), ("layer9.conv", 8)],
    "fitnet_cifar_teacher": [("layer1.conv", 33), ("layer2.conv", 15), ("layer3.conv", 9)],
}
"""The output's name and its height."""


@pytest.mark.parametrize("name", STAGES)
def test_stages_end_where_the_resolution_falls(name):
    if name.startswith("fitnet"):
        traced = surgery.trace(catalogue.build(name, seed=0).eval(), catalogue.example_inputs(name))
    else:
        traced = build_family(name).traced
    for mode in ("evaluation", "training"):
        network = TappedNetwork(traced, "student", mode=mode)
        ends = network.stages()
        assert [(end.name, network.layout(end).sizes[0]) for end in ends] == STAGES[name]
        assert [end.nodes for end in ends] == [network.tap(end.name).nodes for end in ends]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("vision transformer", [(17, 24)]),
        ("swin", [(10, 8, 12), (24, 5, 4)]),
        ("mobilenet_v3_small", [(72, 16, 16), (96, 8, 8), (288, 4, 4), (576, 2, 2)]),
        ("lraspp_mobilenet_v3_large", [(64, 32, 32), (72, 16, 16), (40, 8, 8)]),
    ],
)
def test_stages_of_tokens_and_of_dense_predictors(name, shapes):
    network = TappedNetwork(build_family(name).traced, "student", mode="training")
    assert [network.layout(end).shape for end in network.stages()] == shapes


def test_a_network_without_maps_has_no_stages():
    traced = surgery.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(2, 4))
    with pytest.raises(EditError, match=r"^no stage of maps or tokens that everything passes through: name layers$"):
        TappedNetwork(traced, "student", mode="training").stages()


class Padded(nn.Module):
    """A map that is padded before it is made smaller."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.pad(self.b(self.a(x)).relu(), (0, 1, 0, 1))
        return self.head(self.c(x).relu().mean((2, 3)))


def test_a_stage_ends_before_padding():
    network = TappedNetwork(surgery.trace(Padded(), torch.randn(2, 3, 7, 7)), "student", mode="training")
    assert [network.layout(end).shape for end in network.stages()] == [(4, 7, 7), (6, 4, 4)]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([64, 16, 4], [64, 16, 4], ([64, 16, 4], [64, 16, 4])),
        ([16], [256, 64, 16, 4], ([16], [16])),
        ([64, 16, 4], [16, 4], ([16, 4], [16, 4])),
        ([1024, 256, 64], [1089, 225, 81], ([1024, 256, 64], [1089, 225, 81])),
        ([8], [16, 4], ([8], [4])),
        ([1000, 900], [1, 10, 100], ([1000, 900], [10, 100])),
    ],
)
def test_stages_are_paired_where_their_sizes_agree_best(ours, theirs, expected):
    first, second = align_stages(ours, theirs)
    assert (ours[first], theirs[second]) == expected
