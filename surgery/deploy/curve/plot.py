"""The picture of a tradeoff run: accuracy over latency, the Pareto front, and what each point costs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from surgery.deploy.curve.points import Point, Tradeoff
from surgery.units import mebibytes, quantity

_FRONT, _DOMINATED, _INK, _FAINT = "#0b6e99", "#b4b4b4", "#222222", "#8a8a8a"


def draw(result: Tradeoff, path: Path) -> None:
    """Draw ``result`` to a PNG at ``path``. No window is opened and no global state of matplotlib is used."""
    rows = len(result.points)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(9, 5.4 + 0.28 * rows), dpi=160, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    chart, table = figure.subplots(2, 1, height_ratios=[4.6, 0.5 + 0.28 * rows])
    _chart(chart, result)
    _table(table, result)
    figure.savefig(path)


def _chart(axes: Axes, result: Tradeoff) -> None:
    front = result.front
    axes.plot(
        [p.latency.p50_ms for p in front],
        [p.score.accuracy for p in front],
        color=_FRONT,
        alpha=0.45,
        linewidth=2,
        zorder=1,
        label="Pareto front",
    )
    for point in result.points:
        _point(axes, point, on_front=point in front)
    _frame(axes, result)


def _point(axes: Axes, point: Point, *, on_front: bool) -> None:
    colour = _FRONT if on_front else _DOMINATED
    x, y = point.latency.p50_ms, point.score.accuracy
    low, high = point.score.interval()
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
    axes.plot([x], [y], "o", color=colour, markersize=10, markeredgecolor="white", zorder=5 if on_front else 4)
    axes.annotate(
        _short(point.name, 28),
        (x, y),
        xytext=(8, -16),  # the front rises to the right, so there is room below it
        textcoords="offset points",
        fontsize=12,
        fontweight="bold" if on_front else "normal",
        color=_INK if on_front else _FAINT,
        path_effects=[withStroke(linewidth=3, foreground="white")],
        zorder=6,
    )


def _frame(axes: Axes, result: Tradeoff) -> None:
    settings, data = result.settings, result.data
    axes.set_title(
        f"{result.name} on {data.source}: accuracy over latency, by {_what(result)}", loc="left", fontsize=14, pad=24
    )
    axes.text(
        0,
        1.025,
        f"ONNX Runtime, CPU, {settings.threads} threads, one {data.image_size} x {data.image_size} image at a time; "
        f"{data.test_images} test images",
        transform=axes.transAxes,
        fontsize=9,
        color=_FAINT,
    )
    axes.set_xlabel("latency, ms (median; bars: 25th to 75th percentile)")
    axes.set_ylabel("accuracy (bars: 95% interval)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.set_xlim(0, 1.1 * max(p.quantile_ms(0.75) for p in result.points))
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.lines[0]]
    if len(result.front) < len(result.points):
        handles += axes.plot([], [], "o", color=_DOMINATED, label="dominated")
    axes.legend(handles=handles, loc="lower right", frameon=False)


def _what(result: Tradeoff) -> str:
    return "split rate" if all(point.rate is not None for point in result.points) else "candidate"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _table(axes: Axes, result: Tradeoff) -> None:
    axes.set_axis_off()
    front = result.front
    wide = max(1 / 7, 0.012 * max(len(_short(p.name, 24)) for p in result.points) + 0.03)
    header = [_what(result), "accuracy", "latency", "speed-up", "parameters", "MACs", "ONNX file"]
    cells = [
        [
            _short(p.name, 24),
            f"{p.score.accuracy:.1%}",
            f"{p.latency.p50_ms:.2f} ms",
            "1" if p.speedup is None else f"{p.speedup.value:.2f}",
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
