"""Every edit on random networks: exact, or refused with a reason.

    python -m benchmarks.random_graphs                 # 2,000: benchmarks/results/random-graphs.{json,md}
    python -m benchmarks.random_graphs --graphs 5000   # goes on to 5,000
    python -m benchmarks.random_graphs --again         # tries those that were wrong once more, after they were mended
    python -m benchmarks.random_graphs --only 17 --shrink

A network is drawn from its number. `tests.random_graphs.check` says what is tried and compared. A run that was stopped
goes on where it was.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_graphs.report import markdown
from benchmarks.results_io import RESULTS, new_document, read_document, write_document
from tests.random_graphs import draw
from tests.random_graphs.check import WrongError, check, shrink

EVERY = 20
"""Networks between two writes of the result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=2000, help="how many, those of earlier runs included")
    parser.add_argument("--only", type=int, help="try one network, by its number, and write nothing")
    parser.add_argument("--shrink", action="store_true", help="with --only: find a smaller network that is wrong too")
    parser.add_argument("--again", action="store_true", help="try those that were wrong once more")
    parser.add_argument("--out", type=Path, default=RESULTS / "random-graphs.json", help="the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        print(try_one(options.only, options.shrink))
        return
    out: Path = options.out
    new = {"graphs": 0, "seconds": 0.0, "worst": 0.0, "counts": {}, "kinds": {}, "refused": {}, "wrong": []}
    document = read_document(out) if out.exists() else {"runs": [], **new}
    document["runs"].append({**new_document("random_graphs"), "first": document["graphs"]})
    if options.again:
        try_again(document)
        options.graphs = 0
    while document["graphs"] < options.graphs:
        started = time.process_time()
        for number in range(document["graphs"], min(document["graphs"] + EVERY, options.graphs)):
            add(document, number)
        document["seconds"] = round(document["seconds"] + time.process_time() - started, 1)
        write_document(out, document)
        out.with_suffix(".md").write_text(markdown(document))
        print(f"{document['graphs']} networks, {len(document['wrong'])} wrong, {document['seconds']:.0f} s", flush=True)
    write_document(out, document)
    out.with_suffix(".md").write_text(markdown(document))


def try_again(document: dict[str, Any]) -> None:
    """Try the wrong networks once more; those that are right now are kept as ``mended``, with what was wrong."""
    before, document["wrong"] = document["wrong"], []
    for row in before:
        known = len(document["wrong"])
        count(document, row["network"])
        if len(document["wrong"]) == known:
            document.setdefault("mended", []).append(row)


def add(document: dict[str, Any], number: int) -> None:
    """Try one network, and count what it holds and what came of it."""
    steps, output = draw(number)
    document["counts"][f"output: {output}"] = document["counts"].get(f"output: {output}", 0) + 1
    document["kinds"] = dict(sorted((Counter(document["kinds"]) + Counter({kind for kind, _, _ in steps})).items()))
    count(document, number)
    document["graphs"] = number + 1


def count(document: dict[str, Any], number: int) -> None:
    """Try one network, and count what came of it."""
    steps, output = draw(number)
    counts, refused = (Counter(document[key]) for key in ("counts", "refused"))
    try:
        outcome = check(steps, output)
    except WrongError as error:
        document["wrong"].append({"network": number, "problem": str(error).partition("\n")[0][:300]})
    else:
        counts["traced"] += outcome.traced
        counts["comparisons"] += outcome.edits
        counts["groups"] += outcome.groups
        counts["editable groups"] += outcome.editable
        counts["networks with a refusal"] += bool(outcome.refused)
        counts["comparisons that show nothing"] += len(outcome.vacuous)
        refused.update(f"{what}: {plain(reason)}" for what, reason in outcome.refused.items())
        document["worst"] = max(document["worst"], outcome.worst)
    document["counts"] = dict(counts)
    document["refused"] = dict(refused.most_common())


def plain(reason: str) -> str:
    """A reason without the names and sizes of one network, so that equal ones are counted together."""
    line = reason.partition("\n")[0]
    for pattern, instead in ((r"\w+\.py:\d+", "…"), (r"step\d+[\w.]*", "…"), (r"\b\d+\b", "n")):
        line = re.sub(pattern, instead, line)
    return line[:160]


def try_one(number: int, smaller: bool) -> str:
    """What came of one network, for reading."""
    steps, output = draw(number)
    try:
        return f"{steps}, {output}\n{check(steps, output)}"
    except WrongError as error:
        found = shrink(steps, output) if smaller else (steps, output, str(error))
        return f"{steps}, {output}\nWRONG {error}\nsmaller: {found}"


if __name__ == "__main__":
    main()
