"""The files of a compression: figures for programs, a page for people, a table of epochs."""

from __future__ import annotations

import json
from pathlib import Path

from surgery.deploy.compress.result import Compressed
from surgery.deploy.compress.steps import CompressStep
from surgery.deploy.measure.ratios import Ratio
from surgery.settings import IMPORTANCE
from surgery.training.history import Score
from surgery.training.history_file import write_history
from surgery.units import amount_text, counted, mebibytes, quantity, sentence


def write_compressed(result: Compressed, folder: Path, name: str) -> None:
    """Write the result as JSON under a name, ``report.md`` and ``history.csv`` into ``folder``."""
    (folder / name).write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    (folder / "report.md").write_text(_markdown(result))
    write_history({f"step {number}": step.history for number, step in enumerate(result.steps, 1)}, folder)


def _markdown(result: Compressed) -> str:
    parts = [
        f"# {result.source} compressed on {result.data.source}",
        _finding(result),
        *map(sentence, result.doubts),
        _models(result),
        "## Steps",
        _steps(result),
        _method(result),
        "## Widths",
        "\n".join(_widths(number, step) for number, step in enumerate(result.steps, 1)),
        "## Command",
        f"```sh\n{result.command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _finding(result: Compressed) -> str:
    """What came of it, in two sentences."""
    lost = 100 * (result.score.accuracy - result.dense_score.accuracy)
    taken, limit = (amount_text(value, result.kind) for value in (result.measured, result.limit))
    return (
        f"The student takes {taken}, of a budget of {limit}. It "
        f"classifies {result.score.accuracy:.1%} of the test images correctly, the dense model "
        f"{result.dense_score.accuracy:.1%}: {lost:+.2f} points."
    )


def _models(result: Compressed) -> str:
    timed = result.timing
    rows = []
    for name, score, cost in (
        ("dense", result.dense_score, result.dense_cost),
        ("student", result.score, result.cost),
    ):
        row = [name, f"{score.accuracy:.2%}", _interval(score)]
        row += [quantity(cost.params), quantity(cost.macs), mebibytes(cost.bytes)]
        if timed is not None:
            row += [f"{timed.results[name].p50_ms:.3f}", _gain(timed.ratios.get(name))]
        rows.append(row)
    header = ["model", "accuracy", "95% interval", "parameters", "MACs", "size"]
    return _table([*header, *(["p50 ms", "speed-up"] if timed else [])], rows)


def _steps(result: Compressed) -> str:
    rows = [
        [
            str(number),
            amount_text(step.limit, result.kind),
            amount_text(step.measured, result.kind),
            *(f"{score.accuracy:.2%}" for score in (step.carved, step.compensated, step.recovered)),
            epochs_text(step),
            "" if step.lr is None else f"{step.lr:.3g}",
        ]
        for number, step in enumerate(result.steps, 1)
    ]
    header = ["step", "budget", "taken", "carved", "compensated", "recovered", "epochs (kept)", "peak rate"]
    said = (
        f"Accuracies on {result.validation.total} validation images, on which the dense model has "
        f"{result.validation.accuracy:.2%} ({_interval(result.validation)})."
    )
    return f"{_table(header, rows)}\n\n{said}"


def _method(result: Compressed) -> str:
    settings, data = result.settings, result.data
    hints = sorted({name for step in result.steps for name in step.hints})
    learned = "labels, softened outputs" + (f" and hints at {', '.join(hints)}" if hints else "")
    return (
        f"Of {data.train_images} training images {result.validation.total} were held out; they decided the learning "
        "rate, the end of each training and the epoch that is kept. Of the channels of each layer "
        f"{IMPORTANCE[settings.importance]} were kept; the layers that read removed ones were fitted to what the model "
        f"before gave, on up to 512 training images. Recovery: {learned} of the dense model, "
        f"{settings.optimizer}, {settings.schedule}, batches of {settings.batch_size}, until the validation score had "
        f"not risen beyond its interval for {counted(settings.patience, 'epoch')}. The {data.test_images} test images "
        f"were scored once, at the end. Seed {settings.seed}; {result.seconds:.0f} s."
    )


def _widths(number: int, step: CompressStep) -> str:
    rates = ", ".join(f"{name} {rate:g}" for name, rate in step.rates.items())
    return f"- Step {number}, in multiples of {step.round_to}: {rates or 'all as they were'}."


def epochs_text(step: CompressStep) -> str:
    """The number of epochs, and the one that was kept."""
    return "" if step.history is None else f"{step.epochs} ({step.kept or 'none'})"


def _gain(ratio: Ratio | None) -> str:
    """A speed-up with its interval; 1 for the first model."""
    if ratio is None:
        return "1"
    gain = ratio.inverse
    return f"{gain.value:.2f} ({gain.low:.2f} – {gain.high:.2f})"


def _interval(score: Score) -> str:
    return "{:.1%} – {:.1%}".format(*score.interval())


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])
