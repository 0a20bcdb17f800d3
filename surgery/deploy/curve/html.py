"""A tradeoff run as one interactive, self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from surgery.deploy.curve.layout import Box, place_labels, reach, short
from surgery.deploy.curve.points import Point, Tradeoff, pareto
from surgery.units import counted, mebibytes, quantity, sentence

_AXES = {
    "latency": "latency, ms (median; bars: 25th to 75th percentile)",
    "macs": "MACs of one image",
    "params": "parameters",
    "file": "size of the ONNX file, MiB",
    "memory": "peak memory, MiB",
}

_AREA = Box(70, 24, 930, 440)
"""Area of the chart within its 960 x 500 pixels."""

_RADIUS, _LETTER, _LINE = 7, 9, 16
"""Radius of a dot; largest width and height of a letter, since the reader's fonts are unknown. In pixels."""


def page(result: Tradeoff) -> str:
    """Write the text of an HTML file: the curve, the figures of each point under the pointer, and a table of them.

    The reader can choose the axis: latency, MACs, parameters, file or memory. ``#NAME`` behind the address shows the
    figures of that point.
    """
    text = json.dumps(_content(result)).replace("<", "\\u003c")  # data must not end the script element
    return files("surgery.deploy.curve").joinpath("chart.html").read_text().replace("{{data}}", text)


def _content(result: Tradeoff) -> dict[str, Any]:
    data, here = result.data, result.environment
    front = result.front
    points = [_point(result, point, on_front=point in front) for point in result.points]
    threads = counted(result.points[0].latency.threads, "thread")
    taught = "compress" if result.settings.method == "compress" else result.settings.teach
    facts = {
        "model": result.source,
        "data": f"{data.source}: {data.train_images} images to train on, {data.test_images} to test on",
        "runtime": f"ONNX Runtime on the CPU, {threads}, one image at a time",
        "dense training": counted(result.settings.epochs, "epoch"),
        "candidates": f"{counted(result.settings.finetune_epochs, 'epoch')} more, by {taught}",
        "measured": f"{here.date}, on {here.cpu}, {here.cpu_cores_usable} of {here.cpu_cores} cores usable",
        "versions": ", ".join(f"{name} {version}" for name, version in here.versions.items()),
    }
    return {
        "title": f"{result.name} on {data.source}: speed and accuracy",
        "noise": " ".join(map(sentence, result.doubts)),
        "said": result.conditions,
        "bars": f"accuracy (bars: 95% interval{' over seeds' if result.seeded else ''})",
        "area": asdict(_AREA),
        "radius": _RADIUS,
        "axes": {key: _axis(key, points) for key in _AXES if any(p[key]["at"] is not None for p in points)},
        "header": ["candidate", "accuracy", "p50 ms", "speed-up", "parameters", "MACs", "ONNX file"],
        "points": points,
        "facts": list(facts.items()),
        "command": result.command,
    }


