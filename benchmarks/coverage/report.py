"""What `coverage.py` found, as lines and as a table."""

from __future__ import annotations

from typing import Any

ERRORS = (
    "trace_eval",
    "trace_train",
    "permute_error",
    "slim_error",
    "load_error",
    "widen_1.5_error",
    "widen_2_error",
    "deepen_error",
)

_ENDS = {"network input", "network output"}


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    worst = max((row[e] for e in ERRORS if e in row), default=float("nan"))
    failed = f"  FAILED: {', '.join(row['failures'])}" if row["failures"] else ""
    said = "".join(f"\n    {key}: {text}" for key, text in row.items() if key.endswith("_said"))
    return (
        f"{row['model']:38} groups {_of(row, 'editable')}/{_of(row, 'groups')}  worst error {worst:.1e}  "
        f"MACs at 0.5 {_ratio(row, 'slim_macs')}  parameters at 2.0 {_ratio(row, 'widen_2_parameters')}  "
        f"{row.get('seconds', 0):.0f} s, {row['peak_gib']} GiB{failed}{said}"
    )


def markdown(summary: dict[str, Any]) -> str:
    """The table of all rows, and what there is to say of some."""
    rows = summary["models"]
    good = sum(not row["failures"] for row in rows)
    limits = summary["limits"]
    runs = "; then ".join(
        f"`{run['command'].strip()}` ({run['models']} models, {run['date']}, {run['minutes']} minutes)"
        for run in summary["runs"]
    )
    both = sum("batches" in row for row in rows)
    graded = sum(row.get("gradients", False) for row in rows)
    head = (
        "# Coverage\n\n"
        f"{good} of {len(rows)} models without a failure. {runs}; torch "
        f"{summary['torch']}, torchvision {summary['torchvision']}, {summary['device']}; "
        f"limits {limits['minutes']:g} minutes of CPU a model and {limits['gib']:g} GiB in all. Errors are relative, "
        f"in float64; of {both} models at the batch size of the input that is shown and at one more, of {graded} of "
        "these, one a family, also of the inputs' "
        "gradients. `save, load` is of the slim model. A cost is a fraction of the dense model's, the ideal in "
        "brackets: every channel axis changed in full, attention by whole heads. Groups that are left "
        "alone are the network's input and outputs unless a line below the table says otherwise.\n\n"
    )
    columns = (
        "model",
        "input",
        "groups (editable)",
        "trace eval / train",
        "permute",
        "slim 0.5",
        "save, load",
        "widen 1.5",
        "widen 2.0",
        "deepen (places)",
        "MACs at 0.5",
        "parameters at 0.5",
        "MACs at 2.0",
        "parameters at 2.0",
        "trace + groups, s",
        "all, s",
        "GiB",
    )
    table = "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n"
    table += "".join("| " + " | ".join(_cells(row)) + " |\n" for row in rows)
    half = [row["model"] for row in rows if "widened_from" in row]
    notes = f"\n\\* widened and deepened from the half-width version: {', '.join(half)}.\n" if half else ""
    return head + table + notes + "".join(_notes(row) for row in rows) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    inputs = row.get("inputs", [])
    shapes = list(dict.fromkeys("x".join(map(str, shape)) for shape in inputs))
    seconds = row.get("trace_seconds", float("nan")) + row.get("groups_seconds", float("nan"))
    return [
        row["model"] + (" *" if "widened_from" in row else ""),
        (f"{len(inputs)} of " if len(inputs) > 1 else "") + ", ".join(shapes),
        f"{_of(row, 'groups')} ({_of(row, 'editable')})",
        f"{_error(row, 'trace_eval')} / {_error(row, 'trace_train')}",
        *(_error(row, k) for k in ("permute_error", "slim_error", "load_error", "widen_1.5_error", "widen_2_error")),
        f"{_error(row, 'deepen_error')} ({len(row.get('deepened', []))})",
        _ratio(row, "slim_macs"),
        _ratio(row, "slim_parameters"),
        f"{row['widen_2_macs']:.3f}" if "widen_2_macs" in row else "",
        _ratio(row, "widen_2_parameters"),
        f"{seconds:.2f}",
        f"{row.get('seconds', 0):.0f}",
        f"{row['peak_gib']}",
    ]


def _notes(row: dict[str, Any]) -> str:
    notes = ""
    if row["failures"]:
        notes += f"\n- **{row['model']} fails**: {', '.join(row['failures'])}"
        notes += "".join(f"; {text}" for key, text in row.items() if key.endswith("_said"))
    by_reason: dict[str, list[str]] = {}
    for name, why in row.get("left_alone", {}).items():
        if not set(why.split("; ")) <= _ENDS:
            by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        notes += f"\n- {row['model']}: {shown} left alone, wholly or in part: {why}"
    return notes


def _of(row: dict[str, Any], key: str) -> str:
    return str(row.get(key, "?"))


def _error(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.0e}" if key in row else ""


def _ratio(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "?"
    best = row.get(f"{key}_ideal")
    return f"{row[key]:.4f}" + ("" if best is None else f" ({best:.4f})")
