"""The picture of a tradeoff run: accuracy over latency, the Pareto front, and the costs of each point."""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox, BboxBase

from surgery.deploy.curve.layout import Box, place_labels, reach, short
from surgery.deploy.curve.points import Point, Tradeoff
from surgery.units import mebibytes, quantity, sentence

_FRONT, _DOMINATED, _INK, _FAINT = "#0b6e99", "#b4b4b4", "#222222", "#8a8a8a"
_MARKER = 10
"""Size of a dot, in points."""


def draw(result: Tradeoff, path: Path) -> None:
    """Draw ``result`` to a PNG at ``path``, without a window or global state of matplotlib."""
    rows = len(result.points)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(9, 5.4 + 0.28 * rows), dpi=160, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    chart, table = figure.subplots(2, 1, height_ratios=[4.6, 0.5 + 0.28 * rows])
    _chart(chart, result)
    _table(table, result)
    _names(figure, chart, result)
    figure.savefig(path)


def _chart(axes: Axes, result: Tradeoff) -> None:
    front = result.front
    limit = reach([p.latency.p50_ms for p in result.points], [p.quantile_ms(0.75) for p in result.points])
    axes.plot(
        [p.latency.p50_ms for p in front],
        [p.accuracy for p in front],
        color=_FRONT,
        alpha=0.45,
        linewidth=2,
        zorder=1,
        label="Pareto front",
    )
    for point in result.points:
        _point(axes, point, limit, on_front=point in front)
        if point.control_accuracy is not None:
            at = ([point.latency.p50_ms], [point.control_accuracy])
            axes.plot(*at, "o", color=_FAINT, markersize=_MARKER - 2, markerfacecolor="none", zorder=6)
    axes.set_xlim(0, limit)
    _frame(axes, result)


def _point(axes: Axes, point: Point, limit: float, *, on_front: bool) -> None:
    """Draw a dot with its bars; an arrow where a bar exceeds the ``limit`` of the axis."""
    colour = _FRONT if on_front else _DOMINATED
    x, y = point.latency.p50_ms, point.accuracy
    low, high = point.interval
    axes.errorbar(
        [x],
        [y],
        xerr=[[x - point.quantile_ms(0.25)], [point.quantile_ms(0.75) - x]],
        yerr=[[y - low], [high - y]],
        fmt="none",
        ecolor=colour,
        alpha=0.55,
        elinewidth=1.2,
        capsize=3,
        zorder=3 if on_front else 2,
    )
    if point.quantile_ms(0.75) > limit:
        axes.plot([limit], [y], ">", color=colour, alpha=0.55, markersize=7, markeredgewidth=0, clip_on=False)
    axes.plot([x], [y], "o", color=colour, markersize=_MARKER, markeredgecolor="white", zorder=5 if on_front else 4)


def _names(figure: Figure, axes: Axes, result: Tradeoff) -> None:
    """Write each point's name next to it. The figure is laid out first: places are in its pixels."""
    points = [*result.front, *(p for p in result.points if p not in result.front)]
    labels = [
        axes.annotate(
            short(point.name),
            (point.latency.p50_ms, point.accuracy),
            xytext=(0, 0),
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize=12,
            fontweight="bold" if point in result.front else "normal",
            color=_INK if point in result.front else _FAINT,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=7,
            in_layout=False,
        )
        for point in points
    ]
    figure.draw_without_rendering()
    height = figure.bbox.height
    dots = [(x, height - y) for x, y in axes.transData.transform([label.xy for label in labels]).tolist()]
    legend = axes.get_legend()
    found = place_labels(
        dots,
        [(box.width, box.height) for box in (label.get_window_extent() for label in labels)],
        _flipped(axes.bbox, height),
        radius=_MARKER / 2 * figure.dpi / 72,
        taken=[_flipped(legend.get_window_extent(), height)] if legend else [],
    )
    for label, (x, y), place in zip(labels, dots, found, strict=True):
        box = place.box
        label.xyann = ((box.left + box.right) / 2 - x, y - (box.top + box.bottom) / 2)
        if place.tie is not None:
            end = (place.tie[0] - x, y - place.tie[1])
            line = {"arrowstyle": "-", "color": _FAINT, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
            axes.annotate(
                "", label.xy, xytext=end, textcoords="offset pixels", arrowprops=line, zorder=6, in_layout=False
            )


def _flipped(box: BboxBase, height: float) -> Box:
    """Convert a box of matplotlib, whose y grows upwards."""
    return Box(box.x0, height - box.y1, box.x1, height - box.y0)


def _frame(axes: Axes, result: Tradeoff) -> None:
    lines = [result.conditions, *(line for doubt in result.doubts for line in textwrap.wrap(sentence(doubt), 120))]
    for number, line in enumerate(reversed(lines)):
        place = (0, 8 + 12 * number)
        axes.annotate(line, (0, 1), place, "axes fraction", "offset points", fontsize=9, color=_FAINT)
    axes.set_title(
        f"{result.name} on {result.data.source}: accuracy over latency, by {_what(result)}",
        loc="left",
        fontsize=14,
        pad=12 + 12 * len(lines),
    )
    axes.set_xlabel("latency, ms (median; bars: 25th to 75th percentile)")
    axes.set_ylabel(f"accuracy ({'mean; ' if result.seeded else ''}bars: 95% interval{_over(result)})")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.lines[0]]
    if len(result.front) < len(result.points):
        handles += axes.plot([], [], "o", color=_DOMINATED, label="dominated")
    if result.controlled:
        label = "the same sizes from scratch"
        handles += axes.plot([], [], "o", color=_FAINT, markerfacecolor="none", label=label)
    axes.legend(handles=handles, loc="lower right", frameon=False)


def _over(result: Tradeoff) -> str:
    return f" over {result.settings.seeds} seeds" if result.seeded else ""


def _what(result: Tradeoff) -> str:
    return "split rate" if all(point.rate is not None for point in result.points) else "candidate"


def _table(axes: Axes, result: Tradeoff) -> None:
    axes.set_axis_off()
    front = result.front
    wide = max(1 / 7, 0.012 * max(len(short(p.name, 24)) for p in result.points) + 0.03)
    header = [_what(result), "accuracy", "latency", "speed-up", "parameters", "MACs", "ONNX file"]
    cells = [
        [
            short(p.name, 24),
            f"{p.accuracy:.1%}",
            f"{p.latency.p50_ms:.2f} ms",
            p.gain,
            quantity(p.params),
            quantity(p.macs),
            mebibytes(p.latency.file_bytes),
        ]
        for p in result.points
    ]
    table = axes.table(
        cells,
        colLabels=header,
        cellLoc="right",
        loc="center",
        bbox=Bbox.unit(),
        edges="horizontal",
        colWidths=[wide, *[(1 - wide) / 6] * 6],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("#dddddd")
        cell.set_text_props(ha="right")
        bright = row == 0 or result.points[row - 1] in front
        cell.get_text().set_color(_INK if bright else _FAINT)
        cell.get_text().set_fontweight("bold" if row == 0 else "normal")
