"""The networks of the FitNets paper: their counts to the digit, their layers, and how they are named and rebuilt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from benchmarks.fitnets.counting import PaperCost, paper_cost
from surgery import models as catalogue
from surgery.errors import UsageError
from surgery.layers.maxout import Maxout

# Weights and multiplications, by the architectures that the paper gives (its table 5 and section 4.1 round them).
COUNTS = {
    "fitnet_cifar_teacher": (9_044_360, 725_090_696),
    "fitnet1": (249_576, 30_150_024),
    "fitnet2": (861_928, 107_775_880),
    "fitnet3": (1_503_304, 323_946_376),
    "fitnet4": (2_544_712, 381_749_128),
    "fitnet_30m_11": (249_576, 30_150_024),
    "fitnet_107m_11": (861_928, 107_775_880),
}
WEIGHTS = {
    "fitnet_svhn_teacher": 4_928_800,
    "fitnet_svhn": 1_503_304,
    "fitnet_mnist_teacher": 360_816,
    "fitnet_mnist": 29_944,
    "fitnet_cifar_teacher?pieces=5": 16_244_360,
    "fitnet1?pieces=5": 345_576,
    "fitnet2?pieces=5": 1_053_928,
    "fitnet3?pieces=5": 1_695_304,
    "fitnet4?pieces=5": 2_736_712,
    "fitnet_svhn_teacher?pieces=5": 10_458_400,
    "fitnet_mnist_teacher?pieces=4": 418_416,
    "fitnet_mnist?pieces=4": 35_992,
    "fitnet1?num_classes=100": 249_576 + 45_000,
}
BUDGETS = {
    "fitnet_30m_5": (219_912, 27.20),
    "fitnet_30m_7": (208_104, 29.27),
    "fitnet_30m_9": (217_320, 29.86),
    "fitnet_107m_5": (729_736, 101.58),
    "fitnet_107m_7": (563_272, 104.53),
    "fitnet_107m_9": (756_808, 106.30),
}
LAYERS = {
    **{"fitnet_cifar_teacher": 5, "fitnet_svhn_teacher": 5, "fitnet_mnist_teacher": 4, "fitnet_mnist": 7},
    **{"fitnet1": 11, "fitnet2": 11, "fitnet3": 13, "fitnet4": 19, "fitnet_svhn": 13},
    **{f"fitnet_{budget}_{depth}": depth for budget in ("30m", "107m") for depth in (5, 7, 9, 11)},
}


def traced(source: str) -> nn.Module:
    source = catalogue.canonical(source)
    return surgery.trace(catalogue.build(source, seed=0), catalogue.example_inputs(source), source=source)


@pytest.mark.parametrize("name", COUNTS)
def test_weights_and_multiplications_are_the_papers_to_the_digit(name):
    assert paper_cost(traced(name)) == PaperCost(*COUNTS[name])


@pytest.mark.parametrize("source", WEIGHTS)
def test_weights_are_the_papers_to_the_digit(source):
    assert paper_cost(traced(source)).weights == WEIGHTS[source]


@pytest.mark.parametrize("name", BUDGETS)
def test_networks_of_one_budget_cost_what_the_paper_says(name):
    found = paper_cost(traced(name))
    assert (found.weights, round(found.multiplications / 1e6, 2)) == BUDGETS[name]


@pytest.mark.parametrize("name", catalogue.FITNETS)
def test_each_network_has_the_papers_number_of_layers_and_the_cost_that_is_listed(name):
    model = catalogue.build(name, seed=0)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == LAYERS[name]
    assert [n for n, _ in model.named_children() if n != "flatten"] == [
        *(f"layer{k}" for k in range(1, LAYERS[name])),
        "classifier",
    ]
    known = surgery.cost(model, catalogue.example_inputs(name))
    assert catalogue.fitnet_cost(name) == (known.params, known.macs)


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("fitnet_cifar_teacher", "layer1", (2, 96, 16, 16)),
        ("fitnet_cifar_teacher", "layer2", (2, 192, 7, 7)),
        ("fitnet_cifar_teacher", "layer3", (2, 192, 5, 5)),
        ("fitnet1", "layer6", (2, 32, 8, 8)),
        ("fitnet3", "layer8", (2, 80, 8, 8)),
        ("fitnet4", "layer11", (2, 80, 8, 8)),
        ("fitnet4", "layer17", (2, 128, 1, 1)),
        ("fitnet_mnist_teacher", "layer2", (2, 48, 4, 4)),
        ("fitnet_mnist", "layer4", (2, 16, 4, 4)),
    ],
)
def test_maps_have_the_papers_sizes(name, layer, shape):
    model = catalogue.build(name, seed=0)
    upto = model[: [n for n, _ in model.named_children()].index(layer) + 1]
    assert upto(catalogue.example_inputs(name)).shape == shape


def test_a_name_is_a_source_in_full_or_not():
    assert catalogue.canonical("fitnet1?num_classes=100") == "fitnets:fitnet1?num_classes=100"
    assert catalogue.canonical("fitnets:fitnet1") == "fitnets:fitnet1"
    assert catalogue.example_inputs("fitnet_mnist").shape == (2, 1, 28, 28)
    assert catalogue.build("fitnet1", num_classes=7, seed=0).classifier.out_features == 7


def test_initial_weights_are_the_papers_on_request():
    model = catalogue.build("fitnet1?init_range=0.005", seed=0)
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    assert 0.0049 < weights.abs().max() <= 0.005
    assert weights.mean().abs() < 1e-4
    assert not any(p.any() for p in model.parameters() if p.ndim == 1)


def test_an_edited_network_is_rebuilt_from_its_recipe(tmp_path):
    slim = surgery.deepen(surgery.slim(traced("fitnet_mnist?pieces=4"), 0.5), ["layer4"])
    surgery.save(slim, tmp_path / "slim")
    loaded = surgery.load(tmp_path / "slim")
    assert surgery.recipe(loaded).source == "fitnets:fitnet_mnist?pieces=4"
    assert isinstance(loaded.get_submodule("layer6.maxout"), Maxout)
    assert surgery.verify(loaded, slim, torch.randn(3, 1, 28, 28)).max_abs == 0


@pytest.mark.parametrize("name", ["fitnet1", "fitnet_mnist_teacher"])
def test_every_operation_is_exact_and_the_result_exports(name, tmp_path):
    model = traced(name).double().eval()
    x = catalogue.example_inputs(name).double()
    grown = surgery.deepen(surgery.widen(model, 1.25, seed=1), {"layer2": 1})
    assert surgery.verify(grown, model, x).max_rel <= 1e-10
    slim = surgery.slim(model, 0.5)
    assert surgery.verify(slim, surgery.masked(model, surgery.split_masks(model, 0.5)), x).max_rel <= 1e-10
    surgery.export_onnx(slim.float(), tmp_path / "slim.onnx")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("fitnet5", r"unknown model 'fitnet5'; did you mean 'fitnet[1-4]'"),
        ("fitnets:resnet18", "unknown model 'resnet18'"),
        ("fitnet1?weights=DEFAULT", "^'fitnet1' has no published weights$"),
        ("fitnet1?width=3", "^model 'fitnet1' cannot be built with width=3: "),
        ("fitnet1?pieces=0", "^a maxout unit has at least 1 piece, not 0$"),
        ("fitnet1?init_range=-1.0", r"^init_range must be above 0, not -1\.0$"),
    ],
)
def test_what_cannot_be_built_is_an_error_that_says_why(source, text):
    with pytest.raises(UsageError, match=text):
        catalogue.build(source)


def test_a_network_takes_images_of_its_size_alone():
    with pytest.raises(UsageError, match="'fitnet_mnist' is built for inputs of 28 x 28, not 32 x 32"):
        catalogue.example_inputs("fitnet_mnist", image_size=32)
