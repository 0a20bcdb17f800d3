import json
import re
import sys

import pytest

from benchmarks.versions import __main__ as versions
from benchmarks.versions import suite
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
    assert requirements("newest") == []


def pyproject():
    return (suite.ROOT / "pyproject.toml").read_text()


def test_tests_are_counted_and_those_that_failed_named():
    counts = suite.read_report(REPORT)
    assert (counts["passed"], counts["skipped"]) == (1, 1)
    assert counts["failed"] == {"tests.a::test_bad[1]": "assert 1 == 2", "tests.b::test_set_up": "no fixture"}


def test_every_part_has_tests():
    assert all((suite.ROOT / path).exists() for paths in suite.PARTS.values() for path in paths)


def test_a_part_is_run_by_the_python_of_its_environment(tmp_path, monkeypatch):
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no')\n")
    monkeypatch.setitem(suite.PARTS, "cost", (str(file),))
    result = suite.run_part(sys.executable, "cost", 1, 300)
    assert (result["passed"], result["skipped"], result["error"]) == (1, 1, None)
    assert list(result["failed"].values()) == ["assert 1 == 2"]
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
    assert "| 2.14 | 3 / 0 / 0 | 3 / 1 / 0 | 2026-01-31 |" in text
    assert "- 2.14, cost: `tests.a::test_b`: assert 1 == 2\n" in text
    assert "- 2.13: no such version\n" in text
    capsys.readouterr()


def test_a_table_without_failures_says_so():
    assert "0 sets of versions" in markdown({"environments": [], "command": "python -m benchmarks.versions"})
