"""The table of versions.py."""

from __future__ import annotations

from typing import Any

from benchmarks.versions.suite import PARTS


def line(row: dict[str, Any], part: str) -> str:
    """One part of one environment, as the terminal shows it."""
    result = row["parts"][part]
    said = f", {result['error']}" if result["error"] else ""
    return (
        f"{row['target']} (torch {row['versions']['torch']}) {part}: {result['passed']} passed, "
        f"{len(result['failed'])} failed, {result['skipped']} skipped{said}, {result['seconds']} s"
    )


def failed(row: dict[str, Any]) -> bool:
    """Whether anything in an environment failed or did not run to its end."""
    return "error" in row or any(result["failed"] or result["error"] for result in row["parts"].values())


def markdown(document: dict[str, Any]) -> str:
    """The versions of each environment, the tests that passed in each, and those that failed by name."""
    rows = document["environments"]
    used = [part for part in PARTS if any(part in row["parts"] for row in rows)]
    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy")
    failures = [
        (row, part, name, why)
        for row in rows
        for part, result in row["parts"].items()
        for name, why in result["failed"].items()
    ]
    ended = [(row, f"{part}: {r['error']}") for row in rows for part, r in row["parts"].items() if r["error"]]
    ended += [(row, row["error"]) for row in rows if "error" in row]
    lines = [
        "# Versions",
        "",
        f"The package's tests with {len(rows)} sets of versions, each in an environment of its own: {len(failures)} "
        f"failures. A cell has the tests that passed, failed and were skipped. Made by `{document['command']}`.",
        "",
        f"| environment | Python | {' | '.join(packages)} |",
        f"| --- | --- |{' ---: |' * len(packages)}",
        *(_cells(row["target"], row["python"], *map(row["versions"].get, packages)) for row in rows if "python" in row),
        "",
        f"| environment | {' | '.join(used)} | date |",
        f"| --- |{' ---: |' * len(used)} --- |",
        *(_cells(row["target"], *(_counts(row["parts"].get(part)) for part in used), _date(row)) for row in rows),
        "",
    ]
    if failures:
        lines += ["## Failures", ""]
        lines += [f"- {row['target']}, {part}: `{name}`: {why}" for row, part, name, why in failures]
        lines.append("")
    if ended:
        lines += ["## What did not run to its end", ""]
        lines += [f"- {row['target']}: {why}" for row, why in ended]
        lines.append("")
    return "\n".join(lines)


def _counts(result: dict[str, Any] | None) -> str:
    return "" if result is None else f"{result['passed']} / {len(result['failed'])} / {result['skipped']}"


def _date(row: dict[str, Any]) -> str:
    """When the last part of the row was run."""
    return max((result["date"] for result in row["parts"].values()), default="")


def _cells(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"
