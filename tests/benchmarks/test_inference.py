import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from benchmarks.inference import __main__ as inference
from benchmarks.inference import aa as aa
from benchmarks.inference import report as inference_report
from benchmarks.inference.profile import time_by_operator
from surgery.deploy.measure.benchmark import compare
from surgery.deploy.measure.environment import environment
from surgery.errors import UsageError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 5))
    surgery.export_onnx(model, path, example_inputs=torch.randn(2, 3, 6, 6))
    return path


def test_the_profile_names_the_operators_that_a_file_runs(file):
    found = time_by_operator(file, [np.zeros((2, 3, 6, 6), np.float32)], threads=1, runs=2)
    assert {"MaxPool", "Gemm"} <= set(found)
    assert any("Conv" in name for name in found)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(ms >= 0 for ms in found.values())


def test_a_profile_of_inputs_that_do_not_fit_is_refused(file):
    with pytest.raises(UsageError, match=r"small.onnx cannot be profiled: .*INVALID_ARGUMENT"):
        time_by_operator(file, [np.zeros((2, 3, 9, 9), np.float32)], threads=1)


def test_an_a_a_run_is_recorded_with_what_its_sessions_differ_by(file):
    options = {"threads": 1, "min_runs": 30, "min_seconds": 0.0, "warmup": 0.0, "memory": False, "check": False}
    run = aa.record(compare({"a": file, "b": file}, sessions=6, **options))
    assert len(run["samples_ms"]["a"]) == sum(run["session_runs"]) == 30
    assert run["contains_1"] == (run["low"] <= 1 <= run["high"])
    assert run["sessions_sd"] > 0
    settings = {"source": "small"}
    text = aa.markdown({"command": "x", "environment": environment().to_dict(), "settings": settings, "runs": [run]})
    assert f"**{int(run['contains_1'])} of 1 intervals hold 1**" in text


def measured(**changes):
    points = {
        "1.0": {"macs": 400, "p50_ms": 10.0, "p99_ms": 12.0, "throughput": 100.0, "macs_ratio": 1.0},
        "0.5": {
            "macs": 100, "p50_ms": 5.0, "p99_ms": 6.0, "throughput": 200.0, "macs_ratio": 4.0,
            "speedup": {"value": 2.0, "low": 1.9, "high": 2.1},
        },
    }  # fmt: skip
    check = {"value": 1.0, "low": 0.99, "high": 1.01}
    one = {"model": "m", "device": "cpu", "batch_size": 1, "points": points, "check": check, "too_noisy": None}
    return {**one, **changes}


def document(*found):
    settings = {"round_to": 1, "threads": 2, "sessions": 8, "min_runs": 40, "min_seconds": 1.0}
    runs = [{"command": "x", "environment": environment().to_dict()}]
    return {"runs": runs, "settings": settings, "measured": list(found)}


def test_the_table_sets_the_speed_up_beside_the_macs_ratio():
    text = inference_report.markdown(document(measured()))
    assert "| m | cpu | 1 | 0.5 | 100 | 5.000 | 6.000 | 200.0 | 4.00 | 2.00 (1.90-2.10) | 0.50 |  |" in text
    assert "| 1 | 1 | 0.990-1.010 |" in text
    assert "Where the time went" not in text
    assert "| 1 | 1 | too noisy: 0.990-1.010 |" in inference_report.markdown(document(measured(too_noisy="yes")))


def test_where_the_time_went_is_told_by_type_of_operator():
    profiles = {"1.0": {"Conv": 8.0, "Pool": 2.0}, "0.5": {"Conv": 2.0, "Pool": 2.0, "Reorder": 1.0}}
    text = inference_report.markdown(document(measured(profiles=profiles)))
    rows = [line for line in text.splitlines() if line.startswith(("| Conv", "| Pool", "| Reorder"))]
    assert rows == ["| Pool | 2.000 | 2.000 | 1.00 | +1.500 |", "| Reorder | 0.000 | 1.000 | new | +1.000 |"]


def test_what_is_missing_is_listed_with_its_reason_and_not_drawn(tmp_path):
    gone = {"model": "m", "device": "cuda", "batch_size": 1, "missing": "no GPU: none"}
    assert "- no GPU: none: m (cuda, batch 1)" in inference_report.markdown(document(measured(), gone))
    inference_report.draw(document(measured(), gone), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_what_the_machine_was_too_noisy_for_is_measured_again_on_request(tmp_path, monkeypatch):
    out = tmp_path / "there.json"
    there = [measured(model="a", too_noisy="yes"), measured(model="b")]
    out.write_text(json.dumps(document(*there)))
    asked = []

    def measure(name, wanted, settings):
        asked.append((name, wanted))
        return [measured(model=name)]

    monkeypatch.setattr(inference, "measure", measure)
    options = ["--out", str(out), "--models", "a,b", "--batch-sizes", "1", "--devices", "cpu", "--threads", "2"]
    for again, expected in (([], []), (["--again"], [("a", [("cpu", 1)])])):
        monkeypatch.setattr(sys, "argv", ["inference.py", *options, *again])
        inference.main()
        assert asked == expected
    found = json.loads(out.read_text())
    assert [(one["model"], one.get("run")) for one in found["measured"]] == [("b", None), ("a", 1)]
    assert len(found["runs"]) == 2
    assert out.with_suffix(".md").read_text().count("load ") == 2
