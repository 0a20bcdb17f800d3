"""What `inference.py` measured, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results_io import save_figure
from surgery.units import counted, quantity

_HEADER = (
    "model", "device", "batch", "rate", "MACs", "p50 ms", "p99 ms", "images/s", "MACs ratio", "speed-up", "efficiency",
    "A/A",
)  # fmt: skip
_COLOURS = ("#0b6e99", "#d08c2f", "#5b8c5a", "#a23b72", "#7a6fb0", "#c0504d", "#3b3b3b", "#2ca6a4")


def markdown(document: dict[str, Any]) -> str:
    """A table of what was measured, one of where the time went, and what is missing."""
    runs, settings = document["runs"], document["settings"]
    where = runs[-1]["environment"]
    measured = [one for one in document["measured"] if "points" in one]
    lines = [
        "# Speed-up of slim models beside their MACs ratio",
        "",
        f"{'; '.join(_run(run) for run in runs)}. {where['cpu']}, {counted(settings['threads'], 'thread')}"
        + (f", {where['gpu']}" if where["gpu"] else "")
        + (f", widths rounded up to multiples of {settings['round_to']}" if settings["round_to"] > 1 else "")
        + f", onnxruntime {where['versions'].get('onnxruntime-gpu') or where['versions']['onnxruntime']}. "
        f"All rates of a model take turns, in {settings['sessions']} sessions "
        "each; speed-ups are ratios to the dense model, with 95% intervals. Efficiency is the part of the MACs ratio "
        "that the speed-up is. A/A is the dense model against itself: where its interval does not hold 1, the machine "
        "was too noisy.",
        "",
        f"| {' | '.join(_HEADER)} |",
        "|---" * len(_HEADER) + "|",
    ]
    for one in measured:
        lines += _rows(one)
    for one in measured:
        if "profiles" in one:
            lines += _where(one)
    missing = [one for one in document["measured"] if "missing" in one]
    if missing:
        lines += ["", "## Missing", ""]
        for reason in dict.fromkeys(one["missing"] for one in missing):
            names = [
                f"{m['model']} ({m['device']}, batch {m['batch_size']})" for m in missing if m["missing"] == reason
            ]
            lines.append(f"- {reason}: {', '.join(names)}")
    return "\n".join([*lines, ""])


def _run(run: dict[str, Any]) -> str:
    where = run["environment"]
    return f"`{run['command']}`, {where['date'][:10]}, load {where['load_1min']:.1f} at the start"


def _rows(one: dict[str, Any]) -> Iterator[str]:
    for rate, point in one["points"].items():
        speedup, check = point.get("speedup"), one["check"]
        cells = [
            one["model"],
            one["device"],
            one["batch_size"],
            rate,
            quantity(point["macs"]),
            *(f"{point[key]:.3f}" for key in ("p50_ms", "p99_ms")),
            f"{point['throughput']:.1f}",
            f"{point['macs_ratio']:.2f}",
            f"{speedup['value']:.2f} ({speedup['low']:.2f}-{speedup['high']:.2f})" if speedup else "1",
            f"{speedup['value'] / point['macs_ratio']:.2f}" if speedup else "1",
            ("too noisy: " if one["too_noisy"] else "") + f"{check['low']:.3f}-{check['high']:.3f}"
            if rate == "1.0"
            else "",
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def _where(one: dict[str, Any]) -> Iterator[str]:
    """Where the time went that the MACs ratio promises to save, at a rate of 0.5."""
    dense, half = one["profiles"]["1.0"], one["profiles"]["0.5"]
    promised = one["points"]["0.5"]["macs_ratio"]
    speedup = one["points"]["0.5"]["speedup"]["value"]
    kept = {name: ms - dense.get(name, 0.0) / promised for name, ms in half.items()}
    yield from (
        "",
        f"## Where the time went: {one['model']} at 0.5, {one['device']}, batch {one['batch_size']}",
        "",
        f"{speedup:.2f} times faster, of {promised:.2f} by MACs. ONNX Runtime's profiler by type of operator; the last "
        "column is what a type takes beyond its dense time over the MACs ratio.",
        "",
        "| operator | ms at 1.0 | ms at 0.5 | faster by | ms not saved |",
        "|---|---|---|---|---|",
    )
    for name in sorted(half, key=lambda name: -kept[name]):
        if abs(kept[name]) >= 0.01 * sum(half.values()):
            faster = f"{dense[name] / half[name]:.2f}" if name in dense else "new"
            yield f"| {name} | {dense.get(name, 0.0):.3f} | {half[name]:.3f} | {faster} | {kept[name]:+.3f} |"


def draw(document: dict[str, Any], out: Path) -> None:
    """Speed-up over MACs ratio, with intervals: a panel for each device and batch size, a line for each model."""
    measured = [one for one in document["measured"] if "points" in one]
    panels = sorted({(one["device"], one["batch_size"]) for one in measured})
    names = list(dict.fromkeys(one["model"] for one in measured))
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (device, batch_size) in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False
    ):
        most = 1.0
        for one in measured:
            if (one["device"], one["batch_size"]) != (device, batch_size):
                continue
            points = [p for p in one["points"].values() if "speedup" in p]
            across = [1.0, *(p["macs_ratio"] for p in points)]
            up = [1.0, *(p["speedup"]["value"] for p in points)]
            reach = [
                [0.0, *(p["speedup"]["value"] - p["speedup"]["low"] for p in points)],
                [0.0, *(p["speedup"]["high"] - p["speedup"]["value"] for p in points)],
            ]
            colour = _COLOURS[names.index(one["model"]) % len(_COLOURS)]
            axes.errorbar(across, up, yerr=reach, marker="o", markersize=4, capsize=2, color=colour, label=one["model"])
            most = max(most, *across)
        axes.plot([1, most], [1, most], color="#8a8a8a", linewidth=1, label="as the MACs")
        axes.plot([1, most], [0.8, 0.8 * most], color="#8a8a8a", linewidth=1, linestyle=":", label="0.8 of it")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{device}, batch {batch_size}", loc="left", fontsize=10)
        axes.set_xlabel("MACs of the dense model over the slim one's")
        axes.set_ylabel("measured speed-up")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    save_figure(figure, out, dpi=150)
