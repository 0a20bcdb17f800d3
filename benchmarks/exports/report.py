"""The table of exports.py."""

from __future__ import annotations

from typing import Any


def line(row: dict[str, Any]) -> str:
    """One row, as the terminal shows it."""
    if "error" in row:
        return f"{row['model']} {row['variant']}: {row['error']}"
    files = row["files"]
    counted = "" if files[0]["detections"] is None else f", {sum(file['detections'] for file in files)} detections"
    return (
        f"{row['model']} {row['variant']}: {files[0]['exporter']}, {worst(row):.1e}{counted}, {row['seconds']:.0f} s"
        + (f", NOT FOLDED {files[0]['unfolded']}" if files[0]["unfolded"] else "")
    )


def worst(row: dict[str, Any]) -> float:
    """The largest relative error of the row's files."""
    return float(max(file["max_rel"] for file in row["files"]))


def markdown(document: dict[str, Any]) -> str:
    """The summary, what failed, and a row for each model."""
    rows = document["models"]
    good = [row for row in rows if "error" not in row]
    run = document["runs"][-1]
    versions = run["environment"]["versions"]
    names = {variant: [row["model"] for row in good if row["variant"] == variant] for variant in ("built", "slim")}
    only_small = [row["model"] for row in good if row["variant"] == "small" and row["model"] not in names["built"]]
    dynamo, torchscript = (sum(r["files"][0]["exporter"] == e for r in good) for e in ("dynamo", "torchscript"))
    unbuilt = f", and {len(only_small)} built for small images alone ({', '.join(only_small)})" if only_small else ""
    head = [
        "# ONNX exports of the catalogue",
        "",
        f"{len(good)} of {len(rows)} exports agree with torch at batch 1, 2 and 3: {len(names['built'])} models as "
        f"built{unbuilt}; and {len(names['slim'])} that were slimmed by half, for small images. "
        f"The exporter was dynamo for {dynamo}, TorchScript for {torchscript}.",
        f"BatchNorms that could have been folded and were not: {sum(len(r['files'][0]['unfolded']) for r in good)}.",
        "",
        f"Made on {run['environment']['cpu']}, torch {versions['torch']}, ONNX Runtime {versions['onnxruntime']}, by "
        f"`python -m benchmarks.exports`, in {len(document['runs'])} runs, whose arguments are in the JSON file.",
        "",
    ]
    failed = [row for row in rows if "error" in row]
    if failed:
        head += ["## What could not be exported", ""]
        head += [f"- `{row['model']}`, {row['variant']}: {row['error']}" for row in failed]
        head.append("")
    head += [
        "## All",
        "",
        "| model | variant | input | exporter | opset | open axes | max. rel. error | detections | MB | nodes | s |",
        "| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*head, *map(_cells, good)]) + "\n"


def _cells(row: dict[str, Any]) -> str:
    files = row["files"]
    counts = [file["detections"] for file in files if file["detections"] is not None]
    cells = [
        row["model"],
        row["variant"],
        " x ".join(map(str, row["input_shapes"][0])),
        files[0]["exporter"],
        str(files[0]["opset"]),
        ", ".join(files[0]["open_axes"]) or "none",
        f"{worst(row):.1e}",
        str(sum(counts)) if counts else "",
        f"{files[0]['bytes'] / 1e6:.1f}",
        str(files[0]["nodes"]),
        f"{row['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"
