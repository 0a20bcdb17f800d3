"""What `fitnets.py` measured, as pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from benchmarks.fitnets.cost import PUBLISHED
from benchmarks.fitnets.step import WAYS
from benchmarks.fitnets.tables import METHOD_LABELS, TARGETS, errors, finals, students
from benchmarks.fitnets.train import LONGER, METHODS
from benchmarks.results_io import save_figure

BLUE, AMBER, GREEN, GREY, DARK = "#0b6e99", "#d08c2f", "#4c9a4c", "#8a8a8a", "#222222"
COLOURS = {"backprop": GREY, "kd": AMBER, "hints": BLUE, LONGER: GREEN}
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}%")
TITLE: dict[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 13}


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
        **TITLE,
    )
    save_figure(figure, path)


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
    save_figure(figure, path)


def draw_mnist(document: dict[str, Any], path: Path) -> None:
    """Test errors in the end, each seed a dot, and over the epochs."""
    settings = document["settings"]
    (net,) = students(document)
    figure = new_figure(11, 5)
    ends, course = figure.subplots(1, 2, width_ratios=[1.15, 1.3])
    teacher = median(errors(document, settings["teacher"], "teacher"))
    methods = [method for method in COLOURS if finals(document, net, method)]
    for place, method in enumerate(methods):
        values = errors(document, net, method)
        shifts = [place + 0.09 * (k - (len(values) - 1) / 2) for k in range(len(values))]
        ends.plot(shifts, values, "o", color=COLOURS[method], markersize=6)
        ends.plot([place - 0.3, place + 0.3], [median(values)] * 2, color=COLOURS[method], linewidth=2.5)
        label = f"{median(values):.1%}"
        ends.annotate(
            label, (place + 0.3, median(values)), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=9
        )
        runs = finals(document, net, method)
        first = settings["hint_epochs"] if method in ("hints", LONGER) else 0
        _course(course, [[1 - a for a in r["accuracy"]] for r in runs], first, COLOURS[method], METHOD_LABELS[method])
    ends.axhline(teacher, color=DARK, linewidth=0.8)
    ends.annotate(f"teacher {teacher:.1%}", (-0.45, teacher), xytext=(0, 4), textcoords="offset points", fontsize=8.5)
    ends.set_xticks(range(len(methods)), [fill(METHOD_LABELS[method], 15) for method in methods])
    ends.set_xlim(-0.5, len(methods) - 0.3)
    ends.set_ylim(bottom=0)
    ends.yaxis.set_major_formatter(PERCENT)
    ends.set_ylabel("test error")
    ends.set_title("in the end, by seed", loc="left", fontsize=12)
    course.set_title("over the epochs: medians, the worst and the best", loc="left", fontsize=12)
    course.set_xlabel("epochs, those of stage 1 among them")
    course.xaxis.set_major_locator(MaxNLocator(integer=True))
    course.legend(frameon=False, loc="upper right")
    _log_errors(course)
    for axes in (ends, course):
        tidy(axes)
    figure.suptitle(f"{net} on {settings['dataset']}, {len(finals(document, net, 'kd'))} seeds", **TITLE)
    save_figure(figure, path)


def _course(axes: Axes, curves: list[list[float]], first: int, colour: str, label: str) -> None:
    whole = [c for c in curves if len(c) == max(map(len, curves))]  # those that did not diverge
    by_epoch = list(zip(*whole, strict=True))
    steps = range(first + 1, first + 1 + len(by_epoch))
    axes.plot(steps, [median(v) for v in by_epoch], color=colour, linewidth=2, label=label)
    axes.fill_between(
        steps, [min(v) for v in by_epoch], [max(v) for v in by_epoch], color=colour, alpha=0.15, linewidth=0
    )


def draw_depth(document: dict[str, Any], path: Path) -> None:
    """Test errors over the depth of nets of one budget: a line through the medians, each seed a dot."""
    settings = document["settings"]
    nets = students(document)
    figure = new_figure(8.5, 5)
    axes = figure.subplots()
    for k, method in enumerate(METHODS):
        shift = 0.09 * (k - 1)
        by_net = [errors(document, net, method) for net in nets]
        colour = COLOURS[method]
        axes.plot([n + shift for n in range(len(nets))], [median(v) for v in by_net], color=colour, linewidth=2,
                  label=METHOD_LABELS[method])  # fmt: skip
        for n, values in enumerate(by_net):
            axes.plot([n + shift] * len(values), values, "o", color=colour, markersize=5, alpha=0.8)
    teacher = median(errors(document, settings["teacher"], "teacher"))
    axes.axhline(teacher, color=DARK, linewidth=0.8)
    axes.annotate(f"teacher {teacher:.1%}", (0, teacher), xytext=(-30, -11), textcoords="offset points", fontsize=8.5)
    axes.set_xticks(range(len(nets)), [f"{net.rpartition('_')[2]} layers" for net in nets])
    axes.set_xlabel("nets of one budget of multiplications")
    axes.set_ylabel("test error")
    _log_errors(axes)
    axes.legend(frameon=False, loc="upper left")
    tidy(axes)
    title = f"Which depth each method trains: {settings['dataset']}, {settings['student_rate']:g} of the channels"
    figure.suptitle(title, **TITLE)
    save_figure(figure, path)


def _log_errors(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PERCENT)


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
