"""What parts `generations` and `step` of `knowledge_evolution.py` measured, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from scipy import stats

from benchmarks.knowledge_evolution.generations import ARMS, choice
from benchmarks.results_io import save_figure
from surgery.deploy.generations import DENSE, LONG, SLIM, frame

CLOSE = 0.005
"""The slim network has reached the dense one where, in the mean over seeds, it is no further behind: half a point."""


@dataclass(frozen=True)
class Difference:
    """Of two accuracies of the same seed: mean over the seeds, 95 % interval by Student's t, and in how many seeds the
    first is the greater."""

    mean: float
    low: float
    high: float
    greater: int
    count: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Difference:
        found = np.asarray(first) - np.asarray(second)
        mean, count = float(found.mean()), len(found)
        half = float(stats.t.ppf(0.975, count - 1) * stats.sem(found)) if count > 1 else float("inf")
        return cls(mean, mean - half, mean + half, int((found > 0).sum()), count)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.2f} ({100 * self.low:+.2f} to {100 * self.high:+.2f})"

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "better than"
        return "worse than" if self.high < 0 else "not told apart, by these seeds, from"


def accuracies(document: dict[str, Any], arm: str, network: str) -> np.ndarray[Any, Any]:
    """Of the test images: (seeds, generations), of those seeds that both arms have."""
    final = [run for run in document["runs"] if not run["validation"]]
    seeds = set.intersection(*({run["seed"] for run in final if run["arm"] == a} for a in ARMS))
    chosen = sorted((run for run in final if run["arm"] == arm and run["seed"] in seeds), key=lambda run: run["seed"])
    return np.array([[correct / run["total"] for correct in run[network]] for run in chosen])


def differences(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> list[Difference]:
    """By generation; a baseline that has none is the same for all."""
    return [Difference.of(column, second[:, min(k, second.shape[1] - 1)]) for k, column in enumerate(first.T)]


def reached(behind: Sequence[Difference]) -> int | None:
    """The generation from which on the slim network is not more than `CLOSE` behind the dense one, from 1."""
    far = [number for number, difference in enumerate(behind, 1) if difference.mean < -CLOSE]
    first = far[-1] + 1 if far else 1
    return first if first <= len(behind) else None


def generations_table(document: dict[str, Any]) -> str:
    settings, where = document["settings"], document["environment"]
    if not any(not run["validation"] and run["arm"] == "long" for run in document["runs"]):
        return f"# Knowledge Evolution on {settings['dataset']}\n\nnot finished\n"
    dense, slim, fresh = (accuracies(document, "evolution", who) for who in ("dense", "slim", "recalibrated"))
    long = accuracies(document, "long", "dense")
    epochs, lr = choice(document, "evolution")
    total = settings["generations"] * epochs
    cost = document["runs"][0]["cost"]
    lines = [
        f"# Knowledge Evolution on {settings['dataset']}",
        "",
        f"`{document['command']}`; {len(long)} seeds, {where['date'][:10]}, {where['cpu']}, torch "
        f"{where['versions']['torch']}. `{settings['model']}` with {settings['width']:g} of its channels "
        f"({cost['params'] / 1e6:.2f} M parameters, {cost['macs'] / 1e6:.1f} M MACs), split rate "
        f"{settings['split_rate']:g}, learns {settings['train_images']:,} images for {settings['generations']} "
        f"generations of {epochs} epochs at a learning rate of {lr:g}; the rest as the authors have it. `long` is the "
        f"same network, from the same weights, trained for {total} epochs at once, nothing drawn anew, at "
        f"{choice(document, 'long')[1]:g}. Accuracies are of {document['runs'][-1]['total']:,} test images, means over "
        "seeds with the least and the greatest; differences are paired by seed, in points, with 95 % intervals (t).",
        "",
        "| generation | dense | slim | slim, BatchNorm recalibrated | slim - dense | dense - long | slim - long |",
        "|---|---|---|---|---|---|---|",
    ]
    behind = differences(slim, dense)
    for k, row in enumerate(zip(behind, differences(dense, long), differences(slim, long), strict=True)):
        cells = [str(k + 1), *(_spread(array[:, k]) for array in (dense, slim, fresh)), *map(str, row)]
        lines.append("| " + " | ".join(cells) + " |")
    other = [_spread(accuracies(document, "long", who)[:, 0]) for who in ("dense", "slim", "recalibrated")]
    lines += [f"| long | {' | '.join(other)} | | | |", ""]
    lines += [*_findings(behind, differences(fresh, dense), Difference.of(dense[:, -1], long[:, 0]),
                         Difference.of(slim[:, -1], long[:, 0])), "", *_grid(document), ""]  # fmt: skip
    return "\n".join(lines)


def _findings(
    behind: Sequence[Difference], recalibrated: Sequence[Difference], dense: Difference, slim: Difference
) -> list[str]:
    lines = []
    for name, found in (("The slim network", behind), ("With recalibrated BatchNorm it", recalibrated)):
        first = reached(found)
        lines.append(
            f"{name} does not come within {100 * CLOSE:g} points of the dense one for good."
            if first is None
            else f"{name} is within {100 * CLOSE:g} points of the dense one, or above it, from generation {first} on."
        )
    for name, found in (("dense", dense), ("slim", slim)):
        lines.append(
            f"After the last generation the {name} network is {found.verdict} `long`: {found} points; it is ahead in "
            f"{found.greater} of {found.count} seeds."
        )
    return lines


def _grid(document: dict[str, Any]) -> list[str]:
    settings = document["settings"]
    lines = [
        f"What was tried, on {settings['validation_images']:,} further training images that are not learned from, one "
        "seed; the best slim network, and the best `long`, were chosen:",
        "",
        "| arm | epochs of a generation | learning rate | dense | slim | chosen |",
        "|---|---|---|---|---|---|",
    ]
    tried = [run for run in document["runs"] if run["validation"]]
    for run in sorted(tried, key=lambda run: (run["arm"], run["epochs"], run["lr"])):
        scores = [f"{run[who][-1] / run['total']:.1%}" if run[who] else "diverged" for who in ("dense", "slim")]
        mark = "yes" if (run["epochs"], run["lr"]) == choice(document, run["arm"]) else ""
        lines.append(f"| {run['arm']} | {run['epochs']} | {run['lr']:g} | {' | '.join(scores)} | {mark} |")
    return lines


def _spread(values: np.ndarray[Any, Any]) -> str:
    return f"{values.mean():.1%} ({100 * values.min():.1f} to {100 * values.max():.1f})"


def draw(document: dict[str, Any], path: Path) -> None:
    """Test error by generation, and differences to training at once, to a PNG; nothing while there is no result."""
    if not any(not run["validation"] and run["arm"] == "long" for run in document["runs"]):
        return
    settings = document["settings"]
    figure = Figure(figsize=(11, 5.2), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    curves, gains = figure.subplots(1, 2)
    _curves(curves, document)
    _gains(gains, document)
    count, width = len(accuracies(document, "long", "dense")), settings["width"]
    figure.suptitle(
        f"Knowledge Evolution, {settings['model']}{'' if width == 1 else f' at {width:g} of its width'}, split rate "
        f"{settings['split_rate']:g}, {settings['train_images']:,} images of {settings['dataset']}: {count} seeds",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    save_figure(figure, path)


def _curves(axes: Axes, document: dict[str, Any]) -> None:
    """Means over seeds, bands from the least to the greatest."""
    numbers = np.arange(1, document["settings"]["generations"] + 1)
    for who, colour, style, label in (
        ("dense", DENSE, "-", "dense"),
        ("slim", SLIM, "-", "slim"),
        ("recalibrated", SLIM, ":", "slim, BatchNorm recalibrated"),
    ):
        errors = np.maximum(1 - accuracies(document, "evolution", who), 1e-4)
        axes.plot(numbers, errors.mean(0), style, color=colour, linewidth=2, marker="o", markersize=4, label=label)
        if style == "-":
            axes.fill_between(numbers, errors.min(0), errors.max(0), color=colour, alpha=0.15, linewidth=0)
    long = np.maximum(1 - accuracies(document, "long", "dense"), 1e-4)
    axes.axhline(long.mean(), color=LONG, linestyle="--", linewidth=1.6, label="dense, as many epochs at once")
    axes.axhspan(long.min(), long.max(), color=LONG, alpha=0.12, linewidth=0)
    frame(axes, len(numbers), "test error (bands: all seeds)")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("error by generation", loc="left", fontsize=12)


def _gains(axes: Axes, document: dict[str, Any]) -> None:
    """Means over seeds with 95 % intervals, and each seed as a dot."""
    long = accuracies(document, "long", "dense")
    numbers = np.arange(1, document["settings"]["generations"] + 1)
    lowest = 0.0
    for who, colour, shift in (("dense", DENSE, -0.08), ("slim", SLIM, 0.08)):
        found = accuracies(document, "evolution", who) - long
        lowest = min(lowest, found[:, len(numbers) // 2 :].min())
        axes.plot(np.tile(numbers + shift, len(found)), found.ravel(), ".", color=colour, alpha=0.35, markersize=5)
        paired = [Difference.of(column, np.zeros(len(column))) for column in found.T]
        means = [difference.mean for difference in paired]
        half = [difference.high - difference.mean if difference.count > 1 else 0.0 for difference in paired]
        axes.errorbar(numbers + shift, means, yerr=half, color=colour, marker="o", markersize=4, linewidth=2,
                      elinewidth=1.2, capsize=3, label=who)  # fmt: skip
    axes.axhline(0, color=LONG, linestyle="--", linewidth=1.6)
    frame(axes, len(numbers), "points of test accuracy gained (bars: 95% interval)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+g}"))
    axes.set_ylim(1.4 * lowest - 0.005, max(0.01, -0.6 * lowest))
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("gained over as many epochs at once, by seed", loc="left", fontsize=12)


def step_table(document: dict[str, Any]) -> str:
    settings, where, result = document["settings"], document["environment"], document["result"]
    names = {
        "torch": "plain loop of torch, torchvision's model",
        "train": "`surgery.train`",
        "evolve": "`surgery.evolve`, second generation",
    }
    lines = [
        "# The time of a training step in Knowledge Evolution",
        "",
        f"`{document['command']}`; {where['date'][:10]}, {where['cpu']}, torch {where['versions']['torch']}, "
        f"{result['threads']} threads, {settings['device']}. `{settings['model']}`, batches of "
        f"{settings['batch_size']} images of {settings['image_size']} pixels, SGD with momentum; "
        f"{settings['rounds']} rounds of {settings['steps']} steps of each way, in turn; 95 % intervals (bootstrap).",
        "",
        "| way | ms of a step (median) | a step of `evolve` takes times as long |",
        "|---|---|---|",
    ]
    for way, name in names.items():
        ratio = result["ratios"].get(way)
        text = f"{ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "1"
        lines.append(f"| {name} | {result['median_ms'][way]:.1f} | {text} |")
    reset = float(np.median(result["reset_ms"]))
    lines += ["", f"Drawing the reset-hypothesis anew takes {reset:.0f} ms, once between two generations.", ""]
    return "\n".join(lines)
