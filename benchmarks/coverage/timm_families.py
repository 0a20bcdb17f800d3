"""One model of each of timm's families: what of it can be edited, what it costs at half the width, what is exact.

    python -m benchmarks.coverage.timm_families                    # benchmarks/results/coverage-timm.{json,md}
    python -m benchmarks.coverage.timm_families nfnet hiera --exact --merge   # these rows anew, with errors

Costs and shares come from shapes alone: the weights are on the meta device. A share is the part of the MACs of weights
that lies at channels which must stay, by reason; a weight lies between two groups and may count for both. With
``--exact`` the model is built a second time, in float64, nowhere constant, and permuted, widened by 1.5 and 2, slimmed
(against the dense model with the rest switched off) and loaded from a folder; the errors are relative, at two batch
sizes. Each family runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from benchmarks.coverage.timm_models import FAMILIES
from benchmarks.results_io import RESULTS, command, read_document, write_document
from surgery import models

_TARGET = 0.40
"""The MACs of a slim model that are asked for, of those of the dense one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="by name; all by default")
    parser.add_argument("--exact", action="store_true", help="edit the models with numbers, too")
    parser.add_argument("--merge", action="store_true", help="keep the other rows of the results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for coverage-timm.json and coverage-timm.md")
    parser.add_argument("--minutes", type=float, default=10, help="time limit of one family")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)  # one family, as JSON on stdout
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.families[0], options.exact)))
        return
    file = options.out / "coverage-timm.json"
    rows = {row["family"]: row for row in read_document(file)["models"]} if options.merge and file.is_file() else {}
    for family in options.families or FAMILIES:
        row = run(family, options.exact, 60 * options.minutes)
        rows[family] = {**(rows.get(family, {}) if options.merge and not options.exact else {}), **row}
        print(family, row.get("slim_macs", "?"), row.get("failures", ""), flush=True)
        write(options.out, rows)


def run(family: str, exact: bool, seconds: float) -> dict[str, Any]:
    """The row of a family, measured in a process of its own."""
    call = [sys.executable, "-m", "benchmarks.coverage.timm_families", family, "--row", *["--exact"] * exact]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"family": family, "failures": {"time": f"ended at the limit of {seconds / 60:g} minutes"}}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]
        return {"family": family, "failures": {"ended": last[:300]}}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def measure(family: str, exact: bool) -> dict[str, Any]:
    """One row: shapes, then, where asked for, numbers. What raises is a failure of the row."""
    warnings.filterwarnings("ignore")
    source, size = FAMILIES[family]
    row: dict[str, Any] = {"family": family, "source": source, "input": [2, 3, size, size], "failures": {}}
    steps = (_measure_shapes, _measure_errors) if exact else (_measure_shapes,)
    for step in steps:
        try:
            step(row, source, size)
        except Exception as error:  # whatever stands in the way is the finding
            row["failures"][step.__name__.removeprefix("_measure_")] = " ".join(
                f"{type(error).__name__}: {error}".split()
            )[:300]
    return row


def _measure_shapes(row: dict[str, Any], source: str, size: int) -> None:
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = models.build(source)
        except surgery.UsageError:  # it computes something of values while it is built
            model = models.build(source).to("meta")
    begin = time.perf_counter()
    traced = surgery.trace(model.eval(), torch.empty(2, 3, size, size, device="meta"), check=False)
    groups = surgery.dimension_groups(traced)
    row["seconds"] = round(time.perf_counter() - begin, 1)
    row["params"] = sum(p.numel() for p in model.parameters())
    row["whole"] = isinstance(traced, torch.fx.GraphModule)
    row["groups"], row["editable"] = len(groups), sum(group.editable for group in groups)
    macs, costs, shares = surgery.weight_macs(traced), surgery.group_costs(traced, groups), defaultdict(float)
    for group in groups:
        if group.frozen.any():
            shares[group.reason[:150]] += costs[group.name].macs * float(group.frozen.mean()) / sum(macs.values())
    row["left_alone"] = {why: round(n, 3) for why, n in sorted(shares.items(), key=lambda s: -s[1]) if n >= 0.005}
    slim = surgery.slim(traced, 0.5)
    row["slim_macs"] = round(surgery.cost(slim).macs / surgery.cost(traced).macs, 4)


