"""One dialect says where: names, containers, globs, classes, predicates and collections of these."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import surgery

SHAPE = (2, 3, 32, 32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return surgery.trace(torchvision.models.resnet18(num_classes=10).eval(), torch.randn(SHAPE))


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(8, 12), nn.ReLU()
        self.second = nn.Linear(12, 8)
        self.pair, self.fc = nn.Bilinear(8, 8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.act(self.first(x)))
        return self.fc(self.pair(x, x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def paired() -> nn.Module:
    return surgery.trace(Paired(), torch.randn(2, 8))


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("layer1.0.conv1", ("layer1.0.conv1",)),
        ("layer3", ("layer3",)),
        ("layer3*", ("layer3",)),
        ("layer[34]", ("layer3", "layer4")),
        ("layer4.*.conv2", ("layer4.0.conv2", "layer4.1.conv2")),
        (nn.Linear, ("fc",)),
        ("nn.Linear", ("fc",)),
        (lambda name, module: isinstance(module, nn.Conv2d) and module.kernel_size == (7, 7), ("conv1",)),
        (["layer3", "layer3.0.conv1", ("fc", nn.Linear)], ("layer3", "layer3.0.conv1", "fc")),
    ],
)
def test_select_lists_what_is_meant(net: nn.Module, where: Any, names: tuple[str, ...]) -> None:
    assert surgery.select(net, where) == names


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layr3", "unknown layer 'layr3'; did you mean 'layer3'"),
        ("layer9*", r"unknown layer 'layer9\*'"),
        (nn.Conv3d, "no layer matches the class Conv3d: there are AdaptiveAvgPool2d, BatchNorm2d, Conv2d"),
        (lambda name, module: False, "no layer matches the predicate <lambda>"),
        (3, "selected by a name, a glob, a module class, a predicate or a collection"),
        (nn.Linear(1, 1), "a collection of these, not Linear"),
        (int, "a class that selects layers is a subclass of nn.Module, not int"),
    ],
)
def test_a_selector_that_matches_nothing_is_refused(net: nn.Module, where: Any, message: str) -> None:
    with pytest.raises(surgery.UsageError, match=message):
        surgery.select(net, where)
    with pytest.raises(surgery.UsageError, match=message):
        surgery.slim(net, {where: 0.5})


def widths(module: nn.Module) -> dict[str, int]:
    return {g.name: g.size for g in surgery.dimension_groups(module)}


@pytest.mark.parametrize("operation", [surgery.slim, surgery.widen])
def test_classes_and_predicates_name_the_groups_that_their_layers_write(
    net: nn.Module, operation: Callable[[nn.Module, Any], nn.Module]
) -> None:
    value = 0.5 if operation is surgery.slim else 2.0
    by_name = operation(net, {"*conv*": value, "*.downsample": value})
    for where in (nn.Conv2d, "nn.Conv2d", lambda _, module: isinstance(module, nn.Conv2d)):
        assert widths(operation(net, {where: value})) == widths(by_name)


def test_a_class_of_containers_is_known_before_tracing() -> None:
    names = surgery.select(torchvision.models.resnet18(), torchvision.models.resnet.BasicBlock)
    assert names == tuple(f"layer{k}.{n}" for k in range(1, 5) for n in range(2))


def test_the_more_specific_selector_decides(net: nn.Module) -> None:
    slim = surgery.slim(
        net, {nn.Conv2d: 0.5, nn.Module: 0.75, "layer4": 0.25, "layer4.*.conv1": 0.125, "layer4.1.conv1": 1.0}
    )
    before, after = widths(net), widths(slim)
    rates = {name: after[name] / size for name, size in before.items()}
    assert rates["layer1.0.conv1"] == 0.5
    assert rates["layer4.0.conv1"] == 0.125
    assert rates["layer4.1.conv1"] == 1.0
    assert rates["layer4.0.conv2"] == 0.25


def test_selectors_of_one_rank_that_disagree_are_refused(net: nn.Module) -> None:
    def convs(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)

    with pytest.raises(surgery.UsageError, match=r"asks for .* of group .*: name .* as well to decide"):
        surgery.slim(net, {convs: 0.5, nn.Conv2d: 0.25})
    with pytest.raises(surgery.UsageError, match=r"asks for 0.25 of group 'layer4.0.conv1', 'layer4.0.conv1' for 0.5"):
        surgery.slim(net, {("conv1", "layer4.0.conv1"): 0.5, "layer4.0.conv1.weight": 0.25})


@pytest.mark.parametrize("where", ["pair", nn.Bilinear, "pai*"])
def test_what_cannot_be_edited_is_refused_with_its_reason(paired: nn.Module, where: Any) -> None:
    with pytest.raises(surgery.EditError, match="pair has no rule"):
        surgery.slim(paired, {where: 0.5})
    with pytest.raises(surgery.EditError, match="pair has no rule"):
        surgery.widen(paired, {where: 2.0})


def test_a_layer_without_channels_names_the_one_that_writes_them(paired: nn.Module) -> None:
    with pytest.raises(surgery.EditError, match=r"'act' cannot be edited: it has no channels of its own; .* 'first'"):
        surgery.slim(paired, {"act": 0.5})


def test_reindex_takes_selectors(net: nn.Module) -> None:
    index = [3, 1, 0]
    one = surgery.reindex(net, {"layer1.0.conv1": index, "layer1.1.conv1": index})
    for where in ("layer1.*.conv1", ("layer1.0.conv1", "layer1.1.conv1")):
        other = surgery.reindex(net, {where: index})
        assert surgery.recipe(other).steps == surgery.recipe(one).steps


@pytest.mark.parametrize(
    ("where", "places"),
    [
        ("layer3*", ["layer3"]),
        ("layer[12]", ["layer1", "layer2"]),
        (("layer1", "layer3.0.conv1"), ["layer1", "layer3.0.conv1"]),
        (nn.MaxPool2d, ["maxpool"]),
        (lambda name, _: name in ("layer1", "layer1.0", "layer2"), ["layer1", "layer2"]),
    ],
)
def test_deepen_takes_selectors(net: nn.Module, where: Any, places: list[str]) -> None:
    deep = surgery.deepen(net, {where: 1})
    steps: Any = surgery.recipe(deep).steps
    assert [step.after for step in steps] == places
    x = torch.randn(SHAPE)
    torch.testing.assert_close(deep.eval()(x), net.eval()(x))


@pytest.mark.parametrize("whole", [["layer3"], "layer3", "layer3.*", lambda name, _: name == "layer3"])
def test_magnitude_masks_keep_a_container_whole(net: nn.Module, whole: Any) -> None:
    masks = surgery.magnitude_masks(net, 0.5, whole=whole)
    kept = {name for name, mask in masks.items() if mask.ndim > 1 and bool(mask.all())}
    assert kept == {name for name, p in net.named_parameters() if p.ndim > 1 and name.startswith("layer3.")}


def test_magnitude_masks_keep_a_class_whole(net: nn.Module) -> None:
    masks = surgery.magnitude_masks(net, 0.5, whole=[nn.Linear, "conv1.weight"])
    assert {n for n, m in masks.items() if m.ndim > 1 and bool(m.all())} == {"fc.weight", "conv1.weight"}


def test_hints_take_selectors(net: nn.Module) -> None:
    pair = surgery.attach_hint(net, net, guided="layer[12]", hint=["layer2", "layer2"])
    assert pair.names == (("layer1", "layer2"), ("layer2", "layer2"))
    assert surgery.attach_hint(net, net, guided={"layer2*": nn.Linear}).names == (("layer2", "fc"),)


@pytest.mark.parametrize("whole", ["layer3", "layer3*", ["layer3.0", "layer3.1"], lambda name, _: name == "layer3"])
def test_reset_hypothesis_keeps_a_container_whole(net: nn.Module, whole: Any) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.fill_(0.5)
    reset = surgery.reset_hypothesis(net, surgery.split_masks(net, 0.5), whole=whole).state_dict()
    same = {name for name, tensor in net.state_dict().items() if torch.equal(tensor, reset[name])}
    assert {name for name in reset if name.startswith("layer3.")} <= same
    assert not {name for name in same if name.startswith("layer2.") and "conv" in name}
    assert "layer2.0.bn1.running_mean" not in same
    with pytest.raises(surgery.UsageError, match="unknown layer or parameter 'layr3'"):
        surgery.reset_hypothesis(net, {}, whole="layr3")
