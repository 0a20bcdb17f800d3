"""What `fitnets.py` measured, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fitnets_cost import PUBLISHED
from fitnets_step import WAYS
from fitnets_tables import TARGETS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

BLUE, AMBER, GREY, DARK = "#0b6e99", "#d08c2f", "#8a8a8a", "#222222"


def draw_cost(document: dict[str, Any], path: Path) -> None:
    """Measured speed-up over what the multiplications promise, for the networks of the paper's table 5 and the others
    on CIFAR-10, one panel for each runtime and batch size."""
    timings = [t for t in document["timings"] if t["group"] == "CIFAR-10" and "missing" not in t]
    figure = new_figure(5.4 * max(2, len(timings)), 5.2)
    panels = figure.subplots(1, len(timings), sharey=True, squeeze=False)[0]
    for axes, timing in zip(panels, timings, strict=True):
        _speedups(axes, document, timing)
    panels[0].set_ylabel("times as fast as the teacher")
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle(
        "The networks of FitNets on CIFAR-10: speed-up over the teacher, on paper and measured",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    figure.savefig(path)


def _speedups(axes: Axes, document: dict[str, Any], timing: dict[str, Any]) -> None:
    costs = {row["net"]: row["multiplications"] for row in document["counts"]}
    teacher = costs[next(iter(timing["results"]))]
    ratio = {name: teacher / costs[name] for name in timing["speedups"]}
    limits = (1.2, 40)
    axes.plot(limits, limits, color=DARK, linewidth=0.8, label="as the multiplications")
    for fitnets, colour, label in ((True, BLUE, "FitNet 1 to 4"), (False, AMBER, "equal budgets, 5 to 9 layers")):
        names = [n for n in ratio if (PUBLISHED[n].speedup is not None) == fitnets]
        found = [timing["speedups"][n] for n in names]
        low = [s["value"] - s["low"] for s in found]
        high = [s["high"] - s["value"] for s in found]
        x, y = [ratio[n] for n in names], [s["value"] for s in found]
        axes.errorbar(x, y, yerr=(low, high), fmt="o", color=colour, markersize=6, capsize=2, label=label)
        for name, value, height in zip(names, x, y, strict=True):
            if fitnets:
                note(axes, name.removeprefix("fitnet"), value, height)
    paper = {n: PUBLISHED[n].speedup for n in ratio if PUBLISHED[n].speedup}
    axes.plot(
        [ratio[n] for n in paper], list(paper.values()), "o", mfc="none", color=GREY, label="the paper's, on a GPU"
    )
    axes.set_title(f"{timing['runtime']}, {timing['device']}, batch {timing['batch_size']}", loc="left", fontsize=12)
    axes.set_xlabel("multiplications: teacher's over the student's")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 40]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlim(*limits)
    tidy(axes)


def draw_step(document: dict[str, Any], path: Path) -> None:
    """Step times of stage 1: bars to the medians, each round a dot."""
    settings, result = document["settings"], document["result"]
    figure = new_figure(9.5, 3.4)
    axes = figure.subplots()
    labels = {"hooks": "full forwards, hooks", "truncated": "truncated pair", "cached": "cached hints"}
    places = range(len(WAYS))[::-1]
    for place, way, colour in zip(places, WAYS, (GREY, BLUE, AMBER), strict=True):
        median, samples = result["median_ms"][way], result["samples_ms"][way]
        axes.barh(place, median, 0.62, color=colour, alpha=0.35)
        shifts = [place + 0.5 * ((k * 0.618) % 1 - 0.5) for k in range(len(samples))]
        axes.plot(samples, shifts, ".", color=colour, markersize=4)
        axes.plot([median, median], [place - 0.31, place + 0.31], color=colour, linewidth=2.5)
        ratio = result["speedups"].get(way)
        text = f"{median:.0f} ms"
        if ratio:
            text += f"   {ratio['value']:.2f}× ({ratio['low']:.2f} to {ratio['high']:.2f}), target {TARGETS[way]:g}×"
        axes.annotate(text, (max(samples), place), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(list(places), [labels[way] for way in WAYS])
    axes.set_xlim(0, 1.25 * max(max(s) for s in result["samples_ms"].values()))
    axes.set_xlabel("ms for a step")
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.set_title(
        f"A step of stage 1, {settings['teacher']} → {settings['student']} at {settings['hint']}: batch "
        f"{settings['batch_size']}, {settings['image_size']} px, {settings['device']}",
        loc="left",
        fontsize=12,
    )
    figure.savefig(path)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def note(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8.5)
