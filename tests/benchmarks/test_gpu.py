import json
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts, runner, worker
from benchmarks.gpu.report import markdown
from surgery import models as catalogue

ENVIRONMENT = {"versions": {"torch": "2"}, "cuda": None, "date": "2026-01-31T00:00:00"}


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"^no GPU: torch finds no CUDA device here, so nothing was run"):
        gpu.main()


def test_every_family_and_every_runtime_has_a_part_with_a_time_limit():
    names = parts.part_names(small=False)
    operated = {name.partition("/")[2] for name in names if name.startswith("surgery/")}
    assert {catalogue.CATALOGUE[name].family for name in operated} == {e.family for e in catalogue.CATALOGUE.values()}
    assert {"latency/torch/1", "latency/torch-cuda-graphs/32", "latency/onnxruntime-tensorrt/1"} < set(names)
    assert {"training/fp16", "training/bf16", "processes/2", "memory/torch"} < set(names)
    assert len(names) == len(set(names))
    assert all(parts.limit_of(name) <= 120 for name in names)


def test_operations_are_compared_on_the_device():
    row, lost = worker.attempt("surgery/squeezenet1_1", "cpu", small=True)
    assert not lost
    assert row["errors"].keys() == {"traced", "widened", "slimmed", "moved"}
    assert max(row["errors"].values()) <= parts.EXACT
    assert row["verified"] <= parts.EXACT


def test_a_result_that_is_wrong_is_an_error(monkeypatch):
    made = parts.surgery.slim
    monkeypatch.setattr(parts.surgery, "slim", lambda traced, rate: made(traced, 0.75))
    row, _ = worker.attempt("surgery/squeezenet1_1", "cpu", small=True)
    assert "differ" in row["error"] or "relative errors above 1e-10: {'slimmed'" in row["error"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_training_is_compared_with_a_whole_one(precision):
    row, _ = worker.attempt(f"training/{precision}", "cpu", small=True)
    assert row["resumed"] == 0.0
    assert row["losses"][-1] < row["losses"][0]


def test_what_needs_a_gpu_is_recorded_as_that():
    row, lost = worker.attempt("training/fp16", "cpu", small=True)
    assert row["error"] == "UsageError: the precision fp16 needs a GPU: on a CPU use bf16"
    assert not lost
    row, _ = worker.attempt("latency/torch-cuda-graphs/1", "cpu", small=True)
    assert "the torch-cuda-graphs runtime needs a GPU" in row["error"]


def test_latency_is_measured_at_each_rate():
    row, _ = worker.attempt("latency/torch/1", "cpu", small=True)
    assert list(row["rates"]) == ["1", "0.75", "0.5", "0.25"]
    assert row["rates"]["1"]["macs"] > row["rates"]["0.25"]["macs"]
    assert "| torch | 1 |" in markdown(document(row))


def document(*rows):
    return {"device": "a GPU", "environment": ENVIRONMENT, "command": "python -m benchmarks.gpu", "parts": list(rows)}


def test_an_error_of_the_device_ends_the_worker_and_a_failure_does_not(tmp_path, monkeypatch):
    def fail(part, device, small):
        raise RuntimeError("CUDA error: an illegal memory access" if part == "memory/torch" else "no such kernel")

    monkeypatch.setattr(worker, "run_part", fail)
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["worker", str(file), "cpu", "1", "60", "training/no", "memory/torch", "surgery/x"]
    )
    assert worker.main() == worker.LOST
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["training/no", "training/no", "memory/torch", "memory/torch"]
    assert [row["error"] for row in rows if "error" in row] == [
        "RuntimeError: no such kernel",
        "RuntimeError: CUDA error: an illegal memory access",
    ]


WORKER = """
import sys, time, json
file, device, small, seconds, *parts = sys.argv[1:]
for part in parts:
    with open(file, "a") as stream:
        stream.write(json.dumps({"part": part}) + "\\n")
    if part == "training/bf16":
        time.sleep(60)
    if part == "training/fp16":
        sys.exit("the device fell off")
    with open(file, "a") as stream:
        stream.write(json.dumps({"part": part, "seconds": 0.0}) + "\\n")
"""


def test_a_part_that_hangs_or_dies_is_recorded_and_the_rest_is_run(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    start = runner.subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess, "Popen", lambda args, **options: start([sys.executable, str(program), *args[3:]], **options)
    )
    monkeypatch.setattr(runner, "limit_of", lambda part: 2.0)
    plan = runner.Plan(("training/no", "training/bf16", "training/fp16", "memory/torch"), "cpu", True)
    rows = {row["part"]: row for row in runner.run_parts(plan, time.monotonic() + 60)}
    assert list(rows) == list(plan.parts)
    assert rows["training/bf16"]["error"] == "ended at the time limit of 2 s"
    assert rows["training/fp16"]["error"] == "the worker ended: the device fell off"
    assert "error" not in rows["training/no"]
    assert "error" not in rows["memory/torch"]
    assert list(runner.run_parts(plan, time.monotonic() - 1)) == []


def test_parts_with_a_result_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []

    def run(plan, end):
        for part in plan.parts:
            ran.append(part)
            yield {"part": part, "seconds": 1.0, "error": "no such kernel"}

    monkeypatch.setattr(gpu, "run_parts", run)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "training/*", "--device", "cpu", "--small", "--out", str(out)])
    gpu.main()
    gpu.main()
    assert ran == ["training/no", "training/fp16", "training/bf16"]
    assert "not run yet: surgery/squeezenet1_1" in capsys.readouterr().err
    text = out.with_suffix(".md").read_text()
    assert "0 of 3 parts are right." in text
    assert "- `training/fp16`: no such kernel" in text


def test_all_tables_are_made():
    made = {
        "surgery/a": {"errors": dict.fromkeys(("traced", "widened", "slimmed", "moved"), 0.0),
                      "operation_seconds": dict.fromkeys(("trace", "widen", "slim"), 1.0)},
        "training/no": {"steps_per_second": 2.0, "peak_bytes": 3e6, "losses": [1.0], "resumed": 0.0},
        "processes/2": {"seconds_alone": 1.0, "seconds_together": 2.0, "difference": 0.0},
        "memory/torch": {"rates": {"1": {"device_bytes": 5e6, "host_bytes": None}}},
    }  # fmt: skip
    text = markdown(document(*({"part": part, "seconds": 1.0, **found} for part, found in made.items())))
    assert "4 of 4 parts are right." in text
    assert "| a | 0.0e+00 | 0.0e+00 | 0.0e+00 | 0.0e+00 | 1.00 | 1.00 | 1.00 |" in text
    assert "| no | 2.0 | 3 | 1.0000 | 0.0e+00 |" in text
    assert "| 2 | 1.0 | 2.0 | 0.0e+00 |" in text
    assert "| torch | 1 | 5 |  |" in text
