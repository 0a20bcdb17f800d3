"""Identity layers: where they can stand, their kernels, and the BatchNorm behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import DenseNet

import surgery
from surgery import models as catalogue
from tests.zoo import randomised

EXACT = 1e-10


def traced_of(model: nn.Module, *shape: int) -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return surgery.trace(model.double().eval(), x), x


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


CONVS: dict[int, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("form", ["layer", "residual"])
@pytest.mark.parametrize(
    ("rank", "kernel", "expected"),
    [
        (1, None, (5,)),
        (1, 3, (3,)),
        (1, [7], (7,)),
        (2, None, (5, 5)),
        (2, 1, (1, 1)),
        (2, (1, 7), (1, 7)),
        (3, 3, (3, 3, 3)),
        (3, (1, 3, 5), (1, 3, 5)),
    ],
)
def test_identity_convolutions_have_any_odd_kernel(rank, kernel, expected, form):
    conv, norm = CONVS[rank]
    model = nn.Sequential(conv(3, 6, 5, padding=2), norm(6), nn.ReLU(), conv(6, 4, 3))
    traced, x = traced_of(randomised(model), 2, 3, *(8,) * rank)
    deep = surgery.deepen(traced, {"0": 2}, kernel=kernel, form=form)
    steps = surgery.recipe(deep).steps
    assert [s.kernel for s in steps] == [expected] * 2
    assert all(s.norm and s.form == form for s in steps)
    assert surgery.verify(deep, traced, x).max_rel <= EXACT
    new = [p for n, p in deep.named_parameters() if "identity" in n and p.ndim > 1]
    assert {p.shape[2:] for p in new} >= {expected}


def test_one_kernel_size_is_for_linear_layers_too():
    model = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 2))
    traced, x = traced_of(model, 2, 3, 8)
    deep = surgery.deepen(traced, ["0", "3"], kernel=5)
    assert [s.kernel for s in surgery.recipe(deep).steps] == [(5,), ()]
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 2}, "the kernel of an identity must be odd in each direction, not 2"),
        ({"kernel": 0}, "the kernel of an identity must be odd in each direction, not 0"),
        ({"kernel": -1}, "the kernel of an identity must be odd in each direction, not -1"),
        ({"kernel": "3"}, "the kernel of an identity must be odd in each direction, not 3"),
        ({"kernel": 3.0}, "the kernel of an identity must be odd in each direction, not 3.0"),
        ({"kernel": (3, None)}, r"the kernel of an identity must be odd in each direction, not \(3, None\)"),
        ({"form": 3}, "unknown form 3"),
        ({"kernel": (3, 4)}, r"the kernel of an identity must be odd in each direction, not \(3, 4\)"),
        ({"kernel": (3, 3, 3)}, "a kernel of 3 sizes for the output of '0', which takes 2"),
        ({"kernel": ()}, "a kernel of 0 sizes for the output of '0', which takes 2"),
        ({"form": "blocks"}, "unknown form 'blocks'; did you mean 'block'"),
        ({"form": "block", "kernel": 3}, "a copied block has the kernels of the block it is a copy of"),
    ],
)
def test_bad_forms_and_kernels_are_refused(options, message):
    traced, _ = traced_of(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)), 2, 3, 8, 8)
    with pytest.raises(surgery.UsageError, match=message):
        surgery.deepen(traced, ["0"], **options)


def test_the_whole_model_is_a_container_too():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    traced, x = traced_of(model, 2, 3, 8, 8)
    deep = surgery.deepen(traced, {"": 2})
    assert [name for name, _ in deep.named_children()] == ["0", "1", "2", "3", "4"]
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


def test_with_a_kernel_a_stage_gets_layers():
    traced, x = traced_of(randomised(catalogue.build("resnet18", seed=0)), 2, 3, 32, 32)
    deep = surgery.deepen(traced, ["layer2"], kernel=5)
    (step,) = surgery.recipe(deep).steps
    assert (step.form, step.kernel, step.activation) == ("layer", (5, 5), "ReLU")
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


# ---------------------------------------------------------------------------------------------------------------------
# Where an identity layer can stand


class Joined(nn.Module):
    """Branches of an Inception module: what they are joined from, and what follows."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), Branches(activation), nn.Conv2d(11, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.activation(self.stem(x))))


