"""The files of a tradeoff run: a picture, two tables for programs, and two pages for people, one interactive."""

from __future__ import annotations

import json
from pathlib import Path

from surgery.deploy.curve.html import page
from surgery.deploy.curve.plot import draw
from surgery.deploy.curve.points import Point, Tradeoff
from surgery.deploy.curve.seeds import Estimate
from surgery.settings import IMPORTANCE, METHODS, TEACHERS, TradeoffSettings
from surgery.storage.folders import write_table
from surgery.training.history import History
from surgery.training.history_file import write_history
from surgery.units import counted, mebibytes, quantity, sentence


def write_report(result: Tradeoff, folder: Path) -> None:
    """Write ``tradeoff.csv``, ``.json``, ``.png`` and ``.html``, ``report.md`` and ``history.csv``, into ``folder``."""
    write_table(result.rows(), folder / "tradeoff.csv")
    (folder / "tradeoff.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    draw(result, folder / "tradeoff.png")
    (folder / "tradeoff.html").write_text(page(result))
    (folder / "report.md").write_text(_markdown(result))
    write_history(_histories(result), folder)


def _histories(result: Tradeoff) -> dict[str, History | None]:
    """The record of each training of a run, by its task."""
    histories = {"dense": result.history}
    for point in result.points:
        histories |= {f"{point.folder}: {stage}": history for stage, history in point.training.items()}
        histories[f"{point.folder}: from scratch"] = point.control_history
        for one in point.repeats:
            name = f"{point.folder}, seed {one.seed}"
            histories |= {f"{name}: {stage}": history for stage, history in one.training.items()}
            histories[f"{name}: from scratch"] = one.control_history
    return histories


def _markdown(result: Tradeoff) -> str:
    return (
        "\n\n".join(
            [
                f"# Speed and accuracy of {result.name} on {result.data.source}",
                _finding(result),
                *map(sentence, result.doubts),
                "![Accuracy over latency, one point for each candidate](tradeoff.png)",
                "[The same with the figures of each point under the pointer](tradeoff.html)",
                _points_table(result),
                *_budgets(result),
                _method(result),
                "## Settings",
                _settings_table(result),
                "## Environment",
                _environment_table(result),
                "## Command",
                f"```sh\n{result.command}\n```",
            ]
        )
        + "\n"
    )


def _finding(result: Tradeoff) -> str:
    """The ends of the curve in a sentence."""
    first, fastest = result.points[0], result.front[0]
    what = f"At {first.name} the model" if first.rate is None else f"At split rate {first.rate:g} the model"
    said = (
        f"{what} classifies {first.accuracy:.1%} of the test images correctly, "
        f"in {first.latency.p50_ms:.2f} ms an image."
    )
    if fastest is first:
        return said + " None of the others is faster."
    return said + (
        f" At {fastest.name} it is {fastest.accuracy:.1%} in {fastest.latency.p50_ms:.2f} ms: "
        f"{fastest.gain_with_interval} times as fast, with {fastest.params / first.params:.1%} of the parameters."
    )


def _control(point: Point) -> str:
    """The accuracy of the control, with its interval."""
    if point.control_accuracy is None or point.control_interval is None:
        return ""
    return "{:.2%} ({:.1%} – {:.1%})".format(point.control_accuracy, *point.control_interval)


def _difference(found: Estimate | None) -> str:
    """A difference of accuracies in points, with its interval."""
    return "" if found is None else f"{100 * found.mean:+.2f} ({100 * found.low:+.1f} – {100 * found.high:+.1f})"


def _points_table(result: Tradeoff) -> str:
    front = result.front
    controlled = result.controlled
    rows = [
        [
            f"{point.name}{'' if point in front else ' (dominated)'}",
            f"{point.accuracy:.2%}",
            "{:.1%} – {:.1%}".format(*point.interval),
            *([_difference(result.difference(point))] if result.seeded else []),
            *([_control(point)] if controlled else []),
            f"{point.latency.p50_ms:.3f}",
            f"{point.quantile_ms(0.25):.3f} – {point.quantile_ms(0.75):.3f}",
            f"{point.latency.p99_ms:.3f}",
            point.gain_with_interval,
            quantity(point.params),
            quantity(point.macs),
            mebibytes(point.latency.file_bytes),
            mebibytes(point.latency.peak_memory_bytes),
            f"[{point.folder}]({point.folder})",
        ]
        for point in result.points
    ]
    header = [
        "split rate" if all(point.rate is not None for point in result.points) else "candidate",
        "accuracy",
        "95% interval",
        *([f"points to {result.points[0].name}"] if result.seeded else []),
        *(["from scratch"] if controlled else []),
        "p50 ms",
        "p25 – p75 ms",
        "p99 ms",
        "speed-up",
        "parameters",
        "MACs",
        "ONNX file",
        "peak memory",
        "files",
    ]
    return _table(header, rows)


def _budgets(result: Tradeoff) -> list[str]:
    """Predictions and measurements of the models that were slimmed to budgets."""
    rows, rates = [], []
    for point in result.points:
        if point.budget is None or point.takes is None:
            continue
        rows.append(
            [
                point.name,
                *(point.budget_text(point.budget[name]) for name in ("before", "predicted", "measured")),
                f"{point.budget_text(point.takes)}{'' if not point.over else ' **(above the budget)**'}",
                str(len(point.budget["trials"])),
                str(point.budget["round_to"]),
            ]
        )
        widths = ", ".join(f"{name} {rate:g}" for name, rate in point.budget["rates"].items())
        rates.append(f"- {point.name}: {widths or 'all as they were'}.")
    if not rows:
        return []
    header = ["budget", "dense model", "predicted", "measured then", "in this run", "models tried", "multiples of"]
    said = (
        "Rates by dimension group, chosen by predicted saving over damage (the increase of the loss on training images "
        "when a group is slimmed alone). The whole model was measured before it was trained further. Groups that are "
        "not named kept all channels."
    )
    return ["## Budgets", _table(header, rows), said, "\n".join(rates)]


def _method(result: Tradeoff) -> str:
    settings, data = result.settings, result.data
    trained = f"trained for {counted(settings.epochs, 'epoch')}" if settings.epochs else "taken as it was"
    threads = counted(result.points[0].latency.threads, "thread")
    notes = [f"- At {p.name}: {note}." for p in result.points for note in p.latency.notes]
    which = "the first ceil(s n) channels of every layer were carved out of it (KELS)"
    if settings.importance != "prefix":
        which = "the ceil(s n) channels of every layer with the largest weights were carved out of it"
    slimmed = f"At each split rate s, {which}"
    if any(point.rate is None for point in result.points):
        slimmed += "; the other candidates are named after what was done to it"
    how = (
        f"The dense model was {trained} on {data.train_images} images of {data.image_size} x {data.image_size}. "
        f"{slimmed}, and the result was {_describe_tuning(settings)}; at 1 nothing is removed. Accuracy is measured on "
        f"the ONNX file, in ONNX Runtime, on {data.test_images} unseen test images, {_describe_interval(result)}."
    )
    if result.controlled:
        control = next(point.control_history for point in result.points if point.control_history is not None)
        how += (
            " *From scratch* is a model of the same sizes whose weights were drawn anew, trained on labels for "
            f"{counted(len(control.epochs), 'epoch')}, as many as the dense model and a candidate had together; it is "
            "scored in torch."
        )
    timing = (
        f"Latency is measured on the ONNX file, one image at a time, on the CPU with {threads}. "
        f"All models were timed in one run, {len(result.points[0].latency.samples_ms)} queries each, taking turns in "
        f"random order, in {_sessions(result)} for which each was set up afresh. Speed-up is the geometric mean, over "
        "these, of the median ratio of latencies, with a 95% bootstrap interval"
        f"{_describe_check(result)}. One MAC is one "
        "multiplication and one addition; biases and norms are not counted. Peak memory is what a fresh process needs "
        "beyond its libraries to load and run the file. A point is *dominated* if another is at least as fast and at "
        "least as accurate."
    )
    return "\n\n".join(["## How it was measured", how, timing, *(["\n".join(notes)] if notes else [])])


def _describe_interval(result: Tradeoff) -> str:
    """How accuracies were counted, as the end of a sentence."""
    if not result.seeded:
        return "with Wilson's interval"
    seeds, first = result.settings.every_seed, result.points[0].name
    return (
        f"as the mean over {len(seeds)} trainings of each candidate, with seeds {seeds[0]} to {seeds[-1]}, all from "
        f"the same dense model, with Student's 95% interval over seeds; differences to {first}, in percentage points, "
        "are paired by seed. Files and latencies are those of the first seed"
    )


def _sessions(result: Tradeoff) -> str:
    return counted(len(result.points[0].latency.session_runs), "session")


def _describe_check(result: Tradeoff) -> str:
    """The result of a quiet A/A check, as the end of a sentence."""
    if result.check is None or result.too_noisy:  # said above, then
        return ""
    own = result.check.inverse
    return f"; the first model's to itself is {own.value:.3f} ({own.low:.3f} – {own.high:.3f})"


def _describe_tuning(settings: TradeoffSettings) -> str:
    """How candidates were trained, as the end of a sentence."""
    if settings.finetune_epochs == 0:
        return "fitted to it on training images" if settings.method == "compress" else "not trained further"
    epochs = counted(settings.finetune_epochs, "epoch")
    if settings.method == "compress":
        return (
            f"fitted to it on training images, then trained for at most {settings.finetune_epochs} more, "
            f"{TEACHERS['kd']}; held-out training images decided the learning rate, the end and the epoch that is kept"
        )
    how = {
        "labels": f"trained for {settings.finetune_epochs} more",
        "evolve": f"trained {TEACHERS['evolve']}: {settings.generations} of {epochs} each",
        "hints": f"trained {TEACHERS['hints']}: {counted(settings.hint_epochs, 'epoch')} and {epochs}",
    }
    return how.get(settings.teach, f"trained for {settings.finetune_epochs} more, {TEACHERS[settings.teach]}")


def _settings_table(result: Tradeoff) -> str:
    settings, data = result.settings, result.data
    normalised = ", ".join(
        f"{m:.4g} ± {s:.4g}" for m, s in zip(data.normalisation.mean, data.normalisation.std, strict=True)
    )
    images = f"{data.train_images} to train on, {data.test_images} to test on, {len(data.classes)} classes"
    rows = {
        "model": f"`{result.source}`",
        "initial weights": settings.weights or f"random, seed {settings.seed}",
        "data": f"{data.source}: {images}",
        "images": f"RGB, {data.image_size} x {data.image_size}, normalised by {normalised}",
        "dense training": counted(settings.epochs, "epoch"),
        "method": METHODS[settings.method],
        "fine-tuning": f"{counted(settings.finetune_epochs, 'epoch')}, {_describe_teacher(settings)}",
        "widths": f"multiples of {settings.round_to}" if settings.round_to > 1 else "as the rates say",
        "channels that are kept": IMPORTANCE[settings.importance],
        "optimiser": _describe_optimiser(settings),
        "seed": str(settings.seed),
        **({"seeds of each candidate": ", ".join(map(str, settings.every_seed))} if settings.seeds > 1 else {}),
        "time for the whole run": f"{result.seconds:.0f} s",
        "reused from earlier runs": "; ".join(result.reused) or "nothing",
    }
    return _table(["setting", "value"], [[key, value] for key, value in rows.items()])


def _describe_teacher(settings: TradeoffSettings) -> str:
    return TEACHERS["kd" if settings.method == "compress" else settings.teach]


def _describe_optimiser(settings: TradeoffSettings) -> str:
    """The optimiser with all that its steps depend on."""
    names = {
        "sgd": f"SGD, Nesterov momentum {settings.momentum:g}",
        "adamw": f"AdamW, first beta {settings.momentum:g}",
        "rmsprop": f"RMSProp, decay {settings.momentum:g}",
    }
    said = [
        names[settings.optimizer],
        f"{settings.schedule}, peak rate {settings.peak_lr:g}",
        f"batch {settings.batch_size}",
        f"weight decay {settings.decay:g}",
        *([f"label smoothing {settings.label_smoothing:g}"] if settings.label_smoothing else []),
        *([f"precision {settings.precision}"] if settings.precision not in (None, "no") else []),
        *([f"images augmented by {settings.augmented}"] if settings.augmented else []),
    ]
    return ", ".join(said)


def _environment_table(result: Tradeoff) -> str:
    here = result.environment
    rows = {
        "date": here.date,
        "system": here.system,
        "CPU": f"{here.cpu}, {here.cpu_cores_usable} of {here.cpu_cores} cores usable",
        "load before (1 min)": "unknown" if here.load_1min is None else f"{here.load_1min:.2f}",
        "memory": f"{here.memory_bytes / 2**30:.1f} GiB",
        "GPU": here.gpu or "none",
        "Python": here.python,
        **here.versions,
    }
    return _table(["what", "value"], [[key, value] for key, value in rows.items()])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
