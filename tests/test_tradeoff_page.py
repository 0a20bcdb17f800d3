"""The interactive page of a tradeoff: all that it says, and that it needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from surgery.deploy.curve.html import page
from surgery.deploy.curve.points import DataSummary, Point, Settings, Tradeoff
from surgery.deploy.curve.report import write_report
from surgery.deploy.measure.benchmark import BenchmarkResult, Ratio
from surgery.deploy.measure.environment import environment
from surgery.training.data import Normalisation
from surgery.training.history import Epoch, History, Score


def point(name: str, correct: int, p50: float) -> Point:
    samples = tuple(p50 * (0.9 + 0.02 * k) for k in range(11))
    latency = BenchmarkResult(
        runtime="onnxruntime",
        device="cpu",
        threads=1,
        batch_size=1,
        input_shapes=((1, 3, 8, 8),),
        p50_ms=p50,
        p90_ms=samples[9],
        p95_ms=samples[9],
        p99_ms=samples[10],
        mean_ms=p50,
        min_ms=samples[0],
        iqr_ms=0.1 * p50,
        throughput=1000 / p50,
        peak_memory_bytes=None,
        file_bytes=3 * 2**20,
        macs=10**6,
        params=10**5,
        samples_ms=samples,
        warmup_runs=10,
        warmup_settled=True,
        notes=(),
        environment=environment(),
    )
    training = {"train": History((Epoch(100, 0.5, 0.1, None, 1.0),) * 2, 4)}
    rate = float(name) if name[0].isdigit() else None
    ratio = None if name == "1" else Ratio(2.0, 1.9, 2.1, 0.95)
    return Point(name, rate, f"rate-{name}", 10**5, 10**6, Score(correct, 1000), latency, ratio, training)


@pytest.fixture(scope="module")
def result():
    settings = Settings(("1",), 1, "prefix", 2, "labels", 2, 1, 3, 0.1, 64, None, None, 1, 0)
    data = DataSummary("digits", 100, 1000, tuple("0123456789"), 8, Normalisation())
    points = (point("1", 950, 4.0), point("0.5", 930, 2.0), point("</script><b>=2", 900, 3.0))
    return Tradeoff("resnet18", data, settings, points, None, (), environment(), 1.0, "surgery tradeoff <&>")


def content(text: str):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_holds_every_figure_of_every_point(result):
    points = content(page(result))["points"]
    assert [p["name"] for p in points] == ["1", "0.5", "</script><b>=2"]
    assert [p["pareto"] for p in points] == [True, True, False]
    told = dict(points[1]["told"])
    assert told["accuracy"] == "93.00%"
    assert told["95% interval"] == "91.25% – 94.42%"
    assert told["latency p50"] == "2.000 ms"
    assert told["p25 – p75"] == "1.900 – 2.100 ms"
    assert told["speed-up"] == "2.00 (1.90 – 2.10)"
    assert told["trained"] == "train: 2 epochs"
    assert points[2]["title"] == "</script><b>=2 (dominated)"
    assert points[1]["latency"] == pytest.approx({"at": 2.0, "low": 1.9, "high": 2.1})
    assert points[1]["memory"]["at"] is None


def test_the_page_fetches_nothing(result):
    text = page(result)
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|\b(src|href)=|@import|url\(", text)


def test_a_machine_that_was_too_noisy_is_said_on_every_page(result, tmp_path):
    assert content(page(result))["facts"][-1][0] == "versions"
    noisy = replace(result, check=Ratio(0.8, 0.75, 0.9, 0.95, 10))
    said = (
        "too noisy: measured against itself, rate-1 is 0.800 times as slow (0.750-0.900); "
        "differences of this size mean nothing in this run"
    )
    assert content(page(noisy))["facts"][-1] == ["noise", said]
    write_report(noisy, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"**The machine was {said}.**" in text
    assert "the first model's to itself is 1.250 (1.111 – 1.333). One MAC" in text
    assert json.loads((tmp_path / "tradeoff.json").read_text())["check"]["value"] == 0.8
    write_report(replace(result, check=Ratio(0.99, 0.9, 1.1, 0.95, 10)), tmp_path)
    assert "noisy" not in (tmp_path / "report.md").read_text()


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="there is no Chromium here")
def test_a_browser_draws_the_chart_and_shows_the_tooltip_of_the_point_behind_the_hash(result, tmp_path):
    page_file = tmp_path / "tradeoff.html"
    page_file.write_text(page(replace(result, points=result.points[:2])))
    command = [
        *(str(browser()), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", f"{page_file.as_uri()}#0.5"),
    ]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(re.findall(r'<g class="point front', drawn)) == 2
    tip = re.search(r'<div id="tip"[^>]*>(.*?)</div>', drawn, re.DOTALL)
    assert "hidden" not in tip[0].partition(">")[0]
    assert "split rate 0.5" in tip[1]
    assert "1.900 – 2.100 ms" in tip[1]
    assert re.findall(r"<option value=\"(\w+)\"", drawn) == ["latency", "macs", "params", "file"]
