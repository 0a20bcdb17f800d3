"""The interactive page of a tradeoff: all that it says, and that it needs nothing else."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

import surgery
from surgery.deploy.curve.html import page
from surgery.deploy.curve.layout import Box, place_labels, reach, short
from surgery.deploy.curve.plot import draw
from surgery.deploy.curve.points import DataSummary, Point, Tradeoff
from surgery.deploy.curve.report import write_report
from surgery.deploy.measure.benchmark import BenchmarkResult, Ratio
from surgery.deploy.measure.environment import environment
from surgery.training.data.data import Normalisation
from surgery.training.history import Epoch, History, Score


def point(name: str, correct: int, p50: float) -> Point:
    samples = tuple(p50 * (0.95 + 0.01 * k) for k in range(11))
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
        iqr_ms=0.05 * p50,
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


def curve() -> Tradeoff:
    """Three points, the last of which is dominated and has a name that HTML must escape."""
    settings = surgery.TradeoffSettings(epochs=2, finetune_epochs=2, lr=0.1, threads=1)
    data = DataSummary("digits", 100, 1000, tuple("0123456789"), 8, Normalisation())
    points = (point("1", 950, 4.0), point("0.5", 930, 2.0), point("</script><b>=2", 900, 3.0))
    return Tradeoff("resnet18", data, settings, points, None, (), environment(), 1.0, "surgery tradeoff <&>")


@pytest.fixture(scope="module")
def result():
    return curve()


def content(text: str):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def report_of(result: Tradeoff, folder: Path) -> str:
    write_report(result, folder)
    return (folder / "report.md").read_text()


def test_the_page_holds_every_figure_of_every_point(result):
    points = content(page(result))["points"]
    assert [p["name"] for p in points] == ["1", "0.5", "</script><b>=2"]
    assert [p["pareto"] for p in points] == [True, True, False]
    told = dict(points[1]["told"])
    assert told["accuracy"] == "93.00%"
    assert told["95% interval"] == "91.25% – 94.42%"
    assert told["latency p50"] == "2.000 ms"
    assert told["p25 – p75"] == "1.950 – 2.050 ms"
    assert told["speed-up"] == "2.00 (1.90 – 2.10)"
    assert told["trained"] == "train: 2 epochs"
    assert points[2]["title"] == "</script><b>=2 (dominated)"
    assert points[1]["latency"] == pytest.approx({"at": 2.0, "low": 1.95, "high": 2.05})
    assert points[1]["memory"]["at"] is None


def test_the_page_fetches_nothing(result):
    text = page(result)
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|\b(src|href)=|@import|url\(", text)


def test_a_noisy_machine_is_reported_on_every_page(result, tmp_path):
    assert content(page(result))["noise"] == ""
    noisy = replace(result, check=Ratio(0.8, 0.75, 0.9, 0.95, 10))
    said = (
        "Differences below ±25 % cannot be told apart in this run: measured against itself, the first model took "
        "0.75 to 0.90 times as long; all others differ by more."
    )
    assert content(page(noisy))["noise"] == said
    text = report_of(noisy, tmp_path)
    assert text.split("\n\n")[2] == said
    assert text.count("itself") == 1  # one fact, once
    assert json.loads((tmp_path / "tradeoff.json").read_text())["check"]["value"] == 0.8
    quiet = report_of(replace(result, check=Ratio(0.99, 0.9, 1.1, 0.95, 10)), tmp_path)
    assert "told apart" not in quiet
    assert "the first model's to itself is 1.010 (0.909 – 1.111). One MAC" in quiet


def guessing(of: Point, correct: int = 130) -> Point:
    return replace(of, score=Score(correct, 1000))


def test_a_model_at_chance_is_said_to_be_wherever_its_accuracy_is_shown(result, tmp_path, monkeypatch):
    """Ten classes: one right in ten by chance. 130 of 1000 are more than that, and 115 may be it."""
    better = replace(result, points=(result.points[0], guessing(result.points[1], 130)))
    assert better.doubts == ()
    found = replace(result, points=(result.points[0], guessing(result.points[1], 115)))
    said = "t 0.5 the model is no better than guessing, which gives 10.0%: train longer, or see the settings"
    assert found.doubts == (f"a{said}",)
    assert found.to_dict()["doubts"] == [f"a{said}"]
    assert f"\n\nA{said}.\n\n" in report_of(found, tmp_path)
    assert content(page(found))["noise"] == f"A{said}."
    chart, _ = drawn(found, tmp_path / "guess.png", monkeypatch)
    assert any(f"A{said}." == child.get_text() for child in chart.get_children() if isinstance(child, Annotation))
    nothing = replace(result, points=tuple(guessing(one, 99) for one in result.points))
    assert nothing.doubts[0].startswith("every model is no better than guessing, which gives 10.0%: ")


def test_a_control_stands_beside_its_candidate_on_every_page(result, tmp_path, monkeypatch):
    history = History((Epoch(100, 0.5, 0.1, None, 1.0),) * 4, 8)
    first, *others = result.points
    found = replace(result, points=(replace(first, control=Score(900, 1000), control_history=history), *others))
    text = report_of(found, tmp_path)
    assert "| accuracy | 95% interval | from scratch |" in text
    assert "| 95.00% | 93.5% – 96.2% | 90.00% (88.0% – 91.7%) |" in text
    assert "trained on labels for 4 epochs, as many as the dense model and a candidate had together" in text
    assert ["from scratch", "90.00% (87.98% – 91.71%)"] in content(page(found))["points"][0]["told"]
    chart, _ = drawn(found, tmp_path / "control.png", monkeypatch)
    assert any((list(line.get_xdata()), list(line.get_ydata())) == ([4.0], [0.9]) for line in chart.lines)
    assert "from scratch" in [text.get_text() for text in chart.get_legend().get_texts()][-1]
    assert "from scratch" not in report_of(result, tmp_path)


def spread(of: Point, p25: float, p75: float) -> Point:
    """The point with other quartiles of its latency."""
    p50 = of.latency.p50_ms
    samples = (*(p25,) * 4, *(p50,) * 3, *(p75,) * 4)
    return replace(of, latency=replace(of.latency, samples_ms=samples, iqr_ms=p75 - p25))


def test_the_command_says_so_right_below_its_table(result, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noisy = replace(result, check=Ratio(0.8, 0.75, 0.9, 0.95, 10))
    monkeypatch.setattr("surgery.tradeoff", lambda *args, directory, **options: (directory.mkdir(), noisy)[1])
    code, out, _ = run("tradeoff", "resnet18", "--dataset", "digits", "--out", "demo")
    assert code == 0
    *_, noise, written = out.splitlines()
    assert noise == noisy.too_noisy
    assert written.startswith("1 s; written to demo")


def drawn(result: Tradeoff, path: Path, monkeypatch) -> tuple[Axes, list[Annotation]]:
    """The chart of the picture, and the names in it, as they were when it was saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args: (figures.append(figure), save(figure, *args)))
    draw(result, path)
    chart = figures[0].axes[0]
    names = {short(point.name) for point in result.points}
    return chart, [
        child for child in chart.get_children() if isinstance(child, Annotation) and child.get_text() in names
    ]


