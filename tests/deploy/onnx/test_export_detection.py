import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from surgery import benchmark, slim, trace
from surgery.deploy.onnx import parity as parity_file
from surgery.deploy.onnx.detections import are_detections, find_unpaired, pair
from surgery.deploy.onnx.export import export_onnx
from surgery.deploy.onnx.parity import Case, parity
from surgery.errors import ExportError, UsageError
from surgery.models import build
from tests.zoo import randomised

SMALL = (
    "fasterrcnn_mobilenet_v3_large_320_fpn?min_size=64&max_size=96&rpn_post_nms_top_n_test=8&box_detections_per_img=4"
)
ALL_SCORES = f"{SMALL}&box_score_thresh=0.0"


def two_images():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 64, 64, generator=generator), torch.rand(3, 72, 60, generator=generator)]


def detections(boxes, scores, labels=None):
    labels = [1] * len(scores) if labels is None else labels
    return {"boxes": np.array(boxes, float).reshape(-1, 4), "scores": np.array(scores), "labels": np.array(labels)}


KEYS = ["boxes", "scores", "labels"]
NEAR, FAR = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 90.0, 100.0]


@pytest.mark.parametrize(
    ("found", "expected", "pairs"),
    [
        (detections([NEAR, FAR], [0.9, 0.5]), detections([NEAR, FAR], [0.9, 0.5]), [(0, 0), (1, 1)]),
        (detections([FAR, NEAR], [0.5, 0.5]), detections([NEAR, FAR], [0.5, 0.5]), [(0, 1), (1, 0)]),
        (detections([NEAR, NEAR], [0.5, 0.5]), detections([NEAR, NEAR], [0.5, 0.5]), [(0, 0), (1, 1)]),
        (detections([NEAR], [0.9], [1]), detections([NEAR], [0.9], [2]), []),
        (detections([NEAR], [0.9]), detections([NEAR], [0.8]), []),
        (detections([NEAR], [0.0101]), detections([NEAR], [0.0102]), []),
        (detections([NEAR, FAR], [0.9, 0.5]), detections([FAR, FAR], [0.9, 0.5]), [(1, 1)]),
        (detections([], []), detections([], []), []),
        (detections([[np.nan] * 4], [0.9]), detections([NEAR], [0.9]), []),
    ],
    ids=[
        "same",
        "tied",
        "doubles",
        "other label",
        "other score",
        "other low score",
        "other box",
        "none",
        "not a number",
    ],
)
def test_detections_are_paired_in_whatever_order_they_come(found, expected, pairs):
    rows, columns = pair(found, expected, 1e-3)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == pairs


def test_as_many_as_can_be_are_paired_where_one_fits_several():
    found = detections([NEAR, NEAR], [0.9, 0.9006])
    expected = detections([NEAR, NEAR], [0.9012, 0.9])
    rows, columns = pair(found, expected, 1e-3)
    assert dict(zip(rows.tolist(), columns.tolist(), strict=True)) == {0: 1, 1: 0}


@pytest.mark.parametrize(
    ("scores", "others", "rows", "alone"),
    [
        ([0.9, 0.5, 0.2, 0.2], [0.9, 0.5, 0.2, 0.2], [0, 1, 2], []),
        ([0.9, 0.5, 0.2, 0.2], [0.9, 0.5, 0.2, 0.2], [0, 2], [0.5, 0.5]),
        ([0.9, 0.5], [0.9, 0.4], [0], [0.5]),
        ([0.2, 0.2, 0.2], [0.2, 0.2, 0.2], [0, 1], []),
        ([0.2, 0.2, 0.2], [0.2, 0.2, 0.2], [0], [0.2] * 4),
        ([], [], [], []),
    ],
    ids=["tied", "not tied", "tied on one side", "all tied", "most alone", "none"],
)
def test_of_those_tied_for_the_last_place_rounding_may_choose(scores, others, rows, alone):
    found, expected = (detections([NEAR] * len(some), some) for some in (scores, others))
    places = np.array(rows, int)
    assert find_unpaired(found, expected, places, places, 1e-3).tolist() == alone