def _axis(key: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy over ``key``: the ranges of the axes, and the positions of points and labels."""
    shown = [point for point in points if point[key]["at"] is not None]
    best = pareto([(point[key]["at"], point["accuracy"]["at"]) for point in shown])
    shown = [shown[k] for k in best] + [point for k, point in enumerate(shown) if k not in best]
    limit = reach([point[key]["at"] for point in shown], [point[key]["high"] for point in shown])
    low = min(point["accuracy"]["low"] for point in shown)
    high = max(point["accuracy"]["high"] for point in shown)
    margin = (high - low) / 10 or 0.01
    least, most = max(0.0, low - margin), min(1.0, high + margin)
    dots = [
        (
            _AREA.left + (_AREA.right - _AREA.left) * point[key]["at"] / limit,
            _AREA.bottom - (_AREA.bottom - _AREA.top) * (point["accuracy"]["at"] - least) / (most - least),
        )
        for point in shown
    ]
    sizes = [(float(_LETTER * len(point["label"])), float(_LINE)) for point in shown]
    labels = place_labels(dots, sizes, _AREA, radius=_RADIUS)
    return {
        "title": _AXES[key],
        "reach": limit,
        "accuracy": [least, most],
        "labels": {point["name"]: asdict(label) for point, label in zip(shown, labels, strict=True)},
    }


def _point(result: Tradeoff, point: Point, *, on_front: bool) -> dict[str, Any]:
    low, high = point.interval
    memory, file = point.latency.peak_memory_bytes, point.latency.file_bytes
    what = point.name if point.rate is None else f"split rate {point.name}"
    return {
        "name": point.name,
        "label": short(point.name),
        "title": what if on_front else f"{what} (dominated)",
        "pareto": on_front,
        "accuracy": {"at": point.accuracy, "low": low, "high": high},
        "latency": {"at": point.latency.p50_ms, "low": point.quantile_ms(0.25), "high": point.quantile_ms(0.75)},
        "macs": _exact(point.macs),
        "params": _exact(point.params),
        "file": _exact(file and file / 2**20),
        "memory": _exact(memory and memory / 2**20),
        "cells": [
            point.name,
            f"{point.accuracy:.2%}",
            f"{point.latency.p50_ms:.3f}",
            point.gain,
            quantity(point.params),
            quantity(point.macs),
            mebibytes(file),
        ],
        "told": _figures(result, point),
    }


def _figures(result: Tradeoff, point: Point) -> list[tuple[str, str]]:
    """All figures of a point, as text."""
    low, high = point.interval
    budget = []
    if point.budget is not None:
        limit, *found = (point.budget_text(float(point.budget[name])) for name in ("limit", "predicted", "measured"))
        budget = [("budget", limit), ("predicted, measured", ", ".join(found))]
    control = []
    if point.control_accuracy is not None and point.control_interval is not None:
        bounds = "{:.2%} – {:.2%}".format(*point.control_interval)
        control = [("from scratch", f"{point.control_accuracy:.2%} ({bounds})")]
    stages = [f"{stage}: {counted(len(history.epochs), 'epoch')}" for stage, history in point.training.items()]
    return [
        ("accuracy", f"{point.accuracy:.2%}"),
        ("95% interval", f"{low:.2%} – {high:.2%}"),
        ("correct", f"{point.score.correct} of {point.score.total}"),
        *_over_seeds(result, point),
        *control,
        ("latency p50", f"{point.latency.p50_ms:.3f} ms"),
        ("p25 – p75", f"{point.quantile_ms(0.25):.3f} – {point.quantile_ms(0.75):.3f} ms"),
        ("p90, p99", f"{point.latency.p90_ms:.3f}, {point.latency.p99_ms:.3f} ms"),
        ("throughput", f"{point.latency.throughput:,.1f} images/s"),
        ("speed-up", point.gain_with_interval),
        ("parameters", quantity(point.params)),
        ("MACs", quantity(point.macs)),
        ("ONNX file", mebibytes(point.latency.file_bytes)),
        ("peak memory", mebibytes(point.latency.peak_memory_bytes)),
        *budget,
        ("trained", ", ".join(stages) or "no more"),
        ("files", point.folder),
    ]


def _over_seeds(result: Tradeoff, point: Point) -> list[tuple[str, str]]:
    """What a point with several seeds has besides."""
    if not point.repeats:
        return []
    accuracies = ", ".join(f"{score.accuracy:.2%}" for score in point.scores)
    found = [(f"with {len(point.scores)} seeds", accuracies)]
    apart = result.difference(point)
    if apart is not None:
        bounds = f"{100 * apart.low:+.2f} – {100 * apart.high:+.2f}"
        found.append((f"points to {result.points[0].name}", f"{100 * apart.mean:+.2f} ({bounds})"))
    return found


def _exact(value: float | None) -> dict[str, float | None]:
    return {"at": value, "low": value, "high": value}
