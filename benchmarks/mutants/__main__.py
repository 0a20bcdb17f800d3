"""Mutation testing: which single changes of the code does the fast suite not notice?

    python -m benchmarks.mutants --lines            # first: which tests execute which lines (minutes)
    python -m benchmarks.mutants                    # 100 mutants: benchmarks/results/mutants.{json,md}
    python -m benchmarks.mutants --sample 300       # goes on to 300
    python -m benchmarks.mutants --again            # tries those that lived or were not run, after tests were added
    python -m benchmarks.mutants --only surgery/operations/importance/ranking.py:182

Mutants are drawn from all single changes of `rooms.ROOMS`. Each runs in a process of its own, on the tests that execute
the changed line, those that take least first, until one fails. A change that no result can show is listed in
``benchmarks/mutants/equivalent.json`` with the reason. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.mutants.mutate import ROOT, Mutant, list_mutants
from benchmarks.mutants.report import markdown
from benchmarks.mutants.rooms import ROOMS, TESTS
from benchmarks.mutants.trial import Trials
from benchmarks.results_io import RESULTS, new_document, read_document, write_document

EQUIVALENT = Path(__file__).parent / "equivalent.json"
LINES = ROOT / ".pytest_cache" / "mutants-lines.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=100, help="how many, those of earlier runs included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120, help="limit for one mutant, in seconds of its CPU")
    parser.add_argument("--lines", action="store_true", help="run the fast suite to see which tests execute what")
    parser.add_argument("--lines-file", type=Path, default=LINES)
    parser.add_argument("--again", action="store_true", help="try once more what was not killed by a test")
    parser.add_argument("--only", help="try the mutants of one line, FILE:LINE, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "mutants.json", help="the JSON file; a table goes beside")
    options = parser.parse_args()
    if options.lines:
        sys.exit(collect_lines(options.lines_file))
    tests = json.loads(options.lines_file.read_text())
    everything = [m for file in _files() for m in list_mutants(file)]
    trials = Trials(tests, options.seconds)
    if options.only:
        file, _, line = options.only.rpartition(":")
        for mutant in everything:
            if mutant.file == file and mutant.line == int(line):
                print(mutant.what, trials.run(mutant), flush=True)
        return
    drawn = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    run(options.out, drawn, trials, len(everything), options.again)


def run(out: Path, drawn: list[Mutant], trials: Trials, total: int, again: bool) -> None:
    """Try what has no row yet, and write after each."""
    document = read_document(out) if out.exists() else {"runs": [], "mutants": []}
    document["runs"].append(new_document("mutants"))
    document["total"] = total
    rows: dict[str, dict[str, Any]] = {row["key"]: row for row in document["mutants"]}
    for mutant in drawn:
        known = rows.get(mutant.key)
        if known is not None and not (again and known["result"] in ("lived", "untested", "timeout")):
            known["line"] = mutant.line
            continue
        if known is None and again:
            continue
        result, by, count = trials.run(mutant)
        rows[mutant.key] = {
            **{"key": mutant.key, "file": mutant.file, "line": mutant.line, "function": mutant.function},
            **{"what": mutant.what, "source": mutant.source, "result": result, "by": by, "tests": count},
        }
        print(f"{result:8} {mutant.file}:{mutant.line} {mutant.what}: {mutant.source}", flush=True)
        write(out, document, rows)
    write(out, document, rows)


def write(out: Path, document: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """The rows, and the reasons why some are equivalent."""
    reasons = json.loads(EQUIVALENT.read_text())
    document["mutants"] = [
        {**{k: v for k, v in row.items() if k != "reason"}, **({"reason": reasons[key]} if key in reasons else {})}
        for key, row in rows.items()
    ]
    write_document(out, document)
    out.with_suffix(".md").write_text(markdown(document))


def collect_lines(file: Path) -> int:
    """Run the tests with the plugin that notes lines."""
    file.parent.mkdir(exist_ok=True)
    environment = {**os.environ, "SURGERY_LINES": str(file), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.mutants.lines", *TESTS]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def _files() -> list[str]:
    return [str(path.relative_to(ROOT)) for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]


if __name__ == "__main__":
    main()