def test_the_picture_says_which_differences_cannot_be_told_and_only_then(result, tmp_path, monkeypatch):
    quiet, _ = drawn(result, tmp_path / "quiet.png", monkeypatch)
    assert not any("told apart" in child.get_text() for child in quiet.get_children() if isinstance(child, Annotation))
    noisy = replace(result, check=Ratio(0.8, 0.75, 0.9, 0.95, 10))
    chart, _ = drawn(noisy, tmp_path / "noisy.png", monkeypatch)
    texts = [child.get_text() for child in chart.get_children() if isinstance(child, Annotation)]
    lines = [text for text in reversed(texts) if text and not text.startswith("ONNX Runtime")]
    assert f"D{noisy.too_noisy[1:]}." in " ".join(lines)


CROWD = ("1", "0.25", "params=1M", "slim:layer4=0.5+deepen:layer3=1", "0.26", "0.27", "0.28", "0.29", "0.3")


def crowd(result: Tradeoff) -> Tradeoff:
    """Points so close that their names cannot all stand next to them."""
    others = [point(name, 930 + k % 2, 0.11 + 0.001 * k) for k, name in enumerate(CROWD[1:])]
    return replace(result, points=(point("1", 950, 4.0), *others))


def test_names_in_the_picture_lie_on_no_other_name_and_on_no_point(result, tmp_path, monkeypatch):
    chart, names = drawn(crowd(result), tmp_path / "crowd.png", monkeypatch)
    assert len(names) == len(CROWD)
    boxes = [name.get_window_extent().padded(-0.01) for name in names]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for (x, y), box in itertools.product(chart.transData.transform([name.xy for name in names]), boxes):
        assert not box.contains(x, y)
    assert all(chart.bbox.x0 <= box.x0 and box.x1 <= chart.bbox.x1 for box in boxes)


