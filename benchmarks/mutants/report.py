"""The page of the mutants."""

from __future__ import annotations

from collections import Counter
from typing import Any

KILLED = ("killed", "timeout")


def markdown(document: dict[str, Any]) -> str:
    """The share that is killed, and each one that is not."""
    rows, run = document["mutants"], document["runs"][-1]
    tried = [row for row in rows if row["result"] != "invalid"]
    lived = [row for row in tried if row["result"] not in KILLED]
    equivalent = [row for row in lived if "reason" in row]
    others = [row for row in lived if "reason" not in row]
    counted = len(tried) - len(equivalent)
    killed = len(tried) - len(lived)
    share = f"{100 * killed / counted:.1f} %" if counted else "none"
    lines = [
        "# Mutants",
        "",
        f"Of {document['total']:,} single changes of functions in `axes/`, `rules/`, `edit/` and `operations/`, "
        f"{len(tried)} were drawn and tried. {killed} are killed by the fast tests, {len(equivalent)} change no "
        f"result, {len(others)} live: {share} of those that are not equivalent are killed.",
        "",
        f"Made with torch {run['environment']['versions']['torch']} by `python -m benchmarks.mutants`, in "
        f"{len(document['runs'])} runs.",
        "",
        "| folder | tried | killed | equivalent | live |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for room in sorted({row["file"].rpartition("/")[0] for row in tried}):
        inside = [row for row in tried if row["file"].startswith(f"{room}/")]
        counts = Counter(
            "killed" if row["result"] in KILLED else "equivalent" if "reason" in row else "live" for row in inside
        )
        lines.append(f"| {room} | {len(inside)} | {counts['killed']} | {counts['equivalent']} | {counts['live']} |")
    lines += ["", "## Live", ""]
    lines += [f"- {_text(row)}" + (" (no test executes it)" if row["result"] == "untested" else "") for row in others]
    lines += ["" if others else "None.", "## Equivalent", ""]
    lines += [f"- {_text(row)}. {row['reason']}" for row in equivalent] or ["None."]
    return "\n".join(lines) + "\n"


def _text(row: dict[str, Any]) -> str:
    return f"`{row['file']}:{row['line']}` in `{row['function']}`, {row['what']}: `{row['source']}`"
