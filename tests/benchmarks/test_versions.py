import json
import re
import sys

import pytest

from benchmarks.versions import __main__ as versions
from benchmarks.versions import environments, suite
from benchmarks.versions.environments import InstallError, requirements
from benchmarks.versions.report import markdown

REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.a" name="test_good" time="0.1"/>
<testcase classname="tests.a" name="test_left_out"><skipped message="no such op"/></testcase>
<testcase classname="tests.a" name="test_bad[1]"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.b" name="test_set_up"><error message="no fixture">trace</error></testcase>
</testsuite></testsuites>"""


def test_the_floor_is_what_pyproject_allows_at_least():
    text = '[project]\ndependencies = ["torch>=2.11", "torchvision>=0.26", "onnx>=1.18"]'
    assert requirements("floor", text) == ["torch==2.11.*", "torchvision==0.26.*"]
    assert requirements("floor") == [f"{n}=={v}.*" for n, v in re.findall(r'"(torch\w*)>=([\d.]+)"', pyproject())]
    assert requirements("2.13") == ["torch==2.13.*"]
    assert requirements("2.13.0") == ["torch===2.13.0"]
    assert requirements("newest") == []


def pyproject():
    return (suite.ROOT / "pyproject.toml").read_text()


def test_an_environment_is_made_once_and_gets_what_the_package_comes_to_need(tmp_path, monkeypatch):
    ran, broken = [], False

    def run(args, **options):
        if "-c" in args:
            return environments.subprocess.CompletedProcess(args, int(broken), "", "no such operator")
        ran.append("venv" if "venv" in args else args[-1])
        (tmp_path / "2.13").mkdir(exist_ok=True)
        return environments.subprocess.CompletedProcess(args, 0, "", "")

    project = {"dependencies": ["torch>=2.11"], "optional-dependencies": {"dev": ["pytest"]}}
    monkeypatch.setattr(environments.subprocess, "run", run)
    monkeypatch.setattr(environments, "_project", lambda: project)
    for _ in range(2):
        environments.make_environment(tmp_path / "2.13", ["torch==2.13.*"])
    assert ran == ["venv", "torch==2.13.*"]
    project["dependencies"].append("msgspec>=0.19")
    environments.make_environment(tmp_path / "2.13", ["torch==2.13.*"])
    assert ran == ["venv", "torch==2.13.*", "torch==2.13.*"]
    project["dependencies"].append("filelock")
    broken = True
    with pytest.raises(InstallError, match="torchvision cannot be imported with the torch that pip chose: no such op"):
        environments.make_environment(tmp_path / "2.13", ["torch==2.13.*"])


def test_tests_are_counted_and_those_that_failed_named():
    counts = suite.read_report(REPORT)
    assert (counts["passed"], counts["skipped"]) == (1, 1)
    assert counts["failed"] == {"tests.a::test_bad[1]": "assert 1 == 2", "tests.b::test_set_up": "no fixture"}


def test_the_test_at_which_a_process_died_is_named():
    said = 'Fatal Python error\n  File "/x/y/torch/a.py", line 3 in f\n  File "/x/tests/graph/test_b.py", line 7 in g\n'
    assert suite._where(said) == "it died in tests/graph/test_b.py, line 7"
    assert suite._where("one\nno tests ran\n") == "no tests ran"


def test_every_part_has_tests():
    assert all((suite.ROOT / path).exists() for paths in suite.PARTS.values() for path in paths)


def test_a_part_is_run_by_the_python_of_its_environment(tmp_path, monkeypatch):
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no')\n")
    monkeypatch.setitem(suite.PARTS, "cost", (str(file),))
    result = suite.run_part(sys.executable, "cost", 1, 300)
    assert (result["passed"], result["skipped"], result["error"]) == (1, 1, None)
    assert list(result["failed"].values()) == ["assert 1 == 2"]
    file.write_text("import os\ndef test_a(): os.abort()\n")
    assert suite.run_part(sys.executable, "cost", 1, 300)["error"].startswith("pytest ended with code -6")
    file.write_text("")
    assert suite.run_part(sys.executable, "cost", 1, 300)["error"].startswith("pytest ended with code 5")
    assert "at the time limit of 0.001 minutes" in suite.run_part(sys.executable, "cost", 1, 0.06)["error"]


def test_a_run_goes_on_where_it_was_ended_and_removes_its_environments(tmp_path, monkeypatch, capsys):
    ran = []

    def make(folder, wanted):
        if "2.13" in folder.name:
            raise InstallError("no such version")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(python, part, processes, seconds):
        ran.append((python.name, part))
        if len(ran) == 2:
            raise KeyboardInterrupt
        bad = {"tests.a::test_b": "assert 1 == 2"} if (python.name, part) == ("2.14", "cost") else {}
        return {"passed": 3, "skipped": 0, "failed": bad, "error": None, "seconds": 1, "date": "2026-01-31"}

    numbers = dict.fromkeys(("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy"), "1.0")
    monkeypatch.setattr(versions, "make_environment", make)
    monkeypatch.setattr(versions, "installed_versions", lambda python: {"python": "3.11", "versions": numbers})
    monkeypatch.setattr(versions, "run_part", run)
    out, folder = tmp_path / "versions.json", tmp_path / "environments"
    given = ["versions", "floor", "2.13", "2.14", "--parts", "graph,cost", "--out", str(out), "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(KeyboardInterrupt):
        versions.main()
    with pytest.raises(SystemExit):  # 2.13 could not be installed, and a test failed
        versions.main()
    assert ran == [("floor", "graph"), ("floor", "cost"), ("floor", "cost"), ("2.14", "graph"), ("2.14", "cost")]
    assert list(folder.iterdir()) == []
    rows = json.loads(out.read_text())["environments"]
    assert [row["target"] for row in rows] == ["floor", "2.13", "2.14"]
    text = out.with_suffix(".md").read_text()
    assert "| 2.14 | 3 / 0 / 0 |  |  |  | 3 / 1 / 0 |  |  |  |  | 2026-01-31 |" in text
    assert "- 2.14, cost: `tests.a::test_b`: assert 1 == 2\n" in text
    assert "- 2.13: no such version\n" in text
    capsys.readouterr()


def test_a_table_without_failures_says_so():
    assert "0 sets of versions" in markdown({"environments": [], "command": "python -m benchmarks.versions"})
