import copy
import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.exports.model import settled
from surgery.deploy.onnx import export as export_file
from surgery.deploy.onnx import parity as parity_file
from surgery.deploy.onnx.export import export_onnx
from surgery.deploy.onnx.parity import Case
from surgery.edit.recipe import Recipe, recipe
from surgery.errors import ExportError, UsageError
from surgery.graph.tracing import trace
from surgery.models import CATALOGUE, build
from surgery.operations.slim import slim

ONE_OF_EACH_FAMILY = {
    "alexnet": 96,
    "vgg11_bn": 32,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "googlenet?init_weights=false": 64,
    "inception_v3?init_weights=false&aux_logits=false": 80,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "convnext_tiny": 64,
    "vit_b_16?image_size=32": 32,
    "swin_t": 64,
}
SEGMENTATION = {"FCN", "DeepLabV3", "LR-ASPP"}
NO_SMALL_INPUT = {"MaxViT"}
OF_OTHERS_PARTS = {"Swin Transformer v2"}


def run(path, *values):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, {name: value.numpy() for name, value in zip(names, values, strict=True)})


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 16, 5))


def images(batch, size, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small_input(batch=2):
    return images(batch, 6)


def test_the_families_above_are_all_classifiers_of_images():
    """But for those of the same parts as another; models of other kinds are not exported here."""
    exported = {CATALOGUE[source.partition("?")[0]].family for source in ONE_OF_EACH_FAMILY}
    images = {entry.family for entry in CATALOGUE.values() if entry.kind == "image" and "quantiz" not in entry.family}
    assert exported == images - SEGMENTATION - NO_SMALL_INPUT - OF_OTHERS_PARTS


@pytest.mark.parametrize(("source", "size"), ONE_OF_EACH_FAMILY.items())
def test_the_onnx_file_computes_what_the_model_computes_at_batches_1_2_and_3(source, size, tmp_path):
    model = settled(build(source, num_classes=10, seed=0).eval(), (images(32, size, seed=9),))
    written = export_onnx(trace(model, images(1, size)), tmp_path / "model.onnx")
    assert written.batches == (1, 2, 3)
    for batch in (1, 2, 3):
        x = images(batch, size, seed=batch)
        with torch.no_grad():
            expected = model(x).numpy()
        (found,) = run(written.path, x)
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_result_says_what_was_written_and_how_close_it_is(tmp_path):
    written = export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input())
    assert written.path == tmp_path / "small.onnx"
    assert written.bytes == written.path.stat().st_size
    assert written.opset == onnx.load(written.path).opset_import[0].version
    assert 0 <= written.max_abs < 1e-5
    assert 0 <= written.max_rel < 1e-5
    assert json.loads(json.dumps(written.to_dict()))["batches"] == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]


def test_a_module_in_training_is_exported_in_eval_mode_and_stays_as_it_was(tmp_path):
    model = small().train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    written = export_onnx(model, tmp_path / "small.onnx", example_inputs=small_input())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(small_input(4)).numpy()
    np.testing.assert_allclose(run(written.path, small_input(4))[0], expected, atol=1e-5)


