"""How benchmarks keep what they find: a compact JSON file, a table and a picture next to it, 150 kB a file at most."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from surgery.deploy.measure.benchmark import Comparison
from surgery.deploy.measure.environment import environment

RESULTS = Path(__file__).parent / "results"
LIMIT = 150_000
"""Bytes of a file at most."""
_LONG = 12
"""Arrays with more entries than this get a line of their own, in a record that is spread over lines."""


def command(benchmark: str) -> str:
    """The command line that runs this benchmark again, such as ``"python -m benchmarks.coverage --jobs 2"``."""
    return " ".join(["python -m", f"benchmarks.{benchmark}", *sys.argv[1:]])


def new_document(benchmark: str, **parts: Any) -> dict[str, Any]:
    """A document that says how and where it was made."""
    return {"command": command(benchmark), "environment": environment().to_dict(), **parts}


def open_document(path: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """Read the document that an earlier run left, or start with ``new``.

    Ends the program where the file was made with other settings.
    """
    if not path.exists():
        return dict(new)
    document = read_document(path)
    if document["settings"] != new["settings"]:
        sys.exit(f"{path} was made with other settings: move it away, or name another file with --out")
    return document


def read_document(path: Path) -> dict[str, Any]:
    """Read what `write_document` wrote, its parts joined."""
    document: dict[str, Any] = json.loads(path.read_text())
    for key, value in document.items():
        if isinstance(value, dict) and set(value) == {"parts"}:
            document[key] = [row for part in value["parts"] for row in json.loads((path.parent / part).read_text())]
    return document


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as compact JSON: a record a line, and an array of samples a line.

    Where that is more than `LIMIT` bytes, the longest list at the top goes to files of its own, ``name.key.1.json``
    and so on, which `read_document` joins again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{path.stem}.*.json"):
        old.unlink()
    document = dict(document)
    while len(text := compact(document)) > LIMIT:
        lists = {key: len(compact(value)) for key, value in document.items() if isinstance(value, list)}
        if not lists:
            break  # a single record is as long as that: better long than cut
        key = max(lists, key=lists.__getitem__)
        names = []
        for number, rows in enumerate(_chunks(document[key]), 1):
            names.append(f"{path.stem}.{key}.{number}.json")
            (path.parent / names[-1]).write_text(compact(rows) + "\n")
        document[key] = {"parts": names}
    path.write_text(text + "\n")


def compact(value: Any, depth: int = 0) -> str:
    """JSON text with few line breaks: two levels are spread over lines, and below them what holds long arrays is."""
    line = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    if not isinstance(value, dict | list) or not value or (depth > 1 and not _holds_samples(value)):
        return line
    if isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in value):
        return line
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}:{compact(entry, depth + 1)}" for key, entry in value.items()]
        return "{" + inner + f",{inner}".join(entries) + outer + "}"
    return "[" + inner + f",{inner}".join(compact(entry, depth + 1) for entry in value) + outer + "]"


def write_report(path: Path, text: str) -> None:
    """Write the table next to the JSON file ``path``, and print it."""
    path.with_suffix(".md").write_text(text)
    print(text)


def save_figure(figure: Figure, path: Path, dpi: float | None = None) -> None:
    """Save a picture with a palette of 256 colours, a third of the size of one without."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **({} if dpi is None else {"dpi": dpi}))
    shrink_picture(buffer, path)


def shrink_picture(source: Path | io.BytesIO, path: Path) -> None:
    """Save the picture in ``source`` with a palette of 256 colours."""
    Image.open(source).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def comparison_record(compared: Comparison, kept: Iterable[str]) -> dict[str, Any]:
    """A comparison as JSON data: what its results share said once, the fields ``kept`` of each, ratios as speed-ups."""
    results = {name: result.to_dict() for name, result in compared.results.items()}
    first, kept = next(iter(results.values())), tuple(kept)
    return {
        "threads": first["threads"],
        "environment": first["environment"],
        "results": {name: {key: result[key] for key in kept} for name, result in results.items()},
        "speedups": {
            name: {"value": 1 / r.value, "low": 1 / r.high, "high": 1 / r.low, "confidence": r.confidence}
            for name, r in compared.ratios.items()
        },
    }


def _chunks(rows: list[Any]) -> list[list[Any]]:
    """The rows in as few runs, in order, as fit into `LIMIT` bytes each."""
    found: list[list[Any]] = [[]]
    size = 0
    for row in rows:
        length = len(compact(row, 1)) + 3
        if found[-1] and size + length > LIMIT - 100:
            found.append([])
            size = 0
        found[-1].append(row)
        size += length
    return found


def _holds_samples(value: Any) -> bool:
    """Whether a long array of numbers is somewhere inside."""
    if isinstance(value, dict):
        return any(map(_holds_samples, value.values()))
    return isinstance(value, list) and (
        any(map(_holds_samples, value)) or (len(value) > _LONG and isinstance(value[0], int | float))
    )
