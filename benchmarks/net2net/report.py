"""What `net2net.py` measured, as a picture and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from benchmarks.results_io import save_figure

_COLOURS = {"net2net": "#0b6e99", "padding": "#d08c2f", "scratch": "#8a8a8a"}
_LABELS = {"net2net": "Net2Net", "padding": "random padding", "scratch": "from scratch"}


def selected(document: dict[str, Any], growth: str, arm: str, epochs: int) -> list[dict[str, Any]]:
    """The runs of all seeds, in the order of these."""
    found = [r for r in document["runs"] if (r["growth"], r["arm"], r["epochs"]) == (growth, arm, epochs)]
    return sorted(found, key=lambda r: r["seed"])


def targets(document: dict[str, Any], growth: str) -> dict[int, float]:
    """For each seed the accuracy that training from scratch ends with: the median of its last three epochs."""
    full = document["settings"]["epochs"]
    return {r["seed"]: _final(r) for r in selected(document, growth, "scratch", full)}


def _final(run: dict[str, Any]) -> float:
    return median(run["accuracy"][1:][-3:])


def epochs_to(run: dict[str, Any], accuracy: float) -> float:
    """The first epoch after which a run is as good, 0 for step 0; infinite where it never is."""
    return next((float(e) for e, score in enumerate(run["accuracy"]) if score >= accuracy), float("inf"))


def markdown(document: dict[str, Any]) -> str:
    settings, where = document["settings"], document["environment"]
    seeds = sorted({r["seed"] for r in document["runs"]})
    lines = [
        f"# Net2Net on {settings['dataset']}",
        "",
        f"`{document['command']}`; {len(seeds)} seeds, {where['date'][:10]}, {where['cpu']}, torch "
        f"{where['versions']['torch']}. A teacher with {settings['teacher_rate']:.2f} of the channels of "
        f"`{settings['model']}` is trained for {settings['teacher_epochs']} epochs (SGD, learning rate "
        f"{settings['lr']:g}, {settings['schedule']} schedule), then grown; all nets are trained alike. Accuracies are "
        "of the test images, the median over seeds with the least and the greatest; an accuracy at the end is the "
        "median of three epochs. "
        f"The target is what training from scratch ends with after {settings['epochs']} epochs, of the same seed.",
        "",
        "| net | weights | parameters | epochs | at step 0 | at the end | epochs to the target | seeds that reach it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    teacher = selected(document, "", "teacher", settings["teacher_epochs"])
    lines.append(_row("teacher", "random", teacher, None))
    for growth in ("wider", "deeper"):
        goal = targets(document, growth)
        groups = {(r["epochs"], r["arm"]) for r in document["runs"] if r["growth"] == growth}
        for epochs, arm in sorted(groups, key=lambda g: (g[0], list(_LABELS).index(g[1]))):
            lines.append(_row(growth, _LABELS[arm], selected(document, growth, arm, epochs), goal))
    errors = [r["float64_error"] for r in document["runs"] if "float64_error" in r]
    lines += [
        "",
        "At step 0 the accuracy of every Net2Net equals its teacher's; the largest relative difference of their "
        f"outputs in float64 is {max(errors):.1e}.",
        "",
    ]
    return "\n".join(lines)


def _row(net: str, arm: str, runs: Sequence[dict[str, Any]], goal: dict[int, float] | None) -> str:
    cells = [net, arm, f"{runs[0]['params']:,}", str(runs[0]["epochs"])]
    cells += [_spread([r["accuracy"][0] for r in runs]), _spread([_final(r) for r in runs])]
    if goal is None:
        cells += ["", ""]
    else:
        reached = [epochs_to(r, goal[r["seed"]]) for r in runs]
        middle = median(reached)
        cells += [
            f"more than {runs[0]['epochs']}" if middle == float("inf") else f"{middle:g}",
            f"{sum(e < float('inf') for e in reached)} of {len(runs)}",
        ]
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def draw(document: dict[str, Any], path: Path) -> None:
    """Test error over epochs, one panel for each way to grow, to a PNG."""
    figure = Figure(figsize=(11, 5.2), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    settings = document["settings"]
    seeds = len({r["seed"] for r in document["runs"]})
    panels = figure.subplots(1, 2, sharey=True)
    for axes, growth in zip(panels, ("wider", "deeper"), strict=True):
        _panel(axes, document, growth)
    panels[0].set_ylabel("test error")
    panels[0].legend(frameon=False, loc="upper right")
    figure.suptitle(
        f"Growing a trained net on {settings['dataset']}: median of {seeds} seeds, bands from the worst to the best",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    save_figure(figure, path)


def _panel(axes: Axes, document: dict[str, Any], growth: str) -> None:
    settings = document["settings"]
    floor = 0.5 / 1000
    for arm, colour in _COLOURS.items():
        lengths = sorted({r["epochs"] for r in document["runs"] if (r["growth"], r["arm"]) == (growth, arm)})
        for epochs in lengths:
            curves = [[max(1 - a, floor) for a in r["accuracy"]] for r in selected(document, growth, arm, epochs)]
            short = epochs == lengths[0]
            steps = range(epochs + 1)
            by_epoch = list(zip(*curves, strict=True))
            label = _LABELS[arm] if short else None
            axes.plot(
                steps, [median(v) for v in by_epoch], color=colour, linewidth=2, label=label, ls="-" if short else ":"
            )
            if short:
                axes.fill_between(
                    steps, [min(v) for v in by_epoch], [max(v) for v in by_epoch], color=colour, alpha=0.15, linewidth=0
                )
    target = 1 - median(targets(document, growth).values())
    axes.axhline(target, color="#222222", linewidth=0.8)
    axes.annotate(
        f"from scratch, {settings['epochs']} epochs: {target:.1%}",
        (0, target),
        xytext=(4, -11),
        textcoords="offset points",
        fontsize=8.5,
    )
    axes.set_title(growth, loc="left", fontsize=12)
    annealed = settings["budget"] < 1
    axes.set_xlabel("epochs (solid: the schedule decays faster; dotted: all of them)" if annealed else "epochs")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, settings["epochs"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