class Applies(nn.Module):
    """A linear layer and whatever a test does with it."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x), x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y, x: y * 2 if x.shape[0] == 1 else y, "at batch 1, output 'output' differs from torch by"),
        (lambda y, x: y / int(x.shape[0]), "at batch 1, ONNX Runtime fails"),
        (lambda y, x: y + torch.rand(3), "differs from torch by"),
        (
            lambda y, x: y.view(4, 3),
            "exported by dynamo: .* exported by torchscript: .*dynamic_batch=False fixes",
        ),
    ],
    ids=["branches on the batch", "bakes the batch in", "is random", "takes one batch size only"],
)
def test_an_export_that_does_not_match_at_every_batch_is_an_error_and_leaves_no_file(function, message, tmp_path):
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(Applies(function), tmp_path / "model.onnx", example_inputs=torch.randn(4, 4))
    assert "\n" not in str(caught.value)
    assert "torch itself" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_rtol_is_the_relative_error_that_passes(tmp_path):
    with pytest.raises(ExportError, match="rtol is 1e-12"):
        export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), rtol=1e-12)


def test_a_difference_no_larger_than_torchs_own_rounding_is_said_to_be_that(tmp_path):
    with pytest.raises(ExportError, match="off its own float64: more cannot be asked of this model; raise rtol"):
        export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), rtol=1e-12)


def test_a_model_that_changes_with_each_call_is_not_said_to_round(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(ExportError, match="differs from torch by") as caught:
        export_onnx(Counts(), tmp_path / "m.onnx", example_inputs=torch.randn(2, 4))
    assert "torch itself" not in str(caught.value)


def test_without_verification_no_error_is_claimed(tmp_path):
    written = export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), verify=False)
    assert (written.max_abs, written.max_rel, written.batches) == (None, None, ())


def test_a_fixed_batch_is_that_of_the_inputs_and_is_the_one_checked(tmp_path):
    model = Applies(lambda y, x: y.view(4, 3))
    written = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(4, 4), dynamic_batch=False)
    assert written.batches == (4,)
    assert onnx.load(written.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_the_open_axis_is_called_batch(tmp_path):
    graph = onnx.load(export_onnx(small(), tmp_path / "s.onnx", example_inputs=small_input()).path).graph
    for value in (graph.input[0], graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


Pair = namedtuple("Pair", ["logits", "aux"])


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda y, x: y, ["output"]),
        (lambda y, x: (None, y, x * 2), ["output_1", "output_2"]),
        (lambda y, x: {"out": y, "aux": [x * 2, x + 1]}, ["out", "aux_0", "aux_1"]),
        (lambda y, x: Pair(y, x.sum(1)), ["logits", "aux"]),
        (lambda y, x: {"x": x * 2, "a b": y, "a_b": y + 1}, ["x_", "a_b", "a_b_"]),
    ],
    ids=["tensor", "tuple", "dict", "namedtuple", "clashes"],
)
def test_outputs_are_named_after_the_keys_that_lead_to_them(function, names, tmp_path):
    model = Applies(function)
    written = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 4))
    assert [value.name for value in onnx.load(written.path).graph.output] == names


class TakesNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale, shift=None, negate=False):
        y = self.linear(x) * scale - shift
        return -y if negate else y


def test_named_inputs_arrive_whatever_their_order(tmp_path):
    named = {"negate": True, "shift": torch.randn(2, 3), "scale": torch.randn(2, 1)}
    model = TakesNames()
    written = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 4), kwargs=named)
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    x = torch.randn(2, 4)
    found = session.run(None, {"x": x.numpy(), "shift": named["shift"].numpy(), "scale": named["scale"].numpy()})
    np.testing.assert_allclose(found[0], model(x, **named).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0, 8.0], [1.0, 2.0, 10.0], (2.0, 0.2)),
        ([0.0], [0.5], (0.5, 1.0)),
        ([0.5], [0.0], (0.5, np.inf)),
        ([-np.inf, 8.0], [-np.inf, 10.0], (2.0, 0.2)),
        ([np.inf, 10.0], [-np.inf, 10.0], (np.inf, np.inf)),
        ([1e30, 10.0], [np.inf, 10.0], (np.inf, np.inf)),
        ([np.nan, 10.0], [1.0, 10.0], (np.nan, np.nan)),
        ([np.nan], [0.0], (np.nan, np.nan)),
        ([50_001, 3], [50_000, 3], (1.0, 1.0)),
        ([True, False], [True, True], (1.0, 1.0)),
        ([], [], (0.0, 0.0)),
    ],
    ids=[
        *("floats", "from zero", "of zero", "infinite on both sides", "other sign", "finite on one side"),
        *("not a number", "nor zero", "whole numbers", "truth values", "empty"),
    ],
)
def test_a_difference_is_that_of_the_outputs_in_terms_of_the_largest(found, expected, difference, recwarn):
    np.testing.assert_array_equal(parity_file.difference(np.array(found), np.array(expected)), difference)
    assert not list(recwarn)


def test_a_mask_of_infinities_is_no_difference(tmp_path):
    model = Applies(lambda y, x: y.masked_fill(torch.tensor([True, False, True]), -torch.inf))
    assert export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 4)).max_rel < 1e-5


@pytest.mark.parametrize(
    ("model", "dtype", "message"),
    [
        (
            Applies(lambda y, x: y * torch.nan),
            torch.float32,
            "give example inputs that the model has finite outputs on",
        ),
        (Applies(lambda y, x: y.to(torch.float8_e4m3fn)), torch.float32, "numpy lacks a dtype of it: .*Float8"),
        (nn.Conv2d(3, 4, 3).double(), torch.float64, r"\(the model is in torch.float64: export module.float\(\)\)"),
    ],
    ids=["not a number", "8 bits", "float64"],
)
def test_what_cannot_be_compared_is_an_error_that_says_why(model, dtype, message, tmp_path):
    given = torch.ones(2, 3, 4, 4, dtype=dtype) if isinstance(model, nn.Conv2d) else torch.ones(2, 4)
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(model, tmp_path / "m.onnx", example_inputs=given)
    assert "raise rtol" not in str(caught.value)


def test_integer_inputs_stay_integers(tmp_path):
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten())
    written = export_onnx(model, tmp_path / "m.onnx", example_inputs=torch.randint(0, 7, (2, 5)))
    assert written.max_abs == 0.0


@pytest.mark.parametrize("dynamic_batch", [True, False])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_module_that_writes_into_its_input_is_exported_and_the_example_inputs_stay_as_they_are(
    exporter, dynamic_batch, tmp_path
):
    model = nn.Sequential(nn.Hardswish(inplace=True), nn.Linear(4, 3))
    given = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    before = given.clone()
    written = export_onnx(
        model, tmp_path / "m.onnx", example_inputs=given, exporter=exporter, dynamic_batch=dynamic_batch
    )
    assert torch.equal(given, before)
    np.testing.assert_allclose(run(written.path, given)[0], model(given.clone()).detach().numpy(), atol=1e-5)


def test_the_file_says_where_it_comes_from_and_nothing_of_this_machine(tmp_path):
    traced = trace(small(), small_input(), source="package.module:small")
    written = export_onnx(traced, tmp_path / "small.onnx", metadata={"dataset": "digits"})
    notes = {entry.key: entry.value for entry in onnx.load(written.path).metadata_props}
    assert notes["surgery.source"] == "package.module:small"
    assert notes["surgery.recipe_sha256"] == hashlib.sha256(recipe(traced).to_json().encode()).hexdigest()
    assert notes["surgery.torch"] == torch.__version__
    assert notes["surgery.macs"] == str(8 * 27 * 16 + 8 * 16 * 5)
    assert notes["dataset"] == "digits"
    assert b".py" not in written.path.read_bytes()
    assert not onnx.load(written.path).graph.metadata_props


def test_an_untraced_module_has_no_source_to_note(tmp_path):
    written = export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input())
    notes = {entry.key for entry in onnx.load(written.path).metadata_props}
    assert notes == {f"surgery.{key}" for key in ("version", "torch", "onnx", "exporter", "macs", "params")}


def test_what_the_exporter_prints_logs_and_warns_of_stays_inside(tmp_path, monkeypatch, capfd, caplog, recwarn):
    exporter = torch.onnx.export

    def chatty(*args, **options):
        print("chatter")
        warnings.warn("chatter", stacklevel=1)
        logging.getLogger("torch.onnx").error("chatter")
        return exporter(*args, **options)

    monkeypatch.setattr(torch.onnx, "export", chatty)
    export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input())
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)
    assert "chatter" not in caplog.text
    assert logging.root.manager.disable == logging.NOTSET


def test_an_exporter_that_fails_prints_nothing(tmp_path):
    code = f"""
        import torch
        from surgery.deploy.onnx.export import export_onnx
        from surgery.errors import ExportError

        class Fails(torch.nn.Module):
            def forward(self, x):
                y = x if x.sum() > 0 else -x
                return torch.complex(y, y)

        try:
            export_onnx(Fails(), {str(tmp_path / "m.onnx")!r}, example_inputs=torch.ones(2, 2))
        except ExportError:
            raise SystemExit(7)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_the_opset_asked_for_is_the_opset_written(tmp_path):
    written = export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), opset=18)
    assert written.opset == 18
    assert onnx.load(written.path).opset_import[0].version == 18


