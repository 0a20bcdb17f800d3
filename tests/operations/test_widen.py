"""Net2Net: what is copied, what is inserted, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery import models as catalogue


@pytest.fixture(scope="module")
def resnet():
    net = catalogue.build("resnet18", num_classes=10, seed=0).double()
    return surgery.trace(net, torch.zeros(2, 3, 32, 32, dtype=torch.float64))


def test_widths_are_factors_for_floats_and_channels_for_ints(resnet):
    wide = surgery.widen(resnet, {"layer1.0.conv1": 96, "layer3": 2.0})
    assert wide.layer1[0].conv1.out_channels == 96
    assert wide.layer3[0].conv1.out_channels == wide.layer3[0].conv2.out_channels == 512
    assert wide.layer2[0].conv1.out_channels == 128


def test_the_first_channels_are_the_old_ones_and_readers_share_copies_out(resnet):
    wide = surgery.widen(resnet, {"layer1.0.conv1": 96}, seed=2)
    (step,) = surgery.recipe(wide).steps
    index = torch.tensor(step.indices["layer1.0.conv1"])
    assert torch.equal(index[:64], torch.arange(64))
    copies = torch.bincount(index, minlength=64)
    old, new = (m.layer1[0] for m in (resnet, wide))
    assert torch.equal(new.conv1.weight, old.conv1.weight[index])
    assert torch.equal(new.bn1.running_mean, old.bn1.running_mean[index])
    assert torch.allclose(new.conv2.weight, old.conv2.weight[:, index] / copies[index].view(-1, 1, 1))


def test_the_same_seed_draws_the_same_copies_whatever_else_is_widened(resnet):
    alone = surgery.recipe(surgery.widen(resnet, {"layer4.1.conv1": 1.5}, seed=1)).steps[0]
    among = surgery.recipe(surgery.widen(resnet, 1.5, seed=1)).steps[0]
    other = surgery.recipe(surgery.widen(resnet, 1.5, seed=2)).steps[0]
    assert alone.indices["layer4.1.conv1"] == among.indices["layer4.1.conv1"]
    assert other.indices["layer4.1.conv1"] != among.indices["layer4.1.conv1"]


def test_uneven_shares_are_exact_and_let_copies_learn_different_things(resnet):
    index = [*range(64), 5]
    shares = [1.0] * 65
    shares[5], shares[64] = 0.3, 0.7
    wide = surgery.reindex(resnet, {"layer1.0.conv1": index}, shares={"layer1.0.conv1": shares})
    assert surgery.verify(wide, resnet, torch.randn(2, 3, 32, 32).double()).max_rel < 1e-10
    wide.train()(torch.randn(4, 3, 32, 32).double()).square().sum().backward()
    gradient = wide.layer1[0].conv1.weight.grad
    assert not torch.allclose(gradient[5], gradient[64])


def test_inserted_layers_train(resnet):
    deep = surgery.deepen(resnet, {"layer2": 1, "layer3.0.conv1": 1})
    old = {n for n, _ in resnet.named_parameters()}
    new = {n: p for n, p in deep.named_parameters() if n not in old}
    assert {n.rsplit(".", 2)[0] for n in new} == {"layer2.2", "layer3.0.conv1_identity0"}
    optimiser = torch.optim.SGD(deep.parameters(), lr=0.01)
    seen = set()
    for _ in range(2):
        optimiser.zero_grad()
        deep.train()(torch.randn(4, 3, 32, 32).double()).square().sum().backward()
        seen |= {n for n, p in new.items() if p.grad.abs().sum() > 0}
        optimiser.step()
    assert seen == set(new)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.ReLU, nn.ReLU6])
def test_deepening_is_exact_behind_any_activation(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    traced = surgery.trace(model.double().eval(), x)
    deep = surgery.deepen(traced, {"0": 2})
    assert surgery.verify(deep, traced, x).max_rel <= 1e-10
    form = surgery.recipe(deep).steps[0].form
    assert form == ("layer" if activation in (nn.ReLU, nn.ReLU6) else "residual")


def test_rectangular_kernels_and_linear_layers_deepen_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, (1, 7), padding=(0, 3)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 64, 10),
        nn.ReLU(),
        nn.Linear(10, 2),
    )
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    traced = surgery.trace(model.double(), x)
    deep = surgery.deepen(traced, ["0", "3"])
    assert [s.kernel for s in surgery.recipe(deep).steps] == [(1, 7), ()]
    assert surgery.verify(deep, traced, x).max_rel <= 1e-10


def test_identity_batch_norm_is_exact_in_float64_also_when_built_in_float32(resnet):
    deep = surgery.deepen(surgery.trace(catalogue.build("resnet18", seed=0), torch.zeros(2, 3, 32, 32)), ["layer1"])
    twin = surgery.trace(catalogue.build("resnet18", seed=0), torch.zeros(2, 3, 32, 32))
    assert surgery.verify(deep, twin, torch.randn(2, 3, 32, 32), dtype=torch.float64).max_rel <= 1e-10


def widths(module: nn.Module) -> dict[str, int]:
    """The new widths of the groups that grew."""
    return {name: len(index) for name, index in surgery.recipe(module).steps[-1].indices.items()}


LAYER3 = ("layer3.0.conv1", "layer3.0.conv2", "layer3.1.conv1")


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        ({"layer3": 2.0}, dict.fromkeys(LAYER3, 512)),
        ({"layer3": 300}, dict.fromkeys(LAYER3, 300)),
        ({"layer3": 2.0, "layer3.0.conv1": 300}, {**dict.fromkeys(LAYER3, 512), "layer3.0.conv1": 300}),
        ({"layer3.0.conv1": 300, "layer3": 2.0}, {**dict.fromkeys(LAYER3, 512), "layer3.0.conv1": 300}),
        ({"layer3.0": 300, "layer3": 2.0}, {**dict.fromkeys(LAYER3, 300), "layer3.1.conv1": 512}),
        ({"layer3": 2.0, "": 1.0}, dict.fromkeys(LAYER3, 512)),
        ({"layer3.*.conv1": 300, "layer3": 2.0}, {**dict.fromkeys(LAYER3, 300), "layer3.0.conv2": 512}),
        ({"layer3.?.conv*": 1.0, "layer3.0.conv*": 300}, {"layer3.0.conv1": 300, "layer3.0.conv2": 300}),
        ({"layer3.0.conv2": 300}, {"layer3.0.conv2": 300}),
        ({"layer3.0.bn2": 300, "layer3.1.conv2": 300}, {"layer3.0.conv2": 300}),
    ],
)
def test_the_most_specific_name_decides(resnet, width, expected):
    wide = surgery.widen(resnet, width)
    assert widths(wide) == expected
    assert surgery.verify(wide, resnet, torch.randn(2, 3, 32, 32).double()).max_rel <= 1e-10


def test_new_widths_are_rounded_up_and_old_ones_stay(resnet):
    assert set(widths(surgery.widen(resnet, 1.1, round_to=48)).values()) == {96, 144, 288, 576}
    assert widths(surgery.widen(resnet, {"layer1.0.conv1": 97, "layer2": 1.0}, round_to=8)) == {"layer1.0.conv1": 104}


def test_widths_of_attention_are_rounded_up_to_whole_heads_that_make_a_multiple():
    net = nn.MultiheadAttention(36, 3, batch_first=True)  # heads of 12
    x = torch.randn(2, 5, 36)
    traced = surgery.trace(Attention(net), x)
    (heads,) = (g for g in surgery.dimension_groups(traced) if g.units == 3 and g.editable)
    wide = surgery.widen(traced, {heads.name: 5 / 3}, round_to=8)
    assert widths(wide) == {heads.name: 6}
    assert wide.get_submodule("layer").out_proj.weight.shape == (36, 72)
    assert surgery.verify(wide, traced, x, dtype=torch.float64).max_rel <= 1e-10


class Attention(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (
            {"layer1.0": 80, "layer1.1": 96},
            "'layer1.0' asks for 80 of group 'conv1', 'layer1.1' for 96: name 'conv1' as",
        ),
        ({"layer1.?.conv1": 96, "layer1.*.conv1": 80}, r"'layer1\.\?\.conv1' asks for 96 of .*: name 'layer1.0.conv1'"),
        ({"conv1": 80, "layer1.0.conv2": 96}, "'layer1.0.conv2' asks for 96 of group 'conv1', 'conv1' for 80$"),
        ({"layer3": 96}, "width of 'layer3.0.conv1' must be at least its 256 channels, not 96$"),
        ({"layer3": 2}, r"must be at least its 256 channels, not 2 \(a factor is a float: 2.0\)"),
        ({"layer3": "2"}, "a width is a factor .* not '2'"),
        ({"layer3": True}, "a width is a factor .* not True"),
        ("1.5", "a width is a factor .* not '1.5'"),
    ],
)
def test_names_that_disagree_and_widths_that_are_none_are_refused(resnet, width, message):
    with pytest.raises(surgery.UsageError, match=message):
        surgery.widen(resnet, width)


def test_the_group_itself_decides_where_containers_disagree(resnet):
    wide = surgery.widen(resnet, {"layer1.0": 80, "layer1.1": 96, "conv1": 70})
    assert widths(wide) == {"conv1": 70, "layer1.0.conv1": 80, "layer1.1.conv1": 96}


def test_round_to_must_be_positive(resnet):
    for step in (0, 1.5, "8"):
        with pytest.raises(surgery.UsageError, match=f"round_to must be a whole number of at least 1, not {step!r}"):
            surgery.widen(resnet, 1.5, round_to=step)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (0.9, "a widening factor must be at least 1, not 0.9"),
        (float("inf"), "a widening factor must be at least 1, not inf"),
        ({"conv1": 32}, "width of 'conv1' must be at least its 64 channels, not 32"),
        ({"cnv1": 2.0}, "unknown layer 'cnv1'; did you mean .*'conv1'"),
        ({"layer9.*": 2.0}, r"unknown layer 'layer9.\*'"),
        ({3: 2.0}, "layers are selected by a name, .*, not 3"),
    ],
)
def test_bad_widths_are_refused(resnet, width, message):
    with pytest.raises(surgery.UsageError, match=message):
        surgery.widen(resnet, width)


def test_bad_places_are_refused(resnet):
    with pytest.raises(surgery.UsageError, match="unknown layer 'layer5'; did you mean 'layer"):
        surgery.deepen(resnet, ["layer5"])
    for count in (0, 1.5, "2", True):
        message = f"the number of layers behind 'layer1' must be a whole number of at least 1, not {count!r}"
        with pytest.raises(surgery.UsageError, match=message):
            surgery.deepen(resnet, {"layer1": count})
    with pytest.raises(surgery.UsageError, match=r"layers are selected by a name, .*, not 3"):
        surgery.deepen(resnet, [3])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "the index of group 'conv1' of 64 units is empty"),
        ([0, 64], r"has an entry outside 0\.\.63"),
        ([-1], r"has an entry outside 0\.\.63"),
    ],
)
def test_bad_indices_are_refused(resnet, index, message):
    with pytest.raises(surgery.UsageError, match=message):
        surgery.reindex(resnet, {"conv1": index})


def test_shares_must_sum_to_one_for_each_unit(resnet):
    with pytest.raises(surgery.UsageError, match="the shares of a unit's copies must sum to 1"):
        surgery.reindex(resnet, {"layer1.0.conv1": [0, 0]}, shares={"layer1.0.conv1": [0.5, 0.6]})
    with pytest.raises(surgery.UsageError, match="1 shares for 2 units"):
        surgery.reindex(resnet, {"layer1.0.conv1": [0, 0]}, shares={"layer1.0.conv1": [1.0]})


def test_outputs_cannot_be_reindexed(resnet):
    with pytest.raises(surgery.EditError, match="group 'fc' cannot be edited: network output"):
        surgery.reindex(resnet, {"fc": [1, 0]})


def test_a_model_without_data_can_be_widened_to_see_what_it_costs():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    traced = surgery.trace(net, torch.randn(2, 4)).to("meta")
    wide = surgery.widen(traced, {"0": 13})
    assert wide.get_parameter("2.weight").shape == (2, 13)
    assert wide.get_parameter("2.weight").device.type == "meta"
