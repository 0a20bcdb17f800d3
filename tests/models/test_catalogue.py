"""The catalogue of models, and the way from a source to a module."""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from urllib.error import URLError

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torchvision.models import get_model, list_models, squeezenet1_1

from surgery import models as catalogue
from surgery.errors import UsageError, WeightsWarning


def test_the_catalogue_lists_every_builder_of_torchvision_and_nothing_else():
    assert set(catalogue.CATALOGUE) == set(list_models())


def test_each_family_is_complete():
    families = Counter(entry.family for entry in catalogue.CATALOGUE.values() if not entry.name.startswith("quantized"))
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
        "ConvNeXt": 4,
        "Vision Transformer": 5,
        "Swin Transformer": 3,
        "Swin Transformer v2": 3,
        "MaxViT": 1,
        "R3D": 1,
        "MC3": 1,
        "R(2+1)D": 1,
        "S3D": 1,
        "Swin Transformer 3D": 3,
        "MViT": 2,
        "FCN": 2,
        "DeepLabV3": 3,
        "LR-ASPP": 1,
        "Faster R-CNN": 4,
        "Mask R-CNN": 2,
        "Keypoint R-CNN": 1,
        "RetinaNet": 2,
        "FCOS": 1,
        "SSD": 1,
        "SSDlite": 1,
        "RAFT": 2,
    }


def test_the_input_size_is_that_of_the_published_weights():
    for entry in catalogue.CATALOGUE.values():
        transforms = catalogue.published(entry.name)["DEFAULT"].transforms()
        crop = getattr(transforms, "crop_size", getattr(transforms, "resize_size", None))
        if crop is None:  # detection and optical flow take any size
            continue
        size = catalogue.parse(entry.name, weights="DEFAULT").sample_size()
        assert size[-2:] == (tuple(crop) if len(crop) == 2 else (*crop, *crop)), entry.name


@pytest.mark.parametrize(
    "name",
    [
        "alexnet",
        "vgg11_bn",
        "resnet18",
        "squeezenet1_0",
        "densenet121",
        "googlenet",
        "mnasnet0_5",
        "quantized_resnet18",
        "convnext_tiny",
        "swin_t",
        "swin_v2_t",
        "vit_b_32",
        "lraspp_mobilenet_v3_large",
    ],
)
def test_a_model_trains_on_images_of_its_minimum_size(name):
    entry = catalogue.CATALOGUE[name]
    model = catalogue.build(name, num_classes=10, seed=0)
    outputs = model(catalogue.example_inputs(name, image_size=entry.minimum))
    assert tree_leaves(outputs)[0].shape[:2] == (2, 10)


SMALL = [
    "vit_b_16",
    "swin_t",
    "r3d_18",
    "swin3d_t",
    "convnext_tiny",
    "deeplabv3_mobilenet_v3_large",
    "raft_small",
    "quantized_googlenet",
]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_model_runs_on_its_small_inputs_in_both_modes(name):
    model = catalogue.build(catalogue.CATALOGUE[name].small_source, seed=0)
    inputs = catalogue.small_inputs(name)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        for mode in (True, False):
            assert all(out.shape[0] == 2 for out in tree_leaves(model.train(mode)(*inputs)))


DETECTION = [entry.name for entry in catalogue.CATALOGUE.values() if entry.targets]


def test_there_are_twelve_detection_models():
    assert len(DETECTION) == 12


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "keypointrcnn_resnet50_fpn",
        "maskrcnn_resnet50_fpn",
        "fcos_resnet50_fpn",
    ],
)
def test_a_small_detection_model_detects_in_evaluation_and_has_losses_in_training(name):
    entry = catalogue.CATALOGUE[name]
    model = catalogue.build(entry.small_source, seed=0)
    inputs = catalogue.small_inputs(name)
    with torch.no_grad():
        losses = model.train()(*inputs, catalogue.example_targets(entry.small_source, image_size=entry.smallest))
        found = model.eval()(*inputs)
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    assert [d["boxes"].shape[0] > 0 for d in found] == [True, True]
    assert {"boxes", "labels", *entry.targets} <= set(found[0])