def _measure_errors(row: dict[str, Any], source: str, size: int) -> None:
    model = randomise(models.build(source, seed=0)).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    traced = surgery.trace(model, x, source=source)
    groups = [group for group in surgery.dimension_groups(traced) if group.editable]
    slim = surgery.slim(traced, 0.5)
    edits = {
        "trace": lambda: (traced, model),
        "permute": lambda: (surgery.reindex(traced, {g.name: g.permutation(1) for g in groups}), traced),
        "slim": lambda: (slim, surgery.masked(traced, surgery.split_masks(traced, 0.5))),
        "load": lambda: (_reload(slim), slim),
        "widen 1.5": lambda: (surgery.widen(traced, 1.5), traced),
        "widen 2": lambda: (surgery.widen(traced, 2.0), traced),
    }
    for name, edit in edits.items():
        try:
            check = surgery.verify(*edit(), x)
        except surgery.SurgeryError as error:
            row["failures"][name] = f"{type(error).__name__}: {error}"[:300]
            continue
        row[f"{name} error"], row["batches"] = check.max_rel, check.batches
        if not check.ok:
            row["failures"][name] = check.problem or f"differs by {check.max_rel:.0e}"


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter that is constant, and the statistics of norms, values of their own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                positive = name.endswith(("weight", "running_var")) or bool((tensor > 0).all())
                noise = torch.rand(tensor.shape, generator=generator)
                if isinstance(tensor, nn.Parameter) or "running" in name:
                    tensor.copy_(noise + 0.5 if positive else noise - 0.5)
    return model


def _reload(module: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(module, Path(folder) / "saved")
        return surgery.load(Path(folder) / "saved").eval()


def write(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    """The results as JSON and as a table."""
    import timm

    ordered = [rows[family] for family in FAMILIES if family in rows]
    write_document(
        out / "coverage-timm.json",
        {
            "command": command("coverage.timm_families"),
            "timm": timm.__version__,
            "torch": torch.__version__,
            "models": ordered,
        },
    )
    (out / "coverage-timm.md").write_text(markdown(ordered, timm.__version__))


def markdown(rows: list[dict[str, Any]], version: str) -> str:
    """The table of all rows, and what is left alone in those that cost more than is asked for."""
    known = [row for row in rows if "slim_macs" in row]
    low = sum(row["slim_macs"] <= _TARGET for row in known)
    exact = [row for row in rows if "slim error" in row]
    text = (
        f"# timm {version}\n\n`python -m benchmarks.coverage.timm_families`. One model of {len(rows)} of its "
        f"{len(FAMILIES)} families: {len(known)} are traced and "
        f"slimmed, {low} of them to at most {_TARGET:.2f} of the MACs at rate 0.5. {len(exact)} were edited with "
        "numbers: errors are the largest of permuting, widening by 1.5 and 2, slimming and loading, in float64 at two "
        "batch sizes.\n\n| family | model | input | groups (editable) | MACs at 0.5 | largest error | failures |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        errors = [value for key, value in row.items() if key.endswith(" error")]
        text += (
            f"| {row['family']} | {row.get('source', '').removeprefix('timm:')} | {row.get('input', ['', '', ''])[-1]} "
            f"| {row.get('groups', '?')} ({row.get('editable', '?')}) | {row.get('slim_macs', '?')} "
            f"| {f'{max(errors):.0e}' if errors else ''} "
            f"| {'; '.join(f'{k}: {v}' for k, v in row['failures'].items())} |\n"
        )
    for row in known:
        if row["slim_macs"] > _TARGET:
            shares = "; ".join(f"{why} ({share:.2f})" for why, share in list(row["left_alone"].items())[:4])
            text += f"\n- **{row['family']}**: {shares}"
    return text + "\n"


if __name__ == "__main__":
    main()
