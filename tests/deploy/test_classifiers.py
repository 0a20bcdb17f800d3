"""Models and data that go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.deploy.classifiers import classifier, data_for
from surgery.errors import UsageError


def net(classes=10):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
        )


def traced(size, classes=10):
    return surgery.trace(net(classes), torch.randn(2, 3, size, size)).eval()


def test_images_have_the_size_that_a_model_was_traced_with_or_is_fixed_to():
    assert data_for({"the model": traced(12)}, "digits").image_size == 12
    assert data_for({"the model": net()}, "digits").image_size == 8
    assert data_for({"the model": "vit_b_32?image_size=64"}, "digits", limit=2).image_size == 64
    assert data_for({"the model": traced(12)}, "digits", image_size=9).image_size == 9


def test_images_are_as_large_as_the_least_that_all_models_take():
    least = data_for({"the model": "inception_v3"}, "digits", limit=2).image_size
    assert least > data_for({"the model": "resnet18"}, "digits", limit=2).image_size
    for models in ({"a": "inception_v3", "b": "resnet18"}, {"a": "resnet18", "b": "inception_v3"}):
        assert data_for(models, "digits", limit=2).image_size == least


def test_models_for_images_of_different_sizes_need_a_given_size():
    models = {"the student": traced(12), "the teacher": "vit_b_32?image_size=64"}
    message = (
        r"the student takes images of 12 x 12 and the teacher takes images of 64 x 64: choose a size for all "
        r"\(--image-size\)"
    )
    with pytest.raises(UsageError, match=message):
        data_for(models, "digits")
    assert data_for(models, "digits", limit=2, image_size=64).image_size == 64


def test_augmentation_goes_to_the_data():
    assert data_for({"the model": net()}, "digits", augment="flip").augment == "flip"


def test_a_model_of_the_catalogue_gets_as_many_outputs_as_there_are_classes():
    data = data_for({"the model": "squeezenet1_1"}, "digits", image_size=32, limit=2)
    model = classifier("squeezenet1_1", data)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert surgery.recipe(model).source == "torchvision:squeezenet1_1?num_classes=10"


def test_a_traced_model_is_copied_and_its_example_inputs_become_those_of_the_data():
    model = traced(12)
    fitted = classifier(model, data_for({"the model": model}, "digits", image_size=9))
    assert surgery.example_inputs(fitted)[0][0].shape == (2, 3, 9, 9)
    assert surgery.example_inputs(model)[0][0].shape == (2, 3, 12, 12)
    with torch.no_grad():
        fitted.get_submodule("4").bias.zero_()
    assert model.get_submodule("4").bias.abs().sum() > 0
    assert surgery.dimension_groups(surgery.widen(fitted, 2.0))[0].size == 16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: traced(8, classes=3), r"'digits' has 10 classes, but from 2 images the teacher makes \(2, 3\)"),
        (
            lambda: surgery.trace(nn.Sequential(nn.Flatten(), nn.Linear(27, 10)), torch.randn(2, 3, 3, 3)),
            r"the teacher cannot be run on 8 x 8 images, try another size \(--image-size\): ",
        ),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused_by_name(model, message):
    data = surgery.load_data("digits", limit=2)
    with pytest.raises(UsageError, match=message):
        classifier(model(), data, what="the teacher")


def test_images_have_as_many_channels_as_the_models_take():
    assert data_for({"the model": "fitnet_mnist"}, "digits", limit=2).channels == 1
    grey = surgery.trace(nn.Conv2d(1, 2, 3), torch.zeros(2, 1, 12, 12))
    data = data_for({"the student": grey, "the teacher": "fitnet_mnist_teacher"}, "digits", limit=2, image_size=28)
    assert data.train[0][0].shape == (1, 28, 28)
    with pytest.raises(surgery.UsageError, match="takes images of 1 channel and the other takes images of 3 channels"):
        data_for({"the one": grey, "the other": traced(12)}, "digits")
