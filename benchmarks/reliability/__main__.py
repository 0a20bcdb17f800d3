"""Damaged files, killed writers and random chains of edits, counted.

    python -m benchmarks.reliability                        # benchmarks/results/reliability.{json,md}
    python -m benchmarks.reliability --trials 100 --chains 20 --kills 30

Each trial damages one file of an artefact and reads it. A writer is killed before its system calls that change files,
in turn, a command at some of them, spread over its run; what is there afterwards is read, and it runs again. Chains are
compared at two batch sizes. ``--only commands`` and the like make a part anew and keep the others.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from benchmarks.reliability.artefacts import ARTEFACTS, Artefact
from benchmarks.reliability.chains import run_chain
from benchmarks.reliability.commands import COMMANDS, kill_often
from benchmarks.reliability.killer import can_trace, kill_at
from benchmarks.reliability.trial import attempt
from benchmarks.results_io import RESULTS, new_document, read_document, write_document

PARTS = ("damaged", "killed", "commands", "chains")

SLOW, LARGE = 5.0, 500.0
"""Seconds and MiB above which a trial is counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000, help="damaged files of each artefact")
    parser.add_argument("--chains", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=100, help="system calls of each writer at most")
    parser.add_argument("--command-kills", type=int, default=30, help="system calls of each command at most")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    document = read_document(options.out) if options.out.exists() else {"runs": []}
    document["runs"].append({**new_document("reliability"), "parts": options.only or PARTS})
    with tempfile.TemporaryDirectory() as name:
        for part in options.only or PARTS:
            document[part] = []
            for row in _rows(part, options, Path(name) / part):
                document[part].append(row)
                print(row, flush=True)
                write_document(options.out, document)
                options.out.with_suffix(".md").write_text(markdown(document))


def _rows(part: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one part, as they are done."""
    if part == "damaged":
        yield from (damage(one, folder / one.name.replace(" ", "-"), options.trials) for one in ARTEFACTS)
    elif part == "killed":
        writers = {"save": False, "save --force": True}
        yield from (kill(name, force, folder / name, options.kills) for name, force in writers.items())
    elif part == "commands":
        yield from (kill_often(command, folder / command.name, options.command_kills) for command in COMMANDS)
    else:
        wrong = [said for seed in range(options.chains) if (said := run_chain(seed, folder))]
        yield {"chains": options.chains, "wrong": wrong}


def damage(artefact: Artefact, folder: Path, trials: int) -> dict[str, Any]:
    """Damage an artefact ``trials`` times, and count what came of it."""
    original, scratch = folder / "original", folder / "scratch"
    original.mkdir(parents=True)
    artefact.make(original)
    expected = artefact.read(original)
    outcomes = [(seed, attempt(artefact, original, scratch, expected, seed)) for seed in range(trials)]
    bad = [f"seed {s}: {o.kind}: {o.said}" for s, o in outcomes if o.kind in ("raw", "silent", "fetched")]
    return {
        "artefact": artefact.name,
        "trials": trials,
        **dict(sorted(Counter(o.kind for _, o in outcomes).items())),
        "slow": sum(o.seconds > SLOW for _, o in outcomes),
        "large": sum(o.mebibytes > LARGE for _, o in outcomes),
        "slowest": round(max(o.seconds for _, o in outcomes), 2),
        "bad": bad[:20],
    }


def kill(writer: str, force: bool, folder: Path, most: int) -> dict[str, Any]:
    """Kill `surgery.save` at its system calls in turn, and count what is lost or torn."""
    row: dict[str, Any] = {"writer": writer, "kills": 0, "calls": Counter(), "lost": 0, "torn": 0, "unfinished": 0}
    if not can_trace():
        return {**row, "calls": {}, "note": "this system does not let a process trace its children"}
    old, new = (surgery.trace(_linear(seed), torch.zeros(1, 3)) for seed in (0, 1))
    for count in range(most):
        if force:
            surgery.save(old, folder, force=True)
        call = kill_at(_saver(new, folder, force), count)
        if call is None:
            break
        row["kills"] += 1
        row["calls"][call] += 1
        if folder.exists():
            row["torn"] += not any(_is(folder, model) for model in ((old, new) if force else (new,)))
        else:
            row["lost"] += force
        surgery.save(new, folder, force=True)
        row["unfinished"] += not _is(folder, new) or len(list(folder.parent.glob(f".{folder.name}*"))) > 0
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return {**row, "calls": dict(row["calls"])}


def _saver(module: nn.Module, folder: Path, force: bool) -> Callable[[], object]:
    return lambda: surgery.save(module, folder, force=force)


def _linear(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 2)


def _is(folder: Path, module: nn.Module) -> bool:
    try:
        found = surgery.load(folder, model=nn.Linear(3, 2))
    except surgery.SurgeryError:
        return False
    return torch.equal(found.get_parameter("weight"), module.get_parameter("weight"))


def markdown(document: dict[str, Any]) -> str:
    """The counts as tables."""
    kinds = ("refused", "same", "other", "silent", "raw", "fetched", "slow", "large")
    versions = document["runs"][-1]["environment"]["versions"]
    lines = ["# Damaged files, killed writers, random chains", ""]
    lines += [f"Made by `python -m benchmarks.reliability` with torch {versions['torch']}.", ""]
    lines += [
        "## Damaged files",
        "",
        f"| artefact | trials | {' | '.join(kinds)} |",
        f"|---|{'---:|' * (1 + len(kinds))}",
    ]
    for row in document.get("damaged", ()):
        lines.append(f"| {row['artefact']} | {row['trials']} | {' | '.join(str(row.get(k, 0)) for k in kinds)} |")
    lines += ["", "## Killed at system calls", ""]
    lines += [
        "| writer | kills | kinds of calls | lost | torn | reruns that did not end whole |",
        f"|---|{'---:|' * 5}",
    ]
    for row in (*document.get("killed", ()), *document.get("commands", ())):
        counts = (row["kills"], len(row["calls"]), row["lost"], row["torn"], row["unfinished"])
        lines.append(f"| {row['writer']} | {' | '.join(map(str, counts))} |")
    lines += ["", "## Random chains of edits", ""]
    for row in document.get("chains", ()):
        lines.append(f"{row['chains']} chains at two batch sizes, {len(row['wrong'])} wrong.")
    bad = [said for row in document.get("damaged", ()) for said in row["bad"]]
    bad += [said for row in document.get("chains", ()) for said in row["wrong"]]
    return "\n".join([*lines, *(["", *(f"- {said}" for said in bad)] if bad else [])]).rstrip() + "\n"


if __name__ == "__main__":
    main()