class Branches(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool2d(x, 3, 1, 1)
        a = F.avg_pool2d(self.activation(self.a(x)), 3, 1, 1)
        b = self.activation(self.b(x))
        return torch.cat([pooled, a.transpose(2, 3), b], 1)


@pytest.mark.parametrize(
    ("activation", "form", "again"),
    [
        (F.relu, "layer", "ReLU"),
        (F.relu6, "layer", "ReLU"),
        (torch.sigmoid, "layer", "ReLU"),
        (F.gelu, "residual", "GELU"),
        (F.leaky_relu, "residual", "LeakyReLU"),
    ],
)
def test_pools_and_concatenations_of_what_is_not_negative_take_identity_layers(activation, form, again):
    traced, x = traced_of(Joined(activation), 2, 3, 6, 6)
    deep = surgery.deepen(traced, {"body": 2})
    steps = surgery.recipe(deep).steps
    assert [s.form for s in steps] == [form] * 2
    assert {s.activation for s in steps} == {again}
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


@pytest.mark.parametrize(("name", "place"), [("googlenet", "inception4b"), ("inception_v3", "Mixed_6c")])
def test_inception_modules_take_identity_layers(name, place):
    traced, x = traced_of(
        randomised(catalogue.build(name, seed=0)), 2, 3, *(96,) * 2 if name == "googlenet" else (299,) * 2
    )
    deep = surgery.deepen(traced, [place], kernel=(1, 3))
    (step,) = surgery.recipe(deep).steps
    assert (step.form, step.norm, step.activation) == ("layer", True, "ReLU")
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


def test_without_an_activation_an_identity_layer_stands_where_it_is_asked_for():
    traced, x = traced_of(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), 5, 4)
    assert surgery.recipe(surgery.deepen(traced, ["0"])).steps[0].form == "residual"
    deep = surgery.deepen(traced, ["0"], form="layer")
    assert surgery.recipe(deep).steps[0].activation == ""
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.Sigmoid])
def test_an_identity_layer_behind_another_activation_is_refused(activation):
    traced, _ = traced_of(nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 2)), 5, 4)
    what = f"the output of '0' is that of a {activation.__name__}, which changes it when applied again: use form='res"
    with pytest.raises(surgery.EditError, match=what):
        surgery.deepen(traced, ["0"], form="layer")


@pytest.mark.parametrize("form", ["layer", "residual"])
@pytest.mark.parametrize("rank", [0, 2])
def test_every_new_parameter_learns_within_two_steps(form, rank):
    body = [nn.Linear(3, 6)] if rank == 0 else [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)]
    head = nn.Linear(6, 2) if rank == 0 else nn.Conv2d(6, 2, 3)
    traced, x = traced_of(nn.Sequential(*body, nn.ReLU(), head), 4, 3, *(6,) * rank)
    deep = surgery.deepen(traced, {"0": 2}, form=form).train()
    new = {n: p for n, p in deep.named_parameters() if "identity" in n}
    left = set(new)
    optimiser = torch.optim.SGD(deep.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        deep(x).square().sum().backward()
        left -= {n for n, p in new.items() if p.grad.abs().max() > 0}
        optimiser.step()
    assert new
    assert not left


# ---------------------------------------------------------------------------------------------------------------------
# BatchNorm


def trained(activation: type[nn.Module], *, residual: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network whose running statistics are those of standard normal images."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv2, self.norm2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), activation()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm2(self.conv2(x))
            return self.act2(x + y if residual else y)

    net = nn.Sequential()
    net.conv1, net.norm1, net.act1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), activation()
    net.body, net.head = Body(), nn.Conv2d(8, 4, 1)
    for norm in (net.norm1, net.body.norm2):
        norm.weight.data.uniform_(0.3, 2.0)
        norm.bias.data.uniform_(-1.0, 1.0)
        norm.momentum = None
    net.train()
    for _ in range(10):
        net(images())
    return surgery.trace(net.eval().to(dtype), images().to(dtype))


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def plain(deep: nn.Module) -> nn.Module:
    """With norms of mean 0 and variance 1, which are the identity in evaluation as well."""
    deep = copy.deepcopy(deep)
    for name, tensor in deep.state_dict().items():
        if "identity0.norm." in name:
            tensor.fill_({"weight": 1.0, "running_var": 1.0 - 2.0**-17}.get(name.rpartition(".")[2], 0.0))
    return deep


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize(("place", "residual"), [("act1", False), ("body", False), ("body", True)])
def test_in_training_little_changes_with_the_statistics_of_the_activation(place, residual, activation, calibrated):
    traced = trained(activation, residual=residual)
    deep = surgery.deepen(traced, [place], form="layer", calibration=images(1) if calibrated else None)
    x = images(2)
    exact = surgery.verify(deep, traced, x, dtype=torch.float64).max_rel
    ours, theirs = (surgery.verify(m, traced, x, train=True, dtype=torch.float64).max_rel for m in (deep, plain(deep)))
    assert surgery.verify(plain(deep), traced, x, dtype=torch.float64).max_rel <= EXACT
    print(f"{place} behind {activation.__name__}: {exact:.1e} in eval(); in train() {ours:.1e}, not {theirs:.1e}")
    assert exact <= EXACT
    assert ours < theirs / (2 if residual and not calibrated else 5)  # summands are not independent


def test_calibration_measures_what_the_norm_is_given():
    traced = trained(nn.ReLU)
    state = copy.deepcopy(traced.state_dict())
    rng = torch.get_rng_state()
    deep = surgery.deepen(traced, {"act1": 2}, calibration=(images(1),))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(state[n], t) for n, t in traced.state_dict().items())
    assert not deep.training
    value = traced.act1(traced.norm1(traced.conv1(images(1))))
    for name in ("act1_identity0", "act1_identity1"):
        norm = deep.get_submodule(name).norm
        assert torch.allclose(norm.bias, value.mean((0, 2, 3)), atol=1e-6)
        assert torch.equal(norm.running_mean, norm.bias)
        assert torch.allclose(norm.weight, value.var((0, 2, 3), correction=0).sqrt(), rtol=2**-8, atol=1e-4)
        assert torch.equal(norm.running_var.double() + norm.eps, norm.weight.double().square())


