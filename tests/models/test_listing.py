"""The listing of known models says what torchvision says."""

from __future__ import annotations

import pytest
from torchvision.models import get_model_weights

import surgery
from surgery.errors import unknown_name


def test_stored_figures_are_those_that_torchvision_publishes():
    for known in surgery.models.list_models():
        if known.entry.name not in surgery.models.FITNETS:
            meta = get_model_weights(known.entry.name.removeprefix("quantized_"))["DEFAULT"].meta
            assert (known.params, known.gmacs, known.metrics) == (meta["num_params"], meta["_ops"], meta["_metrics"])


def test_models_are_listed_by_name_and_family():
    listed = surgery.models.list_models("*_s", "swin transformer")
    assert [(known.entry.name, known.score) for known in listed] == [("swin_s", "83.2% top-1")]
    with pytest.raises(surgery.UsageError, match="unknown family 'resnets'; did you mean 'ResNet'"):
        surgery.models.list_models(family="resnets")


def test_an_unknown_name_is_told_all_known_ones_where_they_are_few():
    assert str(unknown_name("importance", "l1", ("prefix", "magnitude"))) == (
        "unknown importance 'l1': one of 'magnitude', 'prefix'"
    )
