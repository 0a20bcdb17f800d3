"""The package tested with each version of torch that it allows, each in an environment of its own.

    python -m benchmarks.versions                 # floor, 2.13.0, newest: benchmarks/results/versions.{json,md}
    python -m benchmarks.versions 2.14.0 --again  # this row anew, the others kept
    python -m benchmarks.versions floor --parts graph,cost

An environment is a new virtual environment with the package, its dependencies and its tools, from the package index
that pip is set up with. ``floor`` has the lowest torch and torchvision that pyproject.toml allows, ``2.13.0``
that torch, and ``newest`` what pip chooses. The tests of each part run in a process of their own, ended at a limit of
time. Results are written part by part: a run that was ended goes on where it was, and what has a result is not run
again without ``--again``. An environment has about 6 GB; it is removed when its parts are done.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.results_io import RESULTS, read_document, write_document
from benchmarks.versions.environments import NEWEST, InstallError, make_environment, requirements
from benchmarks.versions.report import failed, line, markdown
from benchmarks.versions.suite import PARTS, installed_versions, run_part

TARGETS = ("floor", "2.13.0", NEWEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", default=TARGETS, help="floor, newest or a version of torch, such as 2.13.0"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="what is tested, with commas")
    parser.add_argument("--again", action="store_true", help="run what has a result as well")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--minutes", type=float, default=60, help="time limit of one part")
    parser.add_argument("--processes", type=int, default=2, help="test processes at a time")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "surgery-versions")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "versions.json", help="the JSON file; a table goes beside"
    )
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown parts {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    out: Path = options.out
    document = read_document(out) if out.exists() else {"environments": []}
    rows = {row["target"]: row for row in document["environments"]}

    def store() -> None:
        document.update(command="python -m benchmarks.versions", environments=list(rows.values()))
        write_document(out, document)
        out.with_suffix(".md").write_text(markdown(document))

    for target in options.targets:
        row = rows.setdefault(target, {"target": target, "requirements": requirements(target), "parts": {}})
        wanted = [part for part in parts if options.again or part not in row["parts"]]
        if not wanted:
            continue
        folder = options.folder / target
        row.pop("error", None)
        try:
            python = make_environment(folder, row["requirements"])
        except InstallError as error:
            row["error"] = str(error)
            store()
            continue
        row |= installed_versions(python)
        for part in wanted:
            row["parts"][part] = run_part(python, part, options.processes, 60 * options.minutes)
            print(line(row, part), flush=True)
            store()
        if not options.keep:
            shutil.rmtree(folder)
    print(markdown(document))
    if any(failed(row) for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