def test_the_moments_of_rectified_normal_activations_are_predicted():
    for activation in (nn.ReLU, nn.ReLU6):
        traced = trained(activation)
        traced.norm1.weight.data.uniform_(1.0, 4.0)
        norm = surgery.deepen(traced, ["act1"]).get_submodule("act1_identity0").norm
        normal = torch.randn(400_000, 8, dtype=torch.float64) * traced.norm1.weight + traced.norm1.bias
        value = activation()(normal)
        assert torch.allclose(norm.bias.double(), value.mean(0), rtol=0.02, atol=0.01)
        assert torch.allclose(norm.weight.double(), value.std(0), rtol=0.02, atol=0.01)


def test_variances_that_are_too_small_or_too_large_stay_exact():
    traced = trained(nn.ReLU)
    traced.norm1.weight.data.copy_(torch.tensor([0.0, 1e-6, 1e-3, 0.1, 1.0, 30.0, 1e3, 1e6]))
    deep = surgery.deepen(traced, ["act1"])
    scale = deep.get_submodule("act1_identity0").norm.weight
    assert (scale >= 2.0**-8).all()
    assert (scale <= 8.0).all()
    assert surgery.verify(deep, traced, images(), dtype=torch.float64).max_rel <= EXACT


def test_a_saved_calibration_is_loaded(tmp_path):
    source = "torchvision:googlenet?init_weights=False&aux_logits=False"
    traced = surgery.trace(catalogue.build(source, seed=0), torch.zeros(2, 3, 64, 64), source=source)
    x = torch.randn(4, 3, 64, 64)
    deep = surgery.deepen(traced, ["inception4a"], calibration=x)
    assert deep.inception4a_identity0.norm.bias.any()
    again = surgery.load(surgery.save(deep, tmp_path / "deep"))
    assert torch.equal(again.inception4a_identity0.norm.bias, deep.inception4a_identity0.norm.bias)
    assert surgery.verify(again, deep, x).max_abs == 0


def test_a_model_without_data_can_be_deepened_to_see_what_it_costs():
    traced = trained(nn.ReLU).to("meta")
    deep = surgery.deepen(traced, ["act1"])
    assert deep.get_submodule("act1_identity0").norm.weight.device.type == "meta"


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(x), self.right(x)


class Chooses(nn.Module):
    """Branches on a value: its halves are traced on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), Halves())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.part(x)
        return left if left.sum() > right.sum() else right


def test_a_place_without_one_output_is_called_by_its_whole_name():
    traced, _ = traced_of(Chooses(), 2, 4)
    with pytest.raises(surgery.EditError, match=r"'part.1' has 2 outputs \(\w+, \w+\): name a layer"):
        surgery.deepen(traced, ["part.1"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_behind_an_identity_is_exact_in_16_bits_too(dtype, tmp_path):
    model = randomised(catalogue.build("resnet18?num_classes=10", seed=0)).to(dtype).eval()
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    traced = surgery.trace(model, x, source="torchvision:resnet18?num_classes=10")
    deep = surgery.deepen(traced, ["layer1.0.conv1", "layer2.0.conv1"], calibration=x)
    norm = deep.get_submodule("layer1.0.conv1_identity0.norm")
    assert {t.dtype for t in (norm.weight, norm.running_var)} == {dtype}
    surgery.save(deep, tmp_path / "deep")
    for result in (deep, surgery.load(tmp_path / "deep")):
        assert surgery.verify(result, traced, x, dtype=torch.float64).max_rel <= EXACT


class Mixed(nn.Module):
    """A float32 part, and behind it a float64 one."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(3, 4, 3, padding=1)
        self.high = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.high(torch.relu(self.low(x)).double())