@pytest.mark.parametrize("name", DETECTION)
def test_targets_are_valid_for_images_of_their_size(name):
    inputs = catalogue.example_inputs(name, batch_size=3, image_size=48)
    targets = catalogue.example_targets(name, batch_size=3, image_size=48)
    assert [image.shape for image in inputs[0]] == [(3, 48, 48)] * 3
    assert len(targets) == 3
    for target in targets:
        assert set(target) == set(catalogue.CATALOGUE[name].targets)
        left, top, right, bottom = target["boxes"].unbind(1)
        assert torch.all((left >= 0) & (top >= 0) & (left < right) & (top < bottom) & (right <= 48) & (bottom <= 48))
        assert torch.all((target["labels"] >= 1) & (target["labels"] < (2 if "keypoints" in target else 91)))
        if "masks" in target:
            assert target["masks"].dtype == torch.uint8
            area = target["masks"].flatten(1).sum(1)
            assert torch.allclose(area.float(), (right - left) * (bottom - top), rtol=0.2)
        if "keypoints" in target:
            x, y, visible = target["keypoints"].permute(2, 1, 0)
            assert torch.all((x > left) & (x < right) & (y > top) & (y < bottom))
            assert torch.all(visible == 1)
    assert torch.equal(targets[0]["boxes"], catalogue.example_targets(name, image_size=48)[0]["boxes"])


def test_targets_have_the_classes_and_keypoints_that_the_source_asks_for():
    (target,) = catalogue.example_targets("keypointrcnn_resnet50_fpn?num_classes=3&num_keypoints=5", batch_size=1)
    assert target["keypoints"].shape == (3, 5, 3)
    labels = torch.cat([t["labels"] for t in catalogue.example_targets("ssd300_vgg16?num_classes=3", batch_size=20)])
    assert set(labels.tolist()) == {1, 2}


def test_models_other_than_detection_models_have_no_targets():
    with pytest.raises(UsageError, match="'resnet18' is not a detection model of the catalogue: it is called without"):
        catalogue.example_targets("resnet18")


@pytest.mark.parametrize(
    ("source", "size", "shapes"),
    [
        ("r3d_18", {}, [(2, 3, 16, 112, 112)]),
        ("r3d_18", {"frames": 8, "image_size": 64}, [(2, 3, 8, 64, 64)]),
        ("raft_small", {}, [(2, 3, 440, 1024)] * 2),
        ("ssd300_vgg16", {}, [(3, 300, 300)] * 2),
        ("vit_b_16?image_size=384", {}, [(2, 3, 384, 384)]),
        ("vit_h_14?weights=DEFAULT", {}, [(2, 3, 518, 518)]),
        ("vit_b_16?weights=IMAGENET1K_SWAG_E2E_V1", {}, [(2, 3, 384, 384)]),
        ("maxvit_t?input_size=448,224", {}, [(2, 3, 448, 224)]),
        ("swin_t", {"image_size": 50}, [(2, 3, 50, 50)]),
    ],
)
def test_example_inputs_are_of_the_kind_and_size_that_the_source_is_built_for(source, size, shapes):
    assert [leaf.shape for leaf in tree_leaves(catalogue.example_inputs(source, **size))] == shapes


def test_the_two_images_of_a_pair_differ():
    first, second = catalogue.example_inputs("raft_small", image_size=128)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ("vit_b_16", 64, "'vit_b_16' is built for inputs of 224 x 224, not 64 x 64; image_size= builds it for another"),
        ("vit_b_16?image_size=32", 224, "'vit_b_16' is built for inputs of 32 x 32, not 224 x 224"),
        ("mvit_v2_s", 112, "'mvit_v2_s' is built for inputs of 16 x 224 x 224, not 16 x 112 x 112$"),
    ],
)
def test_a_size_that_a_model_is_not_built_for_is_refused(source, size, message):
    with pytest.raises(UsageError, match=message):
        catalogue.example_inputs(source, image_size=size)


