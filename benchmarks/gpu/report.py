"""The table of gpu.py."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.parts import BATCHES, RATES


def line(row: dict[str, Any]) -> str:
    """One part, as the terminal shows it."""
    return f"{row['part']}: {row.get('error', 'ok')}, {row['seconds']:.1f} s"


def markdown(document: dict[str, Any]) -> str:
    """What was right, what failed, and the figures of each kind of part."""
    rows = document["parts"]
    failed = [row for row in rows if "error" in row]
    here = document["environment"]
    lines = [
        f"# On {document['device']}",
        "",
        f"{len(rows) - len(failed)} of {len(rows)} parts are right. Made with torch {here['versions']['torch']}, CUDA "
        f"{here['cuda'] or 'none'}, by `{document['command']}`, {here['date'][:10]}.",
        "",
    ]
    if failed:
        lines += ["## What failed", "", *(f"- `{row['part']}`: {row['error']}" for row in failed), ""]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            kinds.setdefault(row["part"].partition("/")[0], []).append(row)
    for kind, table in _TABLES.items():
        if kind in kinds:
            lines += [*table(kinds[kind]), ""]
    return "\n".join(lines)


def _surgery(rows: list[dict[str, Any]]) -> list[str]:
    keys = ("traced", "widened", "slimmed", "moved")
    times = ("trace", "widen", "slim")
    return [
        "## Surgery",
        "",
        "Relative errors: of the traced and the widened model against the model, of the slim one against the model "
        "with the rest switched off, and of the slim one on this device against the CPU.",
        "",
        f"| model | {' | '.join(keys)} | {' | '.join(f'{key}, s' for key in times)} |",
        f"| --- |{' ---: |' * 7}",
        *(
            _cells(
                row["part"].partition("/")[2],
                *(f"{row['errors'][key]:.1e}" for key in keys),
                *(f"{row['operation_seconds'][key]:.2f}" for key in times),
            )
            for row in rows
        ),
    ]


def _latency(rows: list[dict[str, Any]]) -> list[str]:
    by_part = {tuple(row["part"].split("/")[1:]): row["rates"] for row in rows}
    runtimes = list(dict.fromkeys(runtime for runtime, _ in by_part))
    shown = [f"{rate:g}" for rate in RATES]
    lines = ["## Latency", "", "The median in ms, by the rate that the model is slimmed to.", ""]
    lines += [f"| runtime | batch | {' | '.join(shown)} |", f"| --- | ---: |{' ---: |' * len(shown)}"]
    for runtime in runtimes:
        for batch in map(str, BATCHES):
            if rates := by_part.get((runtime, batch)):
                lines.append(_cells(runtime, batch, *(f"{rates[rate]['p50_ms']:.3f}" for rate in shown)))
    return lines


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Peak memory", "", "| runtime | rate | device, MB | host, MB |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        for rate, found in row["rates"].items():
            sizes = ("" if found[key] is None else f"{found[key] / 1e6:.0f}" for key in ("device_bytes", "host_bytes"))
            lines.append(_cells(row["part"].partition("/")[2], rate, *sizes))
    return lines


def _training(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Training", "", "| precision | steps/s | peak, MB | last loss | resumed, relative difference |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        figures = (f"{row['steps_per_second']:.1f}", peak, f"{row['losses'][-1]:.4f}", f"{row['resumed']:.1e}")
        lines.append(_cells(row["part"].partition("/")[2], *figures))
    return lines


def _processes(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Several processes", "", "| processes | alone, s | together, s | relative difference |"]
    lines.append("| ---: | ---: | ---: | ---: |")
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("seconds_alone", "seconds_together"))
        lines.append(_cells(row["part"].partition("/")[2], *times, f"{row['difference']:.1e}"))
    return lines


_TABLES = {
    "surgery": _surgery,
    "training": _training,
    "processes": _processes,
    "latency": _latency,
    "memory": _memory,
}


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
