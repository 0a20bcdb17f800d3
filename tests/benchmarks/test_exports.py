import json
import sys

import pytest
import torch
from torch import nn

from benchmarks.exports import __main__ as exports
from benchmarks.exports import model as exports_model
from benchmarks.exports import plain as plain_export
from benchmarks.exports import report as exports_report


def test_a_row_says_what_the_export_is_like(tmp_path):
    row = exports.export("squeezenet1_1", "slim", 600)
    assert "error" not in row
    (file,) = row["files"]
    assert file["batches"] == [1, 2, 3]
    assert file["max_rel"] < 1e-4
    assert file["unfolded"] == []
    text = exports_report.markdown({"models": [{"model": "squeezenet1_1", **row}], "runs": [RUN]})
    assert "1 of 1 exports agree with torch at batch 1, 2 and 3: 0 models as built" in text
    assert "and 1 that were slimmed by half, for small images." in text
    assert "| squeezenet1_1 | slim | 2 x 3 x 64 x 64 | dynamo |" in text


RUN = {
    "command": "python exports.py",
    "environment": {"date": "2026-01-31", "cpu": "a CPU", "versions": {"torch": "2", "onnxruntime": "1"}},
}


def test_a_model_that_takes_too_long_is_a_row_with_the_reason():
    row = exports.export("squeezenet1_1", "built", 0.01)
    assert row["error"] == "ended at the time limit of 0.000166667 minutes (during start)"
    assert exports_report.line({"model": "squeezenet1_1", **row}).startswith("squeezenet1_1 built: ended at")


def test_models_that_were_built_for_small_images_alone_are_named():
    file = {"exporter": "dynamo", "opset": 20, "open_axes": [], "max_rel": 0.0, "detections": None, "bytes": 1}
    row = {"files": [{**file, "nodes": 1, "unfolded": []}], "input_shapes": [[1, 3, 8, 8]], "seconds": 1.0}
    models = [("alexnet", "built"), ("alexnet", "small"), ("raft_small", "small")]
    rows = [{"model": name, "variant": variant, **row} for name, variant in models]
    text = exports_report.markdown({"models": rows, "runs": [RUN]})
    assert "1 models as built, and 1 built for small images alone (raft_small); and 0 that" in text


def test_what_cannot_be_exported_is_listed_with_its_reason():
    failed = {"model": "alexnet", "variant": "built", "error": "the exporter knows no such op"}
    text = exports_report.markdown({"models": [failed], "runs": [RUN, RUN]})
    assert "0 of 1 exports" in text
    assert "- `alexnet`, built: the exporter knows no such op\n" in text
    assert ", in 2 runs, whose arguments are in the JSON file.\n" in text


def test_models_that_resize_their_images_are_given_small_ones():
    assert exports_model.source_of("fcos_resnet50_fpn", "built") == "fcos_resnet50_fpn?min_size=320"
    assert exports_model.source_of("ssd300_vgg16", "built") == "ssd300_vgg16"
    assert exports_model.source_of("vit_b_16", "slim") == "vit_b_16?image_size=32"


@pytest.mark.parametrize(("variant", "size"), [("built", 224), ("small", 32), ("slim", 32)])
def test_models_are_given_images_of_the_published_size_and_slim_ones_small_images(variant, size):
    (images,) = exports_model.inputs_of("vit_b_16", exports_model.source_of("vit_b_16", variant), variant, 2)
    assert images.shape == (2, 3, size, size)


def test_rows_that_are_there_are_kept_and_not_made_again(tmp_path, monkeypatch):
    made = []

    def row(name, variant, seconds):
        made.append((name, variant))
        return {"variant": variant, "error": f"made as number {len(made)}"}

    monkeypatch.setattr(exports, "export", row)
    out = tmp_path / "exports.json"
    monkeypatch.setattr(sys, "argv", ["exports.py", "vgg11", "alexnet", "--variants", "built", "--out", str(out)])
    exports.main()
    monkeypatch.setattr(sys, "argv", ["exports.py", "alexnet", "--missing", "--out", str(out)])
    exports.main()
    assert made == [("alexnet", "built"), ("vgg11", "built"), ("alexnet", "small"), ("alexnet", "slim")]
    document = json.loads(out.read_text())
    assert [row["variant"] for row in document["models"]] == ["built", "small", "slim", "built"]
    assert len(document["runs"]) == 2
    assert "made as number 4" in out.with_suffix(".md").read_text()


def test_norms_are_settled_so_that_nothing_explodes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    x = 100 * torch.randn(8, 3, 9, 9)
    settled = exports_model.settled(model, (x,))
    assert 0.5 < settled(x).square().mean() < 2
    assert not any(module._forward_pre_hooks for module in settled.modules())


def test_ours_and_a_plain_export_are_compared():
    brief = {"threads": 1, "sessions": 1, "min_runs": 2, "min_seconds": 0, "warmup": 0.01}
    record = plain_export.measure("squeezenet1_1", 1, brief)
    assert record["ratio"]["low"] <= record["ratio"]["value"] <= record["ratio"]["high"]
    text = plain_export.markdown({**RUN, "measured": [record]})
    assert "`python exports.py`; 2026-01-31, a CPU, torch 2, ONNX Runtime 1. " in text
    assert "| squeezenet1_1 | 1 |" in text