def test_an_opset_too_old_for_the_newer_exporter_is_had_from_the_older_one(tmp_path):
    written = export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), opset=13)
    assert (written.opset, written.exporter, written.batches) == (13, "torchscript", (1, 2, 3))


def test_an_opset_that_cannot_be_had_is_an_error(tmp_path):
    with pytest.raises(ExportError, match=r"opset 5 cannot be had: the dynamo exporter made opset 18; .*torchscript"):
        export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), opset=5)
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_is_unknown_is_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown exporter 'dynamic'; did you mean 'dynamo'"):
        export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), exporter="dynamic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": -1}, "opset must be a whole number of at least 1, not -1"),
        ({"opset": 0}, "opset must be a whole number of at least 1, not 0"),
        ({"opset": "18"}, "opset must be a whole number of at least 1, not '18'"),
        ({"rtol": -1.0}, r"rtol must be a number of at least 0, not -1.0"),
        ({"rtol": float("nan")}, "rtol must be a number of at least 0, not nan"),
        ({"rtol": float("inf")}, "rtol must be a number of at least 0, not inf"),
        ({"rtol": "1e-4"}, "rtol must be a number of at least 0, not '1e-4'"),
        ({"metadata": {"epoch": 3}}, "the keys and values of metadata must be strings, not {'epoch': 3}"),
    ],
    ids=lambda value: f"{value}" if isinstance(value, dict) else "",
)
def test_an_option_that_means_nothing_is_refused(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), **options)