def test_scores_tie_in_terms_of_the_highest():
    low = detections([NEAR, FAR, FAR, FAR], [0.011, 0.0105, 0.0102, 0.01])
    other = detections([NEAR, NEAR, FAR, FAR], [0.011, 0.0105, 0.0102, 0.01])
    rows, columns = pair(low, other, 1e-3)
    assert rows.tolist() == [0, 2, 3]
    assert find_unpaired(low, other, rows, columns, 1e-3).tolist() == [0.0105, 0.0105]


@pytest.mark.parametrize(
    ("outputs", "are"),
    [
        ([{"boxes": torch.zeros(1, 4), "scores": torch.zeros(1), "labels": torch.zeros(1)}], True),
        ([{"boxes": torch.zeros(1, 4), "scores": torch.zeros(1)}], False),
        ([], False),
        (torch.zeros(1), False),
        (
            [{"boxes": torch.zeros(1, 4), "scores": torch.zeros(1), "labels": torch.zeros(1), "x": torch.zeros(2)}],
            False,
        ),
        ([{"boxes": torch.zeros(1, 4), "scores": torch.zeros(1), "labels": torch.zeros(1), "x": None}], False),
        ([{"boxes": torch.zeros(4), "scores": torch.zeros(4), "labels": torch.zeros(4)}], False),
        ([dict.fromkeys(names, torch.zeros(0)) | {"boxes": torch.zeros(0, 4)} for names in (KEYS, KEYS[::-1])], False),
    ],
    ids=[
        *("detections", "no labels", "no image", "tensor"),
        *("something of another length", "something else", "boxes of one axis", "keys of another order"),
    ],
)
def test_detections_are_known_by_their_keys(outputs, are):
    assert are_detections(outputs) is are


def test_an_operated_detection_model_is_exported_for_images_of_any_size(tmp_path):
    model = slim(trace(randomised(build(ALL_SCORES, seed=0)).eval(), (two_images(),), source=ALL_SCORES), 0.75)
    written = export_onnx(model, tmp_path / "m.onnx", dynamic_size=True)
    assert (written.exporter, written.batches) == ("torchscript", (2,))
    assert written.open_axes == ("height_0", "width_0", "height_1", "width_1")
    assert written.image_sizes == ((96, 128),)
    assert written.detections > 0
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images_0", "images_1"]
    assert [value.name for value in session.get_outputs()][:2] == ["output_0_boxes", "output_0_labels"]
    given = [torch.rand(3, 70, 90), torch.rand(3, 64, 80)]
    found = session.run(None, {f"images_{k}": image.numpy() for k, image in enumerate(given)})
    with torch.no_grad():
        expected = model(given)
    np.testing.assert_allclose(np.sort(found[2]), np.sort(expected[0]["scores"].numpy()), atol=1e-5)


def test_where_nothing_is_detected_the_comparison_is_made_without_a_threshold(tmp_path, monkeypatch):
    compared = []
    original = parity_file.parity

    def watched(path, *args):
        compared.append((path, original(path, *args)))
        return compared[-1][1]

    monkeypatch.setattr("surgery.deploy.onnx.export.parity", watched)
    model = trace(randomised(build(f"{SMALL}&box_score_thresh=0.999", seed=0)).eval(), ([two_images()[0]],))
    with torch.no_grad():
        assert not len(model([two_images()[0]])[0]["boxes"])
    written = export_onnx(model, tmp_path / "m.onnx")
    assert [found.detections for _, found in compared] == [0, written.detections]
    assert written.detections > 0
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(written.path, providers=["CPUExecutionProvider"])
    assert session.run(None, {"images_0": two_images()[0].numpy()})[0].shape == (0, 4)  # its threshold is in the file


class Tied(nn.Module):
    """Detects the one of two things that scores higher, by less than float32 tells apart from the other's score."""

    def forward(self, images):
        x = sum(image.sum() for image in images) * 0
        scores = x + torch.tensor([0.5, 0.5 + 2.0**-40], dtype=x.dtype)
        boxes = x + torch.tensor([NEAR, FAR], dtype=x.dtype)
        best = scores.argmax()[None]
        return [{"boxes": boxes[best], "scores": scores[best], "labels": 1 + best}]


