"""A tradeoff run as one interactive page: a file that needs nothing else, and no network."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from surgery.deploy.curve.points import Point, Tradeoff
from surgery.units import mebibytes, quantity

_AXES = {
    "latency": "latency, ms (median; bars: 25th to 75th percentile)",
    "macs": "MACs of one image",
    "params": "parameters",
    "file": "size of the ONNX file, MiB",
    "memory": "peak memory, MiB",
}


def page(result: Tradeoff) -> str:
    """The text of an HTML file: the curve, each point's figures where the pointer rests on it, and the same as a table.

    What accuracy is drawn over can be chosen: latency, MACs, parameters, file or memory. ``#NAME`` behind its address
    opens it with the figures of that point shown.
    """
    text = json.dumps(_content(result)).replace("<", "\\u003c")  # nothing in it may end the script that it stands in
    return files("surgery.deploy.curve").joinpath("chart.html").read_text().replace("{{data}}", text)


def _content(result: Tradeoff) -> dict[str, Any]:
    data, here = result.data, result.environment
    front = result.front
    facts = {
        "model": result.source,
        "data": f"{data.source}: {data.train_images} images to train on, {data.test_images} to test on",
        "runtime": f"ONNX Runtime on the CPU, {result.settings.threads} threads, one image at a time",
        "dense training": f"{result.settings.epochs} epochs",
        "candidates": f"{result.settings.finetune_epochs} epochs more, by {result.settings.teach}",
        "measured": f"{here.date}, on {here.cpu}, {here.cpu_cores_usable} of {here.cpu_cores} cores usable",
        "versions": ", ".join(f"{name} {version}" for name, version in here.versions.items()),
        **({"noise": result.too_noisy} if result.too_noisy else {}),
    }
    return {
        "title": f"{result.name} on {data.source}: speed and accuracy",
        "said": f"ONNX Runtime, CPU, {result.settings.threads} threads, one image of {data.image_size} x "
        f"{data.image_size} at a time; {data.test_images} test images",
        "axes": _AXES,
        "header": ["candidate", "accuracy", "p50 ms", "speed-up", "parameters", "MACs", "ONNX file"],
        "points": [_point(point, on_front=point in front) for point in result.points],
        "facts": list(facts.items()),
        "command": result.command,
    }


def _point(point: Point, *, on_front: bool) -> dict[str, Any]:
    low, high = point.score.interval()
    memory, file = point.latency.peak_memory_bytes, point.latency.file_bytes
    what = point.name if point.rate is None else f"split rate {point.name}"
    return {
        "name": point.name,
        "title": what if on_front else f"{what} (dominated)",
        "pareto": on_front,
        "accuracy": {"at": point.score.accuracy, "low": low, "high": high},
        "latency": {"at": point.latency.p50_ms, "low": point.quantile_ms(0.25), "high": point.quantile_ms(0.75)},
        "macs": _exact(point.macs),
        "params": _exact(point.params),
        "file": _exact(file and file / 2**20),
        "memory": _exact(memory and memory / 2**20),
        "cells": [
            point.name,
            f"{point.score.accuracy:.2%}",
            f"{point.latency.p50_ms:.3f}",
            "1" if point.speedup is None else f"{point.speedup.value:.2f}",
            quantity(point.params),
            quantity(point.macs),
            mebibytes(file),
        ],
        "told": told(point),
    }


def told(point: Point) -> list[tuple[str, str]]:
    """All figures of a point, as people read them."""
    low, high = point.score.interval()
    speedup = point.speedup
    return [
        ("accuracy", f"{point.score.accuracy:.2%}"),
        ("95% interval", f"{low:.2%} – {high:.2%}"),
        ("correct", f"{point.score.correct} of {point.score.total}"),
        ("latency p50", f"{point.latency.p50_ms:.3f} ms"),
        ("p25 – p75", f"{point.quantile_ms(0.25):.3f} – {point.quantile_ms(0.75):.3f} ms"),
        ("p90, p99", f"{point.latency.p90_ms:.3f}, {point.latency.p99_ms:.3f} ms"),
        ("throughput", f"{point.latency.throughput:,.1f} images/s"),
        ("speed-up", "1" if speedup is None else f"{speedup.value:.2f} ({speedup.low:.2f} – {speedup.high:.2f})"),
        ("parameters", quantity(point.params)),
        ("MACs", quantity(point.macs)),
        ("ONNX file", mebibytes(point.latency.file_bytes)),
        ("peak memory", mebibytes(point.latency.peak_memory_bytes)),
        *_budget(point),
        ("trained", ", ".join(f"{stage}: {len(h.epochs)} epochs" for stage, h in point.training.items()) or "no more"),
        ("files", point.folder),
    ]


def _budget(point: Point) -> list[tuple[str, str]]:
    if point.budget is None:
        return []
    shown = (lambda value: f"{value:.3f} ms") if point.budget["kind"] == "latency_ms" else quantity
    limit, predicted, measured = (shown(float(point.budget[name])) for name in ("limit", "predicted", "measured"))
    return [("budget", limit), ("predicted, measured", f"{predicted}, {measured}")]


def _exact(value: float | None) -> dict[str, float | None]:
    return {"at": value, "low": value, "high": value}