def test_new_layers_have_the_dtype_and_the_memory_format_of_those_before_them():
    model = Mixed().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    traced = surgery.trace(model, x)
    deep = surgery.deepen(traced, ["low", "high.0"])
    assert torch.equal(deep(x), traced(x))
    new = {name: p for name, p in deep.named_parameters() if "identity" in name and p.ndim == 4}
    assert {name.partition("_")[0]: w.dtype for name, w in new.items()} == {
        "low": torch.float32,
        "high.0": torch.float64,
    }
    assert all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in new.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_calibration_batch_without_statistics_is_refused(value):
    traced = trained(nn.ReLU)
    with pytest.raises(surgery.UsageError, match=r"gives act1_identity0\.norm no finite mean and variance"):
        surgery.deepen(traced, ["act1"], calibration=torch.full_like(images(1), value))
    with pytest.raises(surgery.UsageError, match=r"gives act1_identity0\.norm no finite mean and variance"):
        surgery.deepen(traced, ["act1"], calibration=images(1)[:0])


@pytest.mark.parametrize(
    "activation", [nn.PReLU(), nn.PReLU(8), nn.LeakyReLU()], ids=["PReLU", "PReLU(8)", "LeakyReLU"]
)
@pytest.mark.parametrize("norm", [True, False])
def test_an_identity_layer_is_refused_behind_activations_that_change_it_with_parameters_or_without(activation, norm):
    layers = [nn.Conv2d(3, 8, 1), *([nn.BatchNorm2d(8)] if norm else []), activation, nn.Conv2d(8, 3, 1)]
    traced = surgery.trace(nn.Sequential(*layers).eval(), torch.rand(2, 3, 4, 4))
    for place in ("0", str(len(layers) - 2)):
        with pytest.raises(surgery.EditError, match=f"that of a {type(activation).__name__}, which changes it"):
            surgery.deepen(traced, [place], form="layer")
        deep = surgery.deepen(traced, [place])
        assert surgery.verify(deep, traced).max_abs == 0
        assert f"{place}_identity0.conv2" in dict(deep.named_modules())


def test_a_function_with_a_learned_slope_is_an_activation_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.slope, self.b = nn.Conv2d(3, 8, 1), nn.Parameter(torch.rand(8)), nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return self.b(nn.functional.prelu(self.a(x), self.slope))

    traced = surgery.trace(Net().eval(), torch.rand(2, 3, 4, 4))
    with pytest.raises(surgery.EditError, match="that of a PReLU, which changes it"):
        surgery.deepen(traced, ["a"], form="layer")
    assert surgery.verify(surgery.deepen(traced, ["a"]), traced).max_abs == 0


def test_layers_behind_a_dense_block_that_grew_have_its_channels():
    model = DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)
    traced, x = traced_of(randomised(model), 2, 3, 32, 32)
    places = ["features.denseblock1", "features.transition1", "features.denseblock2", "features.norm5"]
    deep = surgery.deepen(traced, places)
    assert [type(step).__name__ for step in surgery.recipe(deep).steps].count("InsertDense") == 2
    assert surgery.verify(deep, traced, x).max_rel <= 1e-12


def test_values_of_more_than_three_spatial_axes_have_no_convolution():
    class Six(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.many, self.b = nn.Conv3d(2, 4, 1), nn.Unflatten(4, (2, 1)), nn.Conv3d(4, 3, 1)

        def forward(self, x):
            return self.b(self.many(self.a(x)).flatten(4))

    traced = surgery.trace(Six().eval(), torch.rand(2, 2, 3, 3, 2))
    with pytest.raises(surgery.EditError, match="has no channel axis to put a layer behind"):
        surgery.deepen(traced, ["many"])


@pytest.mark.parametrize(
    ("size", "height", "expected"),
    [((5, 5), 8, (5, 5)), ((7, 3), 8, (7, 3)), ((4, 4), 8, (3, 3)), ((5, 5), 1, (1, 5))],
    ids=str,
)
def test_an_identity_layer_has_the_kernel_of_the_one_before_it_where_that_is_odd(size, height, expected):
    padding = (size[0] // 2 if height > 1 else 2, size[1] // 2)
    net = nn.Sequential(nn.Conv2d(3, 4, size, padding=padding), nn.ReLU(), nn.Conv2d(4, 2, 1)).double().eval()
    x = torch.rand(2, 3, height, 8, dtype=torch.float64)
    deep = surgery.deepen(surgery.trace(net, x), ["0"])
    (added,) = [m for m in deep.modules() if isinstance(m, nn.Conv2d) and m.in_channels == m.out_channels]
    assert added.kernel_size == expected
    torch.testing.assert_close(deep(x), net(x), rtol=1e-10, atol=1e-12)
