"""The sizes to which an exported model resizes its images."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import surgery
from surgery.deploy.onnx import exporters
from surgery.deploy.onnx.sizes import sizes_in_float64
from surgery.errors import ExportError


class Resizes(nn.Module):
    """As detection models resize an image, (1, 3, H, W), of which the shorter side is to have so many pixels."""

    def __init__(self, pixels):
        super().__init__()
        self.transform = GeneralizedRCNNTransform(pixels, 1333, [0.4] * 3, [0.2] * 3)

    def forward(self, x):
        return self.transform([x[0]])[0].tensors


WRONG_IN_FLOAT32 = (320, 800)


def test_an_image_gets_the_size_that_it_has_in_torch(tmp_path, monkeypatch):
    pixels, side = WRONG_IN_FLOAT32
    given = {"example_inputs": torch.rand(1, 3, side, side), "dynamic_batch": False, "exporter": "torchscript"}
    written = surgery.export_onnx(Resizes(pixels), tmp_path / "m.onnx", **given)
    assert written.max_rel < 1e-5
    assert not {"Reciprocal", "Floor"} & reads_float32(onnx.load(written.path).graph)
    monkeypatch.setattr(exporters, "sizes_in_float64", lambda model: None)
    with pytest.raises(ExportError, match=r"at batch 1, output .* differs from torch by [1-9]"):
        surgery.export_onnx(Resizes(pixels), tmp_path / "n.onnx", **given)


def reads_float32(graph):
    """The kinds of nodes that read what was cast to float32."""
    cast = {n.output[0] for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.FLOAT}
    return {node.op_type for node in graph.node if cast & set(node.input)}


def test_an_open_size_is_computed_alike_for_every_image(tmp_path):
    pixels, side = WRONG_IN_FLOAT32
    model = Resizes(pixels)
    given = {"example_inputs": torch.rand(1, 3, 96, 128), "dynamic_batch": False, "exporter": "torchscript"}
    written = surgery.export_onnx(model, tmp_path / "m.onnx", dynamic_size=True, **given)
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    for height, width in [(side, side), (600, 640), (333, 721), (97, 480), (1, 9)]:
        x = torch.rand(1, 3, height, width)
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, model(x).numpy(), atol=5e-3)  # a pixel less makes a difference of 1


@pytest.mark.parametrize("elsewhere", ["", "read", "given out"])
def test_what_is_not_computed_from_sizes_alone_or_not_for_sizes_alone_stays(elsewhere):
    """A scale that is an input, or one that is also read by another node or an output."""
    x, scale = ir.val("x", ir.DataType.FLOAT, [1, 1, 8, 8]), ir.val("scale", ir.DataType.FLOAT, [4])
    sides = ir.node("Constant", [], {"value": ir.tensor(np.array([1.0, 1.0, 4.0, 4.0], np.float32))})
    factor = ir.node("Identity", [sides.outputs[0]]) if elsewhere else ir.node("Identity", [scale])
    floor = ir.node("Floor", [factor.outputs[0]])
    cast = ir.node("Cast", [floor.outputs[0]], {"to": ir.DataType.INT64})
    resize = ir.node("Resize", [x, None, None, cast.outputs[0]])
    outputs = [resize.outputs[0], *([floor.outputs[0]] if elsewhere == "given out" else [])]
    reader = [ir.node("Abs", [floor.outputs[0]])] if elsewhere == "read" else []
    nodes = [sides, factor, floor, cast, resize, *reader]
    graph = ir.Graph([x, scale], outputs, nodes=nodes, opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    before = [node.op_type for node in graph]
    sizes_in_float64(model)
    assert [node.op_type for node in graph] == before
    assert sides.attributes["value"].as_tensor().dtype == ir.DataType.FLOAT
    assert factor.inputs[0] is (sides.outputs[0] if elsewhere else scale)
