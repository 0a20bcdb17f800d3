"""Hints: truncated networks, regressors for every two shapes, and a student that comes out as it went in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery
from surgery import models as catalogue
from surgery.counting.cost import weight_macs
from surgery.errors import EditError, UsageError
from surgery.graph.tracing import TracedModule
from surgery.layers.maxout import Maxout
from surgery.taps.hints import HintPair, hint_loss
from tests.zoo import BranchesOnMode, Family, build_family, randomised


def named(source: str) -> nn.Module:
    return surgery.trace(catalogue.build(source, seed=0).eval(), catalogue.example_inputs(source))


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Maps(nn.Module):
    """Two convolutions to a map of ``size``, and a head."""

    def __init__(self, channels: int, size: int | tuple[int, ...], act: Any = nn.ReLU, rank: int = 2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.stem, self.pool = conv(3, 4, 3, padding=1), (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
                                                          F.adaptive_avg_pool3d)[rank - 1]  # fmt: skip
        self.size, self.act = size, act() if act else None
        self.conv = conv(4, channels * getattr(self.act, "pieces", 1), 1)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.conv(self.pool(self.stem(x).relu(), self.size))
        x = x if self.act is None else self.act(x)
        return self.head(x.flatten(2).mean(2))


class Tokens(nn.Module):
    """Patches as tokens, with or without a class token before them."""

    def __init__(self, width: int, patch: int, first: bool):
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, width, patch, patch), first
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.mlp, self.head = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        if self.first:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head((x + self.mlp(x)).mean(1))


class LastMaps(nn.Module):
    """Maps with the channels last."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.patches, self.mlp, self.head = (
            nn.Conv2d(3, width, patch, patch),
            nn.Linear(width, width),
            nn.Linear(width, 5),
        )

    def forward(self, x):
        return self.head(F.gelu(self.mlp(self.patches(x).permute(0, 2, 3, 1))).mean((1, 2)))


def lowers_the_loss(pair: HintPair, x: torch.Tensor) -> bool:
    """Whether a step along the gradient lowers the hint loss on the batch, for some length of the step."""
    pair.train()
    pair.zero_grad()
    before = pair.loss(x)
    before.backward()
    with torch.no_grad():
        moved = [(p, p.detach().clone(), p.grad) for p in pair.student.parameters()]
        for rate in (1e-3 * 0.1**k for k in range(6)):
            for parameter, old, gradient in moved:
                parameter.copy_(old - rate * gradient)
            if pair.loss(x) < before:
                return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# The paper's own pairs


@pytest.mark.parametrize(
    ("student", "guided", "teacher", "kernel", "channels", "weights"),
    [
        ("fitnet1", "layer6", "fitnet_cifar_teacher", (2, 2), 32, 2 * 2 * 32 * 192 * 2),
        ("fitnet4", "layer11", "fitnet_cifar_teacher", (2, 2), 80, 122_880),
        ("fitnet_mnist", "layer4", "fitnet_mnist_teacher", (1, 1), 16, 16 * 48 * 2),
    ],
)
def test_the_papers_pairs_have_the_papers_regressor(student, guided, teacher, kernel, channels, weights):
    pair = surgery.attach_hint(named(student), named(teacher), guided, "layer2")
    assert isinstance(pair.regressor, nn.Sequential)
    conv, act = pair.regressor
    assert (conv.kernel_size, conv.stride, conv.padding, conv.in_channels) == (kernel, (1, 1), (0, 0), channels)
    assert conv.weight.numel() == weights
    assert isinstance(act, Maxout)
    assert act.pieces == 2


@pytest.mark.parametrize(
    ("student", "teacher", "names"),
    [
        ("fitnet1", "fitnet_cifar_teacher", ("layer6", "layer2")),
        ("fitnet_mnist", "fitnet_mnist_teacher", ("layer4", "layer2")),
        ("fitnet_30m_9", "fitnet_cifar_teacher", ("layer5", "layer2")),
        ("fitnet_30m_7", "fitnet_cifar_teacher", ("layer4", "layer2")),
    ],
)
def test_the_middle_is_taken_by_default_where_the_paper_takes_it(student, teacher, names):
    pair = surgery.attach_hint(named(student), named(teacher))
    assert pair.names == (names,)