def test_inputs_of_a_shape_have_the_frames_before_the_height():
    assert catalogue.inputs_of_shape("r3d_18", (1, 3, 4, 32, 48)).shape == (1, 3, 4, 32, 48)
    with pytest.raises(UsageError, match="'r3d_18' takes inputs of the form N,C,T,H,W, not 1,3,32,32"):
        catalogue.inputs_of_shape("r3d_18", (1, 3, 32, 32))
    assert [image.shape for image in catalogue.inputs_of_shape("ssd300_vgg16", (2, 3, 30, 40))[0]] == [(3, 30, 40)] * 2


def test_quantizable_models_are_built_in_float_and_int8_ones_are_refused_with_what_to_do():
    model = catalogue.build("quantized_resnet18")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    message = (
        r"'quantized_resnet18' cannot be built with quantize=true: int8 .* \(quantize=false, the default\) and quan"
    )
    for call in (catalogue.build, catalogue.canonical, catalogue.example_inputs):
        with pytest.raises(UsageError, match=message):
            call("quantized_resnet18?quantize=true")


@pytest.mark.parametrize("name", ["fcn_resnet50", "ssdlite320_mobilenet_v3_large"])
def test_a_model_with_a_backbone_is_built_without_fetching_its_weights(name, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    catalogue.build(name)
    assert catalogue.canonical(f"{name}?weights_backbone=none") == f"torchvision:{name}"
    with pytest.raises(UsageError, match=f"'{name}' takes no weights_backbone here: pass weights= for those of the wh"):
        catalogue.build(f"{name}?weights_backbone=DEFAULT")


def test_a_keyword_of_several_numbers_is_written_with_commas():
    source = catalogue.canonical("maxvit_t?input_size=448,224")
    assert source == "torchvision:maxvit_t?input_size=448,224"
    assert catalogue.parse(source).keywords == {"input_size": (448, 224)}


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

        def fails():
            return {}["width"]
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
        ("fails", "'factories_of_a_test:fails' cannot be called with no arguments: KeyError: 'width'"),
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
    with pytest.warns(WeightsWarning, match=r"stay, in: classifier.1.weight, classifier.1.bias$"):
        model = catalogue.build("squeezenet1_1", weights="DEFAULT", num_classes=10)
    state = model.state_dict()
    assert state["classifier.1.weight"].shape[0] == 10
    assert all(torch.equal(v, published[k]) for k, v in state.items() if not k.startswith("classifier"))


def test_the_published_form_of_a_detection_model_is_rebuilt_from_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = catalogue.published("fasterrcnn_resnet50_fpn")["DEFAULT"]
    file = tmp_path / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    torch.save(catalogue.build("fasterrcnn_resnet50_fpn?frozen_norm=0.0", seed=0).state_dict(), file)
    model = catalogue.build("fasterrcnn_resnet50_fpn", weights="DEFAULT")
    source = catalogue.canonical("fasterrcnn_resnet50_fpn", weights="DEFAULT")
    assert source == "torchvision:fasterrcnn_resnet50_fpn?frozen_norm=0.0"
    rebuilt = catalogue.build(source, seed=1)
    rebuilt.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = (m.eval().backbone.body(image)["3"] for m in (rebuilt, model))
    assert torch.equal(ours, theirs)
    with pytest.warns(WeightsWarning, match="stay, in: roi_heads.box_predictor.cls_score.weight, "):
        other = catalogue.build("fasterrcnn_resnet50_fpn", weights="DEFAULT", num_classes=5)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not flags["backbone.body.conv1.weight"]
    assert {name: p.requires_grad for name, p in other.named_parameters()} == flags


def test_the_published_form_of_a_segmentation_model_has_its_auxiliary_head():
    source = catalogue.canonical("fcn_resnet50", weights="DEFAULT")
    assert source == "torchvision:fcn_resnet50?aux_loss=true"
    assert set(catalogue.build(source).eval()(torch.randn(1, 3, 32, 32))) == {"out", "aux"}