def test_where_scores_tie_the_error_says_so(tmp_path):
    given = [torch.zeros(3, 4, 4)]
    path = export_onnx(Detector([FAR], [0.5], [2]), tmp_path / "m.onnx", example_inputs=(given,)).path
    with pytest.raises(ExportError, match=r"have no partner .*torch itself detects other things in float64"):
        parity(path, Tied(), [Case("at batch 1", (given,), {})], 1e-3)


class Detector(nn.Module):
    """Detects what it is told to, in every image."""

    def __init__(self, boxes, scores, labels=None):
        super().__init__()
        told = detections(boxes, scores, labels)
        self.boxes = nn.Buffer(torch.tensor(told["boxes"]).float())
        self.scores = nn.Buffer(torch.tensor(told["scores"]).float())
        self.labels = nn.Buffer(torch.tensor(told["labels"]))

    def forward(self, images):
        shift = sum(image.sum() for image in images) * 0
        return [{"boxes": self.boxes + shift, "scores": self.scores + shift, "labels": self.labels + shift.long()}]


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "message"),
    [
        ([NEAR], [0.9], [1], "image 0 has 2 detections, and 1 in torch"),
        ([NEAR, NEAR], [0.9, 0.4], [1, 1], None),
        ([FAR, FAR], [0.9, 0.4], [1, 1], "1 of 2 detections of image 0, of scores up to 0.9000, have no partner"),
        ([NEAR, FAR], [0.9, 0.4], [2, 1], "of scores up to 0.9000, have no partner"),
        ([NEAR, FAR], [0.8, 0.4], [1, 1], "of scores up to 0.9000, have no partner"),
        ([FAR, NEAR], [0.4, 0.9], [1, 1], None),
        ([FAR, NEAR], [0.9, 0.4], [1, 1], "2 of 2 detections of image 0, of scores up to 0.9000, have no partner"),
    ],
    ids=["fewer", "last box", "first box", "label", "score", "order", "all"],
)
def test_a_file_that_detects_something_else_is_found_out(boxes, scores, labels, message, tmp_path):
    given = [torch.zeros(3, 4, 4)]
    right = Detector([NEAR, FAR], [0.9, 0.4], [1, 1])
    path = export_onnx(right, tmp_path / "m.onnx", example_inputs=(given,)).path
    cases = [Case("at batch 1", (given,), {})]
    other = Detector(boxes, scores, labels)
    if message is None:
        assert parity(path, other, cases, 1e-3).max_rel <= 1e-3
    else:
        with pytest.raises(ExportError, match=message):
            parity(path, other, cases, 1e-3)


def test_an_export_of_which_nothing_could_be_compared_is_an_error(tmp_path):
    class Blind(Detector):
        def forward(self, images):
            seen = self.scores > 1 + images[0].mean().abs()
            return [{key: value[seen] for key, value in super().forward(images)[0].items()}]

    given = ([torch.zeros(3, 4, 4)],)
    with pytest.raises(ExportError, match=r"nothing was detected on the example inputs, .*verify=False"):
        export_onnx(Blind([NEAR], [0.9]), tmp_path / "m.onnx", example_inputs=given)
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(Blind([NEAR], [0.9]), tmp_path / "m.onnx", example_inputs=given, verify=False).detections is None


def test_a_list_of_images_has_no_batch_axis(tmp_path):
    with pytest.raises(UsageError, match="each image is an input of its own"):
        export_onnx(
            Detector([NEAR], [0.9]), tmp_path / "m.onnx", example_inputs=([torch.zeros(3, 4, 4)],), dynamic_batch=True
        )


def test_a_detection_model_is_measured_at_the_batch_asked_for():
    given = ([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)],)
    options = {"threads": 1, "min_runs": 5, "min_seconds": 0, "sessions": 2, "memory": False}
    result = benchmark(Detector([NEAR], [0.9]), example_inputs=given, batch_size=3, **options)
    assert result.input_shapes == ((3, 4, 4),) * 3


def test_the_graph_names_no_file_of_this_machine(tmp_path):
    path = export_onnx(Detector([NEAR], [0.9]), tmp_path / "m.onnx", example_inputs=([torch.zeros(3, 4, 4)],)).path
    assert b".py" not in path.read_bytes()
    onnx.checker.check_model(path, full_check=True)
