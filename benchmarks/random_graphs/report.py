"""The page of the random networks."""

from __future__ import annotations

from typing import Any


def markdown(document: dict[str, Any]) -> str:
    """Counts, what was refused and why, and what was wrong."""
    counts, run = document["counts"], document["runs"][-1]
    versions = run["environment"]["versions"]
    lines = [
        "# Random networks",
        "",
        f"{document['graphs']:,} networks drawn, {counts.get('traced', 0):,} traced and edited, "
        f"{len(document['wrong'])} wrong. Each was traced, permuted, widened, slimmed, slimmed after it was widened, "
        "saved and loaded, and compared with the network itself, or with what is switched off in it, in both modes, at "
        "two batch sizes, outputs and gradients: "
        f"{counts.get('comparisons', 0):,} such comparisons, the worst off by {document['worst']:.1e} (1e-10 allowed). "
        f"In {counts.get('comparisons that show nothing', 0)} of them the removed channels do not show in the outputs.",
        "",
        f"Of {counts.get('groups', 0):,} inner groups of channels {counts.get('editable groups', 0):,} could be "
        f"edited. {counts.get('networks with a refusal', 0)} networks were refused something.",
        "",
        f"Made with torch {versions['torch']} by `python -m benchmarks.random_graphs`, in {len(document['runs'])} runs "
        f"and {document['seconds'] / 60:.0f} minutes of one core.",
        "",
        "## Wrong",
        "",
        *([f"- network {row['network']}: {row['problem']}" for row in document["wrong"]] or ["None."]),
        "",
        "## Wrong before, and mended",
        "",
        *([_mended(row) for row in document.get("mended", ())] or ["None."]),
        "",
        "## Refused",
        "",
        *([f"- {count} x {reason}" for reason, count in document["refused"].items()] or ["Nothing."]),
        "",
        "## What the networks hold",
        "",
        "| kind of step | networks |",
        "| --- | ---: |",
        *(f"| {kind.replace('_', ' ')} | {count} |" for kind, count in document["kinds"].items()),
        "",
    ]
    return "\n".join(lines)


def _mended(row: dict[str, Any]) -> str:
    """What was wrong; and why, where somebody has found it and written it into the file as ``cause``."""
    cause = f" ({row['cause']})" if "cause" in row else ""
    return f"- network {row['network']}: {row['problem']}{cause}"
