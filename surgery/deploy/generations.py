"""The picture of an evolution: accuracy of the dense and the slim network by generation, and of baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from surgery.training.evolve import Evolution
from surgery.training.history import Score
from surgery.training.lottery import Lottery

DENSE, SLIM, LONG, TICKET, FAINT = "#0b6e99", "#d08c2f", "#555555", "#7a5ca8", "#8a8a8a"
"""Colours of networks, the same in every picture of generations."""


def draw_generations(found: Evolution, tickets: Lottery | None, path: Path, *, title: str) -> None:
    """Draw the accuracies of an evolution to a PNG, without a window or global state of matplotlib.

    Args:
        found: the result of `surgery.evolve`.
        tickets: the result of `surgery.lottery`, whose last score is drawn, or None.
        path: the file to write.
        title: the line on top.

    Example:
        >>> surgery.draw_generations(surgery.evolve(traced, data), None, Path("generations.png"), title="ResNet-18")
    """
    figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    alone = "slim" if found.slim is not None else "fit-hypothesis alone"
    _curve(axes, [generation.dense for generation in found.generations], DENSE, "dense", -0.04)
    _curve(axes, [generation.slim for generation in found.generations], SLIM, alone, 0.04)
    if found.long is not None:
        _level(axes, found.long.dense, LONG, "--", "dense, as many epochs, nothing reset")
    if tickets is not None:
        last = tickets.tickets[-1]
        _level(axes, last.score, TICKET, ":", f"lottery ticket, sparsity {last.sparsity:g}")
    frame(axes, len(found.generations), "accuracy (bars: 95% interval)")
    axes.set_title(title, loc="left", fontsize=12)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path)


def frame(axes: Axes, generations: int, ylabel: str) -> None:
    """Set labels and scales of a picture of generations."""
    axes.set_xlabel("generation")
    axes.set_ylabel(ylabel)
    axes.set_xlim(0.5, generations + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Axes, scores: Sequence[Score], colour: str, label: str, shift: float) -> None:
    """Draw scores with error bars, shifted a little to the side so that bars do not overlap."""
    heights = [score.accuracy for score in scores]
    below = [score.accuracy - score.interval()[0] for score in scores]
    above = [score.interval()[1] - score.accuracy for score in scores]
    places = [number + shift for number in range(1, len(scores) + 1)]
    axes.errorbar(
        places, heights, yerr=[below, above], color=colour, label=label, marker="o", linewidth=2, elinewidth=1.2,
        capsize=3,
    )  # fmt: skip


def _level(axes: Axes, score: Score, colour: str, style: str, label: str) -> None:
    axes.axhline(score.accuracy, color=colour, linestyle=style, linewidth=1.6, label=label)