def test_names_on_the_page_lie_on_no_other_name_over_any_axis(result):
    text = page(crowd(result))
    axes = content(text)["axes"]
    assert list(axes) == ["latency", "macs", "params", "file"]
    for axis in axes.values():
        boxes = [Box(**label["box"]) for label in axis["labels"].values()]
        assert len(boxes) == len(CROWD)
        assert all(one.overlap(other) == 0 for one, other in itertools.combinations(boxes, 2))
    assert page(crowd(result)) == text


def test_a_name_stands_below_and_to_the_right_where_there_is_room_and_a_line_leads_to_one_further_off():
    area = Box(0, 0, 400, 400)
    (near,) = place_labels([(200, 200)], [(40, 10)], area, radius=5)
    assert (near.side, near.tie) == (1, None)
    assert near.box.left > 205
    assert near.box.top > 200
    (left,) = place_labels([(390, 200)], [(40, 10)], area, radius=5)
    assert left.side == -1
    first, _ = place_labels([(200, 200), (230, 207)], [(40, 10)] * 2, area, radius=5)
    assert first.box.overlap(Box(225, 202, 235, 212)) == 0
    last = place_labels([(200, 200)] * 9, [(40, 10)] * 9, area, radius=5)[-1]
    assert last.tie == (last.box.left, last.box.top)


def test_the_axis_reaches_as_far_as_the_medians_need_and_bars_beyond_it_are_cut(result, tmp_path, monkeypatch):
    assert reach([1.0, 4.0], [1.1, 4.2]) == pytest.approx(1.1 * 4.2)
    assert reach([1.0, 4.0], [40.0, 4.2]) == pytest.approx(1.1 * 4.8)
    wide = replace(result, points=(*result.points[:2], spread(result.points[2], 2.9, 40.0)))
    chart, _ = drawn(wide, tmp_path / "wide.png", monkeypatch)
    assert chart.get_xlim() == pytest.approx((0, 1.1 * 4.8))
    arrows = [line for line in chart.lines if line.get_marker() == ">"]
    assert [tuple(line.get_xydata()[0]) for line in arrows] == [pytest.approx((1.1 * 4.8, 0.9))]
    assert content(page(wide))["axes"]["latency"]["reach"] == pytest.approx(1.1 * 4.8)
    assert dict(content(page(wide))["points"][2]["told"])["p25 – p75"] == "2.900 – 40.000 ms"


def test_one_epoch_is_not_epochs(result, tmp_path):
    once = replace(result, settings=replace(result.settings, epochs=1, finetune_epochs=1))
    text = report_of(once, tmp_path)
    assert "The dense model was trained for 1 epoch on" in text
    assert "with 1 thread." in text
    assert "1 epochs" not in text + page(once)
    assert "trained for 2 epochs on" in report_of(result, tmp_path)


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(browser() is None, reason="there is no Chromium here")
def test_a_browser_draws_the_chart_and_shows_the_tooltip_of_the_point_behind_the_hash(result, tmp_path):
    page_file = tmp_path / "tradeoff.html"
    noisy = replace(result, points=result.points[:2], check=Ratio(0.8, 0.75, 0.9, 0.95, 10))
    page_file.write_text(page(noisy))
    command = [
        *(str(browser()), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", f"{page_file.as_uri()}#0.5"),
    ]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert len(re.findall(r'<g class="point front', drawn)) == 2
    assert re.findall(r'class="name" x="[\d.]+" y="[\d.]+" text-anchor="\w+">([^<]+)', drawn) == ["1", "0.5"]
    assert f'<p id="noise">D{noisy.too_noisy[1:]}.</p>' in drawn
    tip = re.search(r'<div id="tip"[^>]*>(.*?)</div>', drawn, re.DOTALL)
    assert "hidden" not in tip[0].partition(">")[0]
    assert "split rate 0.5" in tip[1]
    assert "1.950 – 2.050 ms" in tip[1]
    assert re.findall(r"<option value=\"(\w+)\"", drawn) == ["latency", "macs", "params", "file"]