def nodes(path, *types):
    return [node for node in onnx.load(path).graph.node if node.op_type in types]


class Norms(nn.Module):
    """A norm behind a convolution, one before it, and one behind it whose input is needed elsewhere, too."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.behind, self.before = nn.Conv2d(3, 4, 3), norm(4), norm(4)
        self.other, self.shared = nn.Conv2d(4, 4, 1), norm(4)
        for norm in (self.behind, self.before, self.shared):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        y = self.other(self.before(self.behind(self.conv(x)).relu()).relu())
        return self.shared(y) * y.sigmoid()


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d], ids=["batch norm", "frozen batch norm"])
def test_a_norm_is_folded_into_the_convolution_before_it_where_nothing_else_reads_that(norm, exporter, tmp_path):
    model = Norms(norm)
    path = export_onnx(model, tmp_path / "m.onnx", example_inputs=images(2, 6), exporter=exporter).path
    found = nodes(path, "Conv", "BatchNormalization", "Relu", "Mul", "Sub")
    assert [node.op_type for node in found] == [
        *("Conv", "Relu", "BatchNormalization", "Relu", "Conv", "BatchNormalization", "Mul")
    ]
    assert type(model.behind) is norm


@pytest.mark.parametrize("where", ["forward hook", "forward pre-hook"])
def test_a_frozen_norm_with_a_hook_is_exported_with_it(where, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
    if where == "forward hook":
        model[1].register_forward_hook(lambda module, given, output: output * 3)
    else:
        model[1].register_forward_pre_hook(lambda module, given: (given[0] * 3,))
    path = export_onnx(model, tmp_path / "m.onnx", example_inputs=images(2, 6)).path
    np.testing.assert_allclose(run(path, images(2, 6))[0], model(images(2, 6)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("resnet18", "only a module can be exported, not 'resnet18'"),
        (nn.Linear(4, 3, device="meta"), "Linear cannot be copied to the CPU: Cannot copy out of meta tensor"),
        (Applies(threading.Lock()), "Applies cannot be copied to the CPU: cannot pickle"),
    ],
    ids=["a name", "no data", "not to be copied"],
)
def test_what_is_no_module_or_cannot_be_copied_is_refused(module, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_onnx(module, tmp_path / "m.onnx", example_inputs=torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_height_and_width_can_be_left_open(exporter, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    options = {"example_inputs": images(2, 8), "exporter": exporter}
    written = export_onnx(model, tmp_path / "m.onnx", **options, dynamic_size=True)
    assert written.open_axes == ("batch", "height", "width")
    assert written.image_sizes == ((40, 72),)
    x = torch.randn(3, 3, 11, 17)
    np.testing.assert_allclose(run(written.path, x)[0], model(x).detach().numpy(), atol=1e-5)
    fixed = export_onnx(model, tmp_path / "fixed.onnx", **options)
    assert fixed.open_axes == ("batch",)
    assert [axis.dim_value for axis in onnx.load(fixed.path).graph.input[0].type.tensor_type.shape.dim] == [0, 3, 8, 8]


def test_images_of_one_size_share_the_names_of_their_axes(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b, c):
            return a + b, c * 2

    given = (images(2, 8), images(2, 8), torch.randn(2, 3, 4, 6))
    written = export_onnx(Two(), tmp_path / "m.onnx", example_inputs=given, dynamic_size=True)
    assert written.open_axes == ("batch", "height", "width", "height_1", "width_1")


def test_an_image_size_that_cannot_be_open_is_an_error_and_leaves_no_file(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 36, 2))
    with pytest.raises(ExportError, match=r"^the module runs .* but not on images of 38 x 70: [^;]*$"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=small_input(), dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_an_image_size_is_left_open_only_of_images(tmp_path):
    with pytest.raises(UsageError, match="none of the example inputs is an image"):
        export_onnx(nn.Linear(4, 3), tmp_path / "m.onnx", example_inputs=torch.randn(2, 4), dynamic_size=True)


def test_what_the_newer_exporter_cannot_prove_the_older_one_exports(tmp_path):
    class Halves(nn.Module):
        def forward(self, a, b):
            first, second = torch.cat([a, b]).chunk(2)
            return first - second

    given = (torch.randn(2, 4), torch.randn(2, 4))
    written = export_onnx(Halves(), tmp_path / "m.onnx", example_inputs=given)
    assert (written.exporter, written.batches, written.open_axes) == ("torchscript", (1, 2, 3), ("batch",))
    with pytest.raises(ExportError, match=r"dynamic_batch=False fixes the batch"):
        export_onnx(Halves(), tmp_path / "n.onnx", example_inputs=given, exporter="dynamo")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_both_exporters_take_nested_and_named_inputs_by_the_same_names(exporter, tmp_path):
    class Nested(nn.Module):
        def forward(self, pair, *more, scale, bias=None, twice=False):
            y = pair["a"] + more[0] * scale
            return {"sum": y * 2 if twice else y, "none": bias, "pair": (y, y.sum())}

    x = torch.randn(2, 4)
    written = export_onnx(
        Nested(),
        tmp_path / "m.onnx",
        example_inputs=({"a": x}, x + 1),
        kwargs={"twice": True, "scale": x * 2},
        exporter=exporter,
    )
    graph = onnx.load(written.path).graph
    assert {value.name for value in graph.input} == {"pair_a", "more_0", "scale"}
    assert [value.name for value in graph.output] == ["sum", "pair_0", "pair_1"]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_tensor_given_twice_is_two_inputs(exporter, tmp_path):
    class Both(nn.Module):
        def forward(self, a, b):
            return a - b.relu()

    x = torch.randn(2, 4)
    written = export_onnx(Both(), tmp_path / "m.onnx", example_inputs=(x, x), exporter=exporter)
    given = onnx.load(written.path).graph.input
    assert [(value.name, value.type.tensor_type.shape.dim[0].dim_param) for value in given] == [
        *(("a", "batch"), ("b", "batch"))
    ]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_an_axis_that_is_as_long_as_the_batch_is_in_the_export_is_not_open_for_that(exporter, tmp_path):
    class Sums(nn.Module):
        def forward(self, x, pair):
            return x + pair.sum(0)

    given = (torch.randn(1, 4), torch.randn(2, 4))
    path = export_onnx(Sums(), tmp_path / "m.onnx", example_inputs=given, exporter=exporter).path
    dims = [value.type.tensor_type.shape.dim[0] for value in onnx.load(path).graph.input]
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 2]


@pytest.mark.parametrize("x", [torch.tensor(3.0), torch.zeros(0, 4)], ids=["no axis", "an empty axis"])
def test_inputs_without_a_batch_are_exported_for_a_fixed_one_only(x, tmp_path):
    with pytest.raises(UsageError, match=r"no batch axis to leave open.* pass dynamic_batch=False \(--fixed-batch\)"):
        export_onnx(nn.ReLU(), tmp_path / "m.onnx", example_inputs=x)
    assert export_onnx(nn.ReLU(), tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False).max_abs == 0


def test_a_recipe_goes_into_the_file_unless_it_is_long(tmp_path, monkeypatch):
    traced = slim(trace(small(), small_input()), 0.5)
    notes = {e.key: e.value for e in onnx.load(export_onnx(traced, tmp_path / "a.onnx").path).metadata_props}
    assert Recipe.from_json(notes["surgery.recipe"]).to_json() == recipe(traced).to_json()
    monkeypatch.setattr(export_file, "_INLINE_RECIPE", 10)
    notes = {e.key for e in onnx.load(export_onnx(traced, tmp_path / "b.onnx").path).metadata_props}
    assert "surgery.recipe_sha256" in notes
    assert "surgery.recipe" not in notes


READ = r"by torchscript: its Python reads numbers that depend on the inputs \(test_export\.py:\d+\), and the file would"


def halved_in(y, x):
    total = torch.zeros(2)
    total[0].add_(y.sum())
    return y / 2 if total.max() > -1e9 else y


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: -y if x.sum() > -1e9 else y,
        lambda y, x: y * x.T.abs().max().item(),
        lambda y, x: y + len(x.mean(1).tolist()),
        halved_in,
    ],
    ids=["a branch", "a number", "a list", "written in place"],
)
def test_what_python_reads_of_the_inputs_is_never_recorded(tmp_path, function):
    """Neither batches nor other values tell: all of these read the same on all of them, or nearly."""
    path = tmp_path / "m.onnx"
    given = {"example_inputs": torch.rand(2, 4), "exporter": "torchscript"}
    with pytest.raises(ExportError, match=READ):
        export_onnx(Applies(function), path, **given)
    assert not list(tmp_path.iterdir())
    assert export_onnx(Applies(function), path, verify=False, **given).exporter == "torchscript"


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: -y if len(x) > 0 and y.shape[1] == 3 and y.numel() else y,
        lambda y, x: y * float(torch.ones(3).sum()) if torch.zeros_like(x).sum() == 0 else y,
    ],
    ids=["sizes", "constants"],
)
def test_what_python_reads_of_sizes_and_constants_may_be_recorded(tmp_path, function):
    given = {"example_inputs": torch.rand(2, 4), "exporter": "torchscript"}
    assert export_onnx(Applies(function), tmp_path / "m.onnx", **given).max_rel < 1e-5


def test_a_branch_on_how_many_values_there_are_is_found_out(tmp_path):
    """Such a number is a size, as those are by which detection models go, where what comes of it is the same."""
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = Applies(lambda y, x: y * 2 if len(x.relu().nonzero()) == positive else y)
    positive = int((x > 0).sum())
    with pytest.raises(ExportError, match="on other values, output 'output' differs from torch by"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False, exporter="torchscript")


def test_wrong_weights_are_found_out_though_the_example_inputs_are_zero(tmp_path, monkeypatch):
    convert = export_file.convert

    def spoilt(exporter, order):
        other = copy.deepcopy(order.model)
        other.linear.weight.data *= 1.01
        return convert(exporter, dataclasses.replace(order, model=other))

    monkeypatch.setattr(export_file, "convert", spoilt)
    with pytest.raises(ExportError, match="on other values, output 'output' differs from torch by"):
        export_onnx(Applies(lambda y, x: y), tmp_path / "m.onnx", example_inputs=torch.zeros(2, 4))


def test_other_values_are_not_compared_where_rounding_decides_what_comes_out(tmp_path):
    class Chaotic(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(512, 8, bias=False)

        def forward(self, x):
            return torch.sin(1e8 * self.linear(x))

    assert export_onnx(Chaotic(), tmp_path / "m.onnx", example_inputs=torch.zeros(2, 512)).max_abs == 0.0
    with pytest.raises(ExportError, match=r"torch itself is .* off its own float64"):
        export_onnx(Chaotic(), tmp_path / "n.onnx", example_inputs=torch.randn(2, 512))


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_a_file_that_gives_no_number_where_the_module_gives_one_is_wrong_on_other_values_too(tmp_path):
    x = -torch.ones(2, 3)
    path = export_onnx(Root(), tmp_path / "m.onnx", example_inputs=-x).path
    other = Case("on other values", (x,), {}, optional=True)
    with pytest.raises(ExportError, match=r"on other values, .* one of the two is not a number"):
        parity_file.parity(path, nn.ReLU(), [other], 1e-4)
    assert parity_file.parity(path, Root(), [other], 1e-4).max_abs == 0.0  # neither has numbers: nothing is known


def test_values_that_a_module_refuses_are_not_held_against_it(tmp_path):
    class Increasing(nn.Module):
        def forward(self, x):
            if not torch.compiler.is_compiling() and not (x.diff() > 0).all():
                raise ValueError("not increasing")
            return x * 2

    model, x = Increasing(), torch.arange(8.0).reshape(1, 8)
    written = export_onnx(model, tmp_path / "m.onnx", example_inputs=x, dynamic_batch=False)
    assert written.max_abs == 0.0


def test_an_export_that_is_killed_leaves_nothing_at_its_path(tmp_path):
    code = f"""
        import os, torch
        from torch import nn
        from surgery.deploy.onnx import export
        export.parity = lambda *_: os.kill(os.getpid(), 9)
        export.export_onnx(nn.Linear(2, 2), {str(tmp_path / "m.onnx")!r}, example_inputs=torch.zeros(2, 2))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "m.onnx").exists()