def test_a_fully_connected_regressor_has_the_papers_number_of_weights():
    x = images(2, 3, 8, 8)
    student, teacher = surgery.trace(Maps(4, (4, 3)), x), surgery.trace(Maps(6, (3, 2), lambda: Maxout(3)), x)
    pair = surgery.attach_hint(student, teacher, "conv", "conv", regressor="fc")
    assert pair.regressor.get_submodule("linear").weight.numel() == 4 * 3 * 4 * 3 * 2 * 6 * 3
    assert pair.student(x).shape == pair.teacher(x).shape == (2, 6, 3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Regressors for every two shapes

CASES = {
    "a valid convolution": (Maps(4, (5, 7)), Maps(6, (4, 5)), nn.Conv2d, (2, 3), (1, 1)),
    "equal sizes": (Maps(4, 5), Maps(6, 5), nn.Conv2d, (1, 1), (1, 1)),
    "a factor down": (Maps(4, (8, 6)), Maps(6, (2, 6)), nn.Conv2d, (4, 1), (4, 1)),
    "a factor and a valid kernel": (Maps(4, (8, 7)), Maps(6, (4, 5)), nn.Conv2d, (2, 3), (2, 1)),
    "a factor up": (Maps(4, (2, 3)), Maps(6, (8, 3)), nn.ConvTranspose2d, (4, 1), (4, 1)),
    "resized up": (Maps(4, (4, 4)), Maps(6, (7, 7)), nn.Conv2d, (1, 1), (1, 1)),
    "resized both ways": (Maps(4, (8, 2)), Maps(6, (4, 4)), nn.Conv2d, (1, 1), (1, 1)),
    "pooled": (Maps(4, 24), Maps(6, 11), nn.Conv2d, (1, 1), (1, 1)),
    "pooled by a factor": (Maps(4, 18), Maps(6, 2), nn.Conv2d, (1, 1), (1, 1)),
    "tokens to a map": (Tokens(4, 4, False), Maps(6, 3), nn.Conv2d, (4, 4), (1, 1)),
    "class token and all to a map": (Tokens(4, 4, True), Maps(6, 3), nn.Conv2d, (4, 4), (1, 1)),
    "a map to tokens": (Maps(4, 12), Tokens(6, 4, True), nn.Conv2d, (2, 2), (2, 2)),
    "tokens to other tokens": (Tokens(4, 4, True), Tokens(6, 8, True), nn.Conv2d, (2, 2), (2, 2)),
    "tokens to as many": (Tokens(4, 4, True), Tokens(6, 4, True), nn.Linear, None, None),
    "tokens without a class token": (Tokens(4, 4, True), Tokens(6, 4, False), nn.Linear, None, None),
    "a map with channels last": (LastMaps(4, 4), Maps(6, 3), nn.Conv2d, (2, 2), (2, 2)),
    "to a map with channels last": (Maps(4, 12), LastMaps(6, 4), nn.Conv2d, (2, 2), (2, 2)),
    "channels last in both": (LastMaps(4, 4), LastMaps(6, 4), nn.Linear, None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_regressor_leads_from_any_shape_to_any_other(case):
    student, teacher, layer, kernel, stride = CASES[case]
    x = images(2, 3, 24, 24)
    taps = {Maps: "conv", Tokens: "mlp", LastMaps: "mlp"}
    before, behind = surgery.trace(student, x), surgery.trace(teacher, x)
    ours, theirs = ("conv" if case.endswith("sizes") else taps[type(m)] for m in (student, teacher))
    pair = surgery.attach_hint(before, behind, ours, theirs)
    assert pair.student(x).shape == pair.teacher(x).shape
    learned = [m for m in pair.regressor.modules() if any(True for _ in m.parameters(recurse=False))]
    assert [type(m) for m in learned] == [layer]
    if kernel is not None and "token" not in case and "last" not in case:
        assert (learned[0].kernel_size, learned[0].stride) == (kernel, stride)
    assert lowers_the_loss(pair, x)
    assert pair.loss(images(3, 3, 24, 24)).isfinite()  # of another batch size


def test_the_channels_are_those_that_layers_read_where_neither_axis_can_be_edited():
    x = images(2, 5, 16)
    layers = (nn.TransformerEncoderLayer(16, 2, width, batch_first=True) for width in (32, 48))
    student, teacher = (
        surgery.trace(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), x) for layer in layers
    )
    pair = surgery.attach_hint(student, teacher, "layers.0", "layers.0")
    assert repr(pair.regressor[0]) == "Linear(in_features=16, out_features=16, bias=True)"


@pytest.mark.parametrize("rank", [1, 3])
def test_maps_of_other_ranks_are_convolved_in_their_own(rank):
    sizes = {1: (9, 7), 3: ((4, 5, 6), (2, 5, 4))}[rank]
    x = images(2, 3, *(8,) * rank)
    student, teacher = (surgery.trace(Maps(c, s, rank=rank), x) for c, s in zip((4, 6), sizes, strict=True))
    pair = surgery.attach_hint(student, teacher, "conv", "conv")
    conv = pair.regressor.get_submodule("conv")
    assert type(conv) is {1: nn.Conv1d, 3: nn.Conv3d}[rank]
    assert conv.kernel_size == {1: (3,), 3: (2, 1, 3)}[rank]
    assert pair.student(x).shape == pair.teacher(x).shape


def test_vectors_and_maps_lead_to_each_other():
    x = images(2, 3, 8, 8)
    student, teacher = surgery.trace(Maps(4, 2), x), surgery.trace(Maps(6, 3), x)
    for guided, hint, layer in (
        ("head", "conv", nn.ConvTranspose2d),
        ("conv", "head", nn.Conv2d),
        ("head", "head", nn.Linear),
    ):
        pair = surgery.attach_hint(student, teacher, guided, hint)
        assert type(next(m for m in pair.regressor if any(True for _ in m.parameters()))) is layer
        assert pair.student(x).shape == pair.teacher(x).shape


ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "GELU": lambda: nn.GELU("tanh"),
    "SiLU": lambda: nn.SiLU(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(0.3),
    "Maxout": lambda: Maxout(4),
    "": None,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_regressor_ends_in_the_teachers_non_linearity(name):
    x = images(2, 3, 8, 8)
    act = ACTIVATIONS[name]
    pair = surgery.attach_hint(
        surgery.trace(Maps(4, 5), x), surgery.trace(Maps(6, 4, act), x), "conv", "act" if act else "conv"
    )
    layers = list(pair.regressor)
    assert [type(m).__name__ for m in layers] == ["Conv2d", name][: 2 if name else 1]
    assert layers[0].out_channels == (24 if name == "Maxout" else 6)
    if act:
        assert repr(layers[1]).replace(", inplace=True", "") == repr(act()).replace("inplace=True", "")


class Functional(nn.Module):
    """Activations as functions and methods, and what keeps them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 4, 1) for _ in range(4))
        self.pool, self.out = nn.Identity(), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        leaky = F.leaky_relu(self.a(x), 0.2, inplace=True)
        pooled = self.pool(F.dropout(F.max_pool2d(self.b(x).tanh(), 2), 0.5, self.training))
        same = torch.cat([F.gelu(self.c(x)), F.gelu(self.d(x))], 1)
        return leaky.sum() + self.out(pooled).sum() + same.sum()


def test_the_non_linearity_is_found_behind_pools_and_dropout_and_as_a_function():
    x = images(2, 3, 4, 4)
    student, teacher = surgery.trace(Maps(4, 4), x), surgery.trace(Functional(), x)

    def last(hint: str) -> str:
        return repr(surgery.attach_hint(student, teacher, "conv", hint).regressor[-1])

    assert last("a") == "LeakyReLU(negative_slope=0.2)"
    assert last("pool") == "Tanh()"
    assert last("c") == "GELU(approximate='none')"
    assert last("out").startswith("Conv2d(")


def test_without_a_regressor_equal_outputs_are_compared_as_they_are():
    x = images(2, 3, 8, 8)
    student, teacher = surgery.trace(Maps(4, 5), x), surgery.trace(Maps(4, 5, None), x)
    pair = surgery.attach_hint(student, teacher, "conv", "conv", regressor="none")
    assert len(list(pair.regressor.parameters())) == 0
    expected = (pair.student(x) - pair.teacher(x)).square().sum() / (2 * len(x))
    assert pair.loss(x).item() == pytest.approx(expected.item())


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_only_the_prefixes_are_computed_and_held():
    student, teacher = named("resnet18?num_classes=10"), named("resnet34?num_classes=10")
    pair = surgery.attach_hint(student, teacher, "layer2", "layer2")
    for cut, whole in ((pair.student, student), (pair.teacher, teacher)):
        names = [n for n, _ in cut.named_parameters() if "regressor" not in n]
        assert names == [n for n, _ in whole.named_parameters() if n.startswith(("conv1", "bn1", "layer1", "layer2"))]
        macs, own = weight_macs(whole), weight_macs(cut)
        assert own.pop("regressor.conv.weight", 0) == (128 * 128 * 28 * 28 if cut is pair.student else 0)
        assert own == {n: macs[n] for n in names if n in macs}
        assert sum(own.values()) < 0.6 * sum(macs.values())
    assert pair.teacher(images(2, 3, 64, 64)).shape == (2, 128, 8, 8)


def test_what_is_truncated_computes_what_the_network_computes_there():
    family = build_family("resnet18")
    taken = {}
    whole = copy.deepcopy(family.model)
    whole.layer2.register_forward_hook(lambda _, args, out: taken.update(layer2=out.detach().clone()))
    pair = surgery.attach_hint(family.traced, family.traced, "layer2", "layer2", regressor="none")
    for train in (False, True):
        whole.train(train)(family.x)
        pair.train(train)
        assert torch.equal(pair.student(family.x), taken["layer2"])
        assert torch.equal(pair.teacher(family.x), taken["layer2"]) is not train
    assert torch.equal(pair.student.get_buffer("bn1.running_mean"), whole.bn1.running_mean)


class InPlace(nn.Module):
    """Ops that change in place what was computed, named layers among it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.side = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        a = self.first(x)
        a.mul_(2.0)
        a[:, 0].fill_(1.0)
        side = self.side(a).relu_()
        b = self.second(a)
        a.add_(1.0)
        c = self.third(a + b)
        return c + side


def test_ops_in_place_on_the_way_are_kept_and_those_behind_do_no_harm():
    x, model = images(2, 3, 4, 4), InPlace()
    traced = surgery.trace(model, x)
    one = surgery.attach_hint(traced, traced, "second", "second", regressor="none")
    a = model.first(x) * 2.0
    a[:, 0] = 1.0
    assert torch.equal(one.student(x), model.second(a))
    assert "side.weight" not in one.student.state_dict()
    both = surgery.attach_hint(traced, traced, ["first", "third"], ["first", "third"], regressor="none")
    first, third = both.student(x)
    assert torch.equal(first, model.first(x))
    assert torch.equal(third, model.third(a + 1.0 + model.second(a)))


class Branching(nn.Module):
    """Python that looks at sizes, before the layer and behind it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if x.shape[-1] > 6:
            x = x[..., ::2]
        x = self.a(x)
        y = self.b(x)
        return y if y.shape[-2] == 8 else y.mean()


def test_guards_on_the_way_are_kept_and_those_behind_are_not():
    x = images(2, 3, 8, 8)
    traced = surgery.trace(Branching(), x)
    pair = surgery.attach_hint(traced, traced, "a", "a", regressor="none")
    assert pair.student(images(2, 3, 5, 8)).shape == (2, 4, 5, 4)
    with pytest.raises(UsageError, match="the condition is False here and was True"):
        pair.student(images(2, 3, 8, 6))


class Shared(nn.Module):
    """A layer under two names, tied weights, and a buffer outside the state dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.again, self.last = self.b, nn.Conv2d(3, 3, 1)
        self.last.weight = self.a.weight
        self.register_buffer("shift", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.last(self.again(self.a(x) + self.shift).relu())


def test_what_is_shared_stays_shared_and_follows_into_the_restored_student():
    x = images(2, 3, 4, 4)
    student = surgery.trace(Shared(), x)
    pair = surgery.attach_hint(student, student, "b", "b")
    assert pair.student.a.weight is pair.student.get_parameter("b.weight")
    assert "shift" not in pair.student.state_dict()
    with torch.no_grad():
        pair.student.a.weight.fill_(2.0)
        pair.student.shift.fill_(3.0)
    restored = pair.restore(student)
    assert restored.last.weight is restored.a.weight
    assert (restored.last.weight == 2.0).all()
    assert (restored.get_buffer("shift") == 3.0).all()


def test_a_graph_can_be_cut_more_than_once():
    x = images(2, 3, 8, 8)
    traced = surgery.trace(Maps(4, 5), x)
    pair = surgery.attach_hint(traced, traced, "conv", "conv", regressor="none")
    again = surgery.attach_hint(pair.student, pair.student, "stem", "stem", regressor="none")
    assert again.student(x).shape == (2, 4, 8, 8)
    assert list(again.student.state_dict()) == ["stem.weight", "stem.bias"]
    assert isinstance(again.student, TracedModule)


# ---------------------------------------------------------------------------------------------------------------------
# Every family


@pytest.mark.parametrize("as_student", [True, False])
def test_a_model_of_any_family_learns_from_and_teaches_one_of_another(family: Family, as_student: bool):
    x = family.x
    small = ("convnext", "squeezenet1_1") if x.ndim == 4 else ("swin 3d", "r3d")
    other = build_family(small[small[0] == family.name]).model
    pair_of = (family.traced, surgery.trace(other, x))
    student, teacher = pair_of if as_student else pair_of[::-1]
    pair = surgery.attach_hint(student, teacher).train()
    assert pair.student(x).shape == pair.teacher(x).shape
    assert pair.student(x)[0].numel() > 10  # a map or tokens, no scores
    assert lowers_the_loss(pair, x)
    assert [n for n, p in pair.student.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    restored = pair.restore(student)
    assert stored(restored).keys() == stored(student).keys()
    own = stored(pair.student)
    for name, tensor in stored(restored).items():
        assert torch.equal(tensor, own[name] if name in own else stored(student)[name])
    assert surgery.verify(restored, student, x).max_rel > 1e-12


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("vision transformer", "mobilenet_v3_small"),
        ("resnet18", "swin"),
        ("swin", "vision transformer"),
        ("densenet121", "convnext"),
        ("convnext", "googlenet"),
    ],
)
def test_the_restored_student_exports_without_a_trace_of_the_hint(teacher, student, tmp_path):
    ours, theirs = build_family(student), build_family(teacher)
    x = images(2, 3, 96, 96) if student == "googlenet" else images(2, 3, 32, 32)
    before, model = surgery.trace(ours.model.float(), x), surgery.trace(theirs.model.float(), x)
    pair = surgery.attach_hint(before, model)
    assert lowers_the_loss(pair, x)
    restored = pair.restore(before).eval()
    surgery.export_onnx(restored, tmp_path / "student.onnx")
    written = (tmp_path / "student.onnx").read_bytes()
    assert b"regressor" not in written
    assert next(n.encode() for n, _ in restored.named_parameters()) in written
    assert not any("regressor" in node.name for graph in restored.graphs for node in graph.nodes)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in restored.modules())


def test_auxiliary_heads_run_in_training_alone_and_only_if_they_come_before():
    family = build_family("googlenet")
    pair = surgery.attach_hint(family.traced, family.traced, "inception4e", "inception4e").train()
    assert not any(n.startswith("aux") for n in pair.student.state_dict())
    assert pair.student(family.x).shape == pair.teacher(family.x).shape
    assert len(pair.student.graphs) == 2
    assert len(pair.restore(family.traced).train()(family.x)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# The pair


@pytest.fixture
def x() -> torch.Tensor:
    return images(2, 3, 16, 16)


class Normed(nn.Module):
    """Convolutions with BatchNorm and dropout."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1, self.conv2 = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3)
        self.norm2, self.drop, self.conv3 = nn.BatchNorm2d(width), nn.Dropout(0.5), nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.drop(self.norm2(self.conv2(x)).relu())
        return self.head(self.conv3(x).relu().mean((2, 3)))


@pytest.fixture
def student(x) -> nn.Module:
    return surgery.trace(Normed(6), x, source="own:Normed")


@pytest.fixture
def teacher(x) -> nn.Module:
    return surgery.trace(randomised(Normed(8)), x)


def test_the_teacher_is_frozen_in_evaluation_and_gives_no_gradients(student, teacher, x):
    pair = surgery.attach_hint(student, teacher, "drop", "drop").train()
    assert pair.student.training
    assert not any(m.training for m in pair.teacher.modules())
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    x.requires_grad_()
    assert not pair.teacher(x).requires_grad
    before = {n: t.clone() for n, t in stored(pair.teacher).items()}
    pair.loss(x).backward()
    assert all(torch.equal(t, before[n]) for n, t in stored(pair.teacher).items())
    assert all(p.grad is not None for p in pair.student.parameters())
    assert pair(x).requires_grad
    assert torch.equal(pair.teacher(x), pair.teacher(x))


def test_the_loss_is_half_the_squared_distance_of_a_sample():
    guided, hint = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]])
    assert hint_loss(guided, hint).item() == (5.0 + 10.0) / 4
    assert hint_loss((guided, hint), (hint, hint)).item() == (5.0 + 10.0) / 4
    assert hint_loss(guided.half(), hint.half()).dtype == torch.float32
    assert hint_loss(guided.double(), hint.double()).dtype == torch.float64


def test_nothing_that_is_given_is_changed_or_shared(student, teacher, x):
    modules = (student.train(), teacher.eval())
    before = [({n: t.clone() for n, t in stored(m).items()}, [str(g) for g in m.graphs]) for m in modules]
    state = torch.get_rng_state()
    pair = surgery.attach_hint(student, teacher, "conv2", "conv2")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in pair.student.modules())
    optimizer = torch.optim.SGD(pair.parameters(), 0.1)
    pair.loss(x).backward()
    optimizer.step()
    restored = pair.restore(student)
    for module, (tensors, graphs) in zip(modules, before, strict=True):
        assert all(torch.equal(t, tensors[n]) for n, t in stored(module).items())
        assert [str(g) for g in module.graphs] == graphs
        assert all(p.requires_grad for p in module.parameters())
    assert teacher.training is False
    held = {t.untyped_storage().data_ptr() for m in (student, teacher, restored) for t in stored(m).values()}
    assert not held & {t.untyped_storage().data_ptr() for t in stored(pair).values()}


def test_the_restored_student_has_the_prefix_the_statistics_and_the_recipe(student, teacher, x):
    wide = surgery.widen(student, 1.5)
    pair = surgery.attach_hint(wide, teacher, "conv2", "conv2").train()
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.add_(1.0)
    pair.loss(x)
    restored = pair.restore(wide)
    assert torch.equal(restored.conv1.weight, wide.conv1.weight + 1.0)
    assert torch.equal(restored.conv3.weight, wide.conv3.weight)
    assert torch.equal(restored.norm2.running_mean, pair.student.norm2.running_mean)
    assert not torch.equal(restored.norm2.running_mean, wide.norm2.running_mean)
    assert surgery.recipe(restored) == surgery.recipe(wide)
    assert surgery.widen(restored, 1.5).conv1.weight.shape[0] == 14


def test_several_pairs_are_one_loss(student, teacher, x):
    several = surgery.attach_hint(student, teacher, {"conv1": "conv2", "drop": "conv1"}, seed=3)
    assert several.names == (("conv1", "conv2"), ("drop", "conv1"))
    assert [tuple(t.shape) for t in several.student(x)] == [tuple(t.shape) for t in several.teacher(x)]
    assert isinstance(several.regressor, nn.ModuleList)
    first = copy.deepcopy(several.regressor)
    several.eval()
    each = [hint_loss(g, h).item() for g, h in zip(several.student(x), several.teacher(x), strict=True)]
    assert several.loss(x).item() == pytest.approx(sum(each))
    assert lowers_the_loss(several, x)
    listed = surgery.attach_hint(student, teacher, ["conv1", "drop"], ["conv2", "conv1"], seed=3)
    assert torch.equal(listed.regressor[1].conv.weight, first[1].conv.weight)
    assert set(dict(several.restore(student).named_modules())) == set(dict(student.named_modules()))


def test_a_pair_can_be_copied_moved_and_compiled(student, teacher, x):
    pair = surgery.attach_hint(student, teacher, "conv2", "conv2", seed=5).eval()
    expected = pair.loss(x)
    twin = copy.deepcopy(pair)
    assert torch.equal(twin.loss(x), expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in pair.parameters()}
    assert twin.regressor is twin.student.get_submodule("regressor")
    assert twin.double().loss(x.double()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.compile(pair, backend="eager")(x).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(twin.float().restore(student).conv1.weight, student.conv1.weight)


def test_regressors_follow_the_students_dtype_and_the_seed(teacher, x):
    student = surgery.trace(Normed(6).double(), x.double())
    pair = surgery.attach_hint(student, surgery.trace(Normed(8).double(), x.double()), "conv2", "conv2")
    assert {p.dtype for p in pair.regressor.parameters()} == {torch.float64}
    one, two, three = (
        surgery.attach_hint(teacher, teacher, "conv2", "conv2", seed=s).regressor.state_dict() for s in (1, 1, 2)
    )
    assert torch.equal(one["conv.weight"], two["conv.weight"])
    assert not torch.equal(one["conv.weight"], three["conv.weight"])


def test_the_regressors_name_is_free_in_the_student(teacher, x):
    class Named(Normed):
        def __init__(self):
            super().__init__(6)
            self.regressor = nn.Identity()

        def forward(self, x):
            return self.regressor(super().forward(x))

    student = surgery.trace(Named(), x)
    pair = surgery.attach_hint(student, teacher, "conv2", "conv2")
    assert any(n.startswith("regressor_0.") for n in pair.student.state_dict())
    assert pair.restore(student)(x).shape == (2, 5)


def test_networks_traced_with_other_batches_or_sizes_are_compared_on_the_students_inputs():
    student = surgery.trace(Maps(4, 5), images(3, 3, 8, 8))
    teacher = surgery.trace(nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 6, 1)), images(2, 3, 32, 32))
    pair = surgery.attach_hint(student, teacher, "stem", "0")
    x = images(3, 3, 8, 8)
    assert pair.student(x).shape == pair.teacher(x).shape == (3, 6, 3, 3)
    with pytest.raises(
        UsageError, match=r"the regressor gives \(2, 6, 11, 11\) and the hint is \(2, 6, 7, 7\): attach"
    ):
        pair.loss(images(2, 3, 16, 16))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_a_part_with_graphs_of_its_own_is_a_layer():
    x = images(2, 3, 4, 4)
    traced = surgery.trace(BranchesOnMode("aux"), x)
    pair = surgery.attach_hint(traced, traced, "part", "part", regressor="none")
    assert list(pair.student.state_dict()) == ["part.conv.weight", "part.conv.bias"]
    assert torch.equal(pair.eval().student(x), pair.train().student(x) * 2)


@pytest.mark.parametrize(
    ("guided", "hint", "error", "text"),
    [
        ("covn", "conv", UsageError, "unknown layer 'covn'; did you mean 'conv'?"),
        (
            "part.conv",
            "conv",
            EditError,
            "the output of 'part.conv' in the student is inside of a part that is traced on ",
        ),
        ("aux", "conv", EditError, "the output of 'aux' in the student is not computed in training and evaluation"),
        ("conv", "aux", EditError, "the output of 'aux' in the teacher is not computed in evaluation"),
        (["conv", "part"], "conv", UsageError, "2 guided layers for 1 hints: each pair needs one of both"),
        ([], [], UsageError, "0 guided layers for 0 hints"),
        ({"conv": "conv"}, "conv", UsageError, "a mapping from guided layers to hints names both: leave out hint="),
    ],
)
def test_a_layer_that_cannot_be_taken_is_an_error_that_says_why(guided, hint, error, text):
    traced = surgery.trace(BranchesOnMode("aux"), images(2, 3, 4, 4))
    with pytest.raises(error) as raised:
        surgery.attach_hint(traced, traced, guided, hint)
    assert str(raised.value).startswith(text)


def test_a_regressor_that_cannot_be_is_an_error_that_says_why():
    x = images(2, 3, 8, 8)
    small, large = surgery.trace(Maps(4, 4), x), surgery.trace(Maps(6, 5), x)
    with pytest.raises(UsageError, match=r"^unknown regressor 'linear': one of 'auto', 'conv', 'fc', 'none'$"):
        surgery.attach_hint(small, large, "conv", "conv", regressor="linear")
    with pytest.raises(EditError) as raised:
        surgery.attach_hint(small, large, "conv", "conv", regressor="conv")
    assert str(raised.value) == (
        "the hint (6 x 5 x 5) is larger than the guided output (4 x 4 x 4): no valid convolution reaches it; use "
        "regressor='auto'"
    )
    with pytest.raises(
        EditError, match=r"^the guided output is 4 x 4 x 4 and the hint 6 x 5 x 5: only equal ones need no"
    ):
        surgery.attach_hint(small, large, "conv", "conv", regressor="none")


def test_a_valid_convolution_of_any_size_can_be_asked_for():
    x = images(2, 3, 24, 24)
    pair = surgery.attach_hint(
        surgery.trace(Maps(4, 24), x), surgery.trace(Maps(6, 12), x), "conv", "conv", regressor="conv"
    )
    assert pair.regressor.get_submodule("conv").kernel_size == (13, 13)
    vectors = surgery.attach_hint(
        surgery.trace(Maps(4, 24), x), surgery.trace(Maps(6, 12), x), "head", "head", regressor="conv"
    )
    assert type(vectors.regressor[0]) is nn.Linear


def test_networks_without_a_common_input_are_an_error():
    student, teacher = surgery.trace(Maps(4, 5), images(2, 3, 8, 8)), surgery.trace(Branching(), images(2, 3, 4, 4))
    with pytest.raises(UsageError) as raised:
        surgery.attach_hint(student, teacher, "conv", "b")
    assert str(raised.value).startswith(
        "the teacher cannot be called on the student's example inputs [(2, 3, 8, 8)], so there is nothing to compare: "
    )


def test_of_names_as_short_for_the_middle_the_first_is_taken_in_every_process():
    letters = "abcdefghijklmnop"
    for k in range(8):
        layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
        net = nn.Sequential()
        for letter, layer in zip((letters[k], letters[k + 8], "z"), layers, strict=True):
            net.add_module(letter, layer)
        traced = surgery.trace(net, images(2, 8))
        assert surgery.attach_hint(traced, traced).names == ((letters[k], letters[k]),)


def test_a_network_without_a_middle_is_an_error():
    x = images(2, 8)
    one, deep = (surgery.trace(nn.Sequential(*(nn.Linear(8, 8) for _ in range(k))), x) for k in (1, 4))
    with pytest.raises(UsageError, match="no layer in the middle that everything passes through: name the layers"):
        surgery.attach_hint(one, deep)
    pair = surgery.attach_hint(deep, deep)
    assert pair.names == (("1", "1"),)


def test_modules_that_are_not_traced_or_in_parts_are_refused():
    class Valued(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

        def forward(self, x):
            x = self.body(x)
            return x * 2 if x.sum() > 0 else x

    x = images(2, 3, 4, 4)
    whole, parts = surgery.trace(Maps(4, 4), x), surgery.trace(Valued(), x)
    with pytest.raises(UsageError, match="the student is traced in parts, so it cannot be cut off"):
        surgery.attach_hint(parts, whole, "body", "conv")
    with pytest.raises(UsageError, match="the teacher is traced in parts"):
        surgery.attach_hint(whole, parts, "conv", "body")
    with pytest.raises(UsageError, match=r"Maps is not a traced module: pass it through surgery.trace first"):
        surgery.attach_hint(Maps(4, 4), whole)


def test_restoring_into_another_student_is_an_error(student, teacher, x):
    pair = surgery.attach_hint(student, teacher, "conv2", "conv2")
    with pytest.raises(UsageError) as raised:
        pair.restore(surgery.widen(student, 1.5))
    assert str(raised.value) == (
        "'conv1.weight' of the guided prefix is (6, 3, 3, 3), and this student has it as (9, 3, 3, 3): pass the "
        "student that the hint was attached to"
    )
    with pytest.raises(UsageError, match="and this student has none: pass the student that the hint was attached to"):
        pair.restore(surgery.trace(Maps(4, 5), x))
