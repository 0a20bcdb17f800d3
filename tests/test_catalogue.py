"""The catalogue of models, and the way from a source to a module."""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from urllib.error import URLError

import pytest
import torch
from torchvision.models import get_model, get_model_builder, get_model_weights, squeezenet1_1

from surgery import catalogue
from surgery.errors import UsageError


def test_the_catalogue_lists_64_builders_that_torchvision_has():
    assert len(catalogue.CATALOGUE) == 64
    for name in catalogue.CATALOGUE:
        assert callable(get_model_builder(name))


def test_each_family_is_complete():
    families = Counter(entry.family for entry in catalogue.CATALOGUE.values())
    assert families == {
        "AlexNet": 1,
        "VGG": 8,
        "ResNet": 5,
        "ResNeXt": 3,
        "Wide ResNet": 2,
        "SqueezeNet": 2,
        "DenseNet": 4,
        "GoogLeNet": 1,
        "Inception v3": 1,
        "MobileNet v2": 1,
        "MobileNet v3": 2,
        "MNASNet": 4,
        "EfficientNet": 8,
        "EfficientNet v2": 3,
        "RegNet": 15,
        "ShuffleNet v2": 4,
    }


def test_the_input_size_is_that_of_the_published_weights():
    for entry in catalogue.CATALOGUE.values():
        assert entry.input_size == (3, *2 * get_model_weights(entry.name)["DEFAULT"].transforms().crop_size), entry.name


@pytest.mark.parametrize(
    "name", ["alexnet", "vgg11_bn", "resnet18", "squeezenet1_0", "densenet121", "googlenet", "mnasnet0_5"]
)
def test_a_model_trains_on_images_of_its_minimum_size(name):
    entry = catalogue.CATALOGUE[name]
    model = catalogue.build(name, num_classes=10, seed=0)
    outputs = model(catalogue.example_inputs(name, image_size=entry.minimum))
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("source", ["mnasnet0_5", "torchvision:mnasnet0_5"])
def test_a_name_builds_torchvisions_model_with_or_without_the_prefix(source):
    ours, theirs = catalogue.build(source).state_dict(), get_model("mnasnet0_5").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_keywords_in_the_source_reach_the_builder_with_their_types():
    model = catalogue.build("torchvision:googlenet?num_classes=7&aux_logits=false&dropout=0.5", seed=0)
    assert model.fc.out_features == 7
    assert model.aux1 is None
    assert model.dropout.p == 0.5


def test_keywords_given_apart_win_over_those_in_the_source():
    assert catalogue.build("squeezenet1_1?num_classes=7", num_classes=3).classifier[1].out_channels == 3


def test_the_canonical_form_is_full_sorted_and_builds_the_same_architecture():
    source = catalogue.canonical("googlenet?transform_input=TRUE", num_classes=5, aux_logits=False, weights=None)
    assert source == "torchvision:googlenet?aux_logits=false&num_classes=5&transform_input=true"
    assert catalogue.canonical(source) == source
    model = catalogue.build(source)
    assert model.transform_input
    assert model.aux1 is None


def test_the_canonical_form_keeps_what_weights_imply_and_not_the_weights():
    source = catalogue.canonical("googlenet?weights=DEFAULT")
    assert source == "torchvision:googlenet?aux_logits=false&transform_input=true"


def test_the_canonical_form_of_a_factory_keeps_its_module():
    assert catalogue.canonical("nets.mine:tiny?width=8") == "nets.mine:tiny?width=8"


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, third = (catalogue.build("squeezenet1_1", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    weight = "features.0.weight"
    assert torch.equal(first[weight], second[weight])
    assert not torch.equal(first[weight], third[weight])


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_building_without_weights_gives_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        catalogue.build(name, seed=0)


def test_example_inputs_have_the_models_size_unless_told_and_are_always_the_same():
    assert catalogue.example_inputs("inception_v3").shape == (2, 3, 299, 299)
    assert catalogue.example_inputs("resnet50", batch_size=1, image_size=64).shape == (1, 3, 64, 64)
    assert torch.equal(catalogue.example_inputs("resnet50"), catalogue.example_inputs("resnet18"))


def test_example_inputs_of_a_factory_need_a_size():
    with pytest.raises(UsageError, match=r"the input size of 'a.b:c' is not known: pass image_size \(--input-shape\)"):
        catalogue.example_inputs("a.b:c")


def test_an_unknown_model_is_refused_with_close_matches():
    with pytest.raises(UsageError, match=r"unknown model 'resnet51'; did you mean 'resnet50'"):
        catalogue.build("resnet51")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18?colour=red", "model 'resnet18' cannot be built with colour=red: .*unexpected keyword.*'colour'"),
        ("resnet18?weights=BEST", "unknown weights of 'resnet18' 'BEST'"),
        ("os.path:join", r"'os.path:join' would import and run code: pass trust=True \(--trust\) if you trust it"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(source, message):
    with pytest.raises(UsageError, match=message):
        catalogue.build(source)


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of the user's own, importable for the time of a test."""
    code = """
        from torch import nn

        def tiny(width=4):
            return nn.Linear(3, width)

        def text():
            return "no module"
    """
    (tmp_path / "factories_of_a_test.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)
    return "factories_of_a_test"


def test_a_trusted_factory_is_called_with_the_keywords(factories):
    assert catalogue.build(f"{factories}:tiny?width=9", trust=True).out_features == 9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "cannot import 'factories_of_a_test:nothing'"),
        ("tiny?depth=2", "'factories_of_a_test:tiny' cannot be called with depth=2"),
        ("text", "'factories_of_a_test:text' returned str, not an nn.Module"),
        ("tiny?weights=DEFAULT", "'factories_of_a_test:tiny' is a factory of your own"),
    ],
)
def test_a_factory_that_does_not_work_is_refused_with_the_reason(factories, name, message):
    with pytest.raises(UsageError, match=message):
        catalogue.build(f"{factories}:{name}", trust=True)


def test_weights_that_cannot_be_fetched_are_one_clear_line(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UsageError) as caught:
        catalogue.build("resnet18", weights="DEFAULT")
    message = str(caught.value)
    assert message.startswith("cannot fetch the weights of 'resnet18' from https://download.pytorch.org/")
    assert message.endswith(f"pass weights none, or put the file at {tmp_path}/hub/checkpoints/resnet18-f37072fd.pth")
    assert "\n" not in message


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file in the hub cache that stands for the published weights of squeezenet1_1; its entries."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = squeezenet1_1().state_dict()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    return state


def test_weights_are_loaded_whole_where_the_architecture_is_theirs(published):
    model = catalogue.build("squeezenet1_1", weights="DEFAULT")
    assert all(torch.equal(v, published[k]) for k, v in model.state_dict().items())


def test_weights_are_copied_where_they_fit_and_the_others_are_named(published):
    with pytest.warns(catalogue.WeightsWarning, match=r"stay, in: classifier.1.weight, classifier.1.bias$"):
        model = catalogue.build("squeezenet1_1", weights="DEFAULT", num_classes=10)
    state = model.state_dict()
    assert state["classifier.1.weight"].shape[0] == 10
    assert all(torch.equal(v, published[k]) for k, v in state.items() if not k.startswith("classifier"))