def test_weights_too_large_for_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_file, "_INLINE_LIMIT", 1000)
    written = export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["small.onnx", "small.onnx.data"]
    assert written.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    with torch.no_grad():
        expected = small().eval()(small_input()).numpy()
    np.testing.assert_allclose(run(written.path, small_input())[0], expected, atol=1e-5)


def test_a_file_where_the_weights_would_go_is_replaced_only_by_force(tmp_path, monkeypatch):
    monkeypatch.setattr(export_file, "_INLINE_LIMIT", 1000)
    data = tmp_path / "small.onnx.data"
    data.write_text("precious")
    with pytest.raises(UsageError, match=r"small\.onnx\.data exists; pass force=True"):
        export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input())
    assert [file.name for file in tmp_path.iterdir()] == [data.name]
    assert data.read_text() == "precious"
    export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), force=True)
    onnx.checker.check_model(tmp_path / "small.onnx")


def test_a_smaller_export_takes_the_weights_of_the_larger_one_away(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export_file, "_INLINE_LIMIT", 1000)
        export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input())
    export_onnx(small(), tmp_path / "small.onnx", example_inputs=small_input(), force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]
    onnx.checker.check_model(tmp_path / "small.onnx")


def test_a_run_killed_while_it_replaces_leaves_no_graph_with_the_weights_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(export_file, "_INLINE_LIMIT", 1000)
    path = tmp_path / "small.onnx"
    export_onnx(small(), path, example_inputs=small_input())
    original = export_file.os.replace

    def killed_between(source, target):
        original(source, target)
        if Path(target).parent == tmp_path:
            raise KeyboardInterrupt

    monkeypatch.setattr(export_file.os, "replace", killed_between)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(small(), path, example_inputs=small_input(), force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx.data"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "small.onnx"
    original = export_file.parity

    def slowly(*args):
        path.write_text("precious")
        return original(*args)

    monkeypatch.setattr(export_file, "parity", slowly)
    with pytest.raises(UsageError, match=r"small\.onnx exists; pass force=True"):
        export_onnx(small(), path, example_inputs=small_input())
    assert path.read_text() == "precious"


def test_a_pipe_is_not_replaced_even_by_force(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="it is not a regular file"):
        export_onnx(small(), tmp_path / "pipe", example_inputs=small_input(), force=True)
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_that_exists_is_replaced_only_by_force_and_only_by_a_good_one(tmp_path):
    path = tmp_path / "small.onnx"
    path.write_text("precious")
    with pytest.raises(UsageError, match=r"small\.onnx exists; pass force=True"):
        export_onnx(small(), path, example_inputs=small_input())
    with pytest.raises(ExportError):
        export_onnx(small(), path, example_inputs=small_input(), force=True, rtol=0.0)
    assert path.read_text() == "precious"
    export_onnx(small(), path, example_inputs=small_input(), force=True)
    onnx.checker.check_model(path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        export_onnx(small(), tmp_path / "missing" / "small.onnx", example_inputs=small_input())


def test_inputs_of_a_wrong_shape_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be run on these inputs \(\(2, 5\)\)"):
        export_onnx(nn.Linear(4, 3), tmp_path / "m.onnx", example_inputs=torch.randn(2, 5))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_named_like_an_onnx_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"x\.txt: the name of an ONNX file ends in \.onnx"):
        export_onnx(small(), tmp_path / "x.txt", example_inputs=small_input())
    assert list(tmp_path.iterdir()) == []
