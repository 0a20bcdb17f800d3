"""How an edited model is checked, written and shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import surgery
from surgery.cli.options import EXACT, AsJson, Force
from surgery.cli.output import emit, table
from surgery.errors import UsageError
from surgery.units import counted, mebibytes, quantity

if TYPE_CHECKING:
    from torch import nn

INEXACT = "inexact by choice: noise on the weights of copies changes the output"
SHOWN = 40
"""Layers that a dry run lists for people, at the most."""

_WORTH_SAYING = 0.05
"""Of the multiply-accumulates that cannot be edited: the part above which the commands say so."""


@dataclass(frozen=True)
class Writing:
    """The options that say whether a new model is checked and written, and where."""

    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder to write: recipe.json and weights.safetensors. Needed unless --dry-run."
        ),
    ] = None
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Write without comparing both models first.")] = False
    verify: Annotated[bool, typer.Option("--verify", hidden=True)] = True
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would change, and write nothing.")] = False
    force: Force = False
    as_json: AsJson = False

    def refuse(self) -> None:
        """Raise `UsageError` where the folder cannot be written, before any work is done for it."""
        if self.dry_run:
            return
        if self.out is None:
            raise UsageError(
                "Missing option '--out': name the folder to write, or see what would change with --dry-run"
            )
        surgery.storage.folders.refuse_folder(self.out, marker=surgery.models.RECIPE, force=self.force)


def compare_exactly(after: nn.Module, expected: nn.Module) -> surgery.Verification:
    """Compare two models on the example inputs, in float64."""
    import torch

    args, kwargs = surgery.example_inputs(after)
    both = (surgery.comparable(after), surgery.comparable(expected))
    return surgery.verify(*both, args, kwargs=kwargs, dtype=torch.float64, tolerance=EXACT)


def finish(
    before: nn.Module,
    after: nn.Module,
    writing: Writing,
    compare: Callable[[], surgery.Verification],
    *,
    left: Mapping[str, str] | None = None,
    inexact: bool = False,
    more: Mapping[str, object] | None = None,
    said: Sequence[str] = (),
) -> None:
    """Verify and save the new model, unless it is a dry run, and print what it costs.

    Args:
        left: reasons for which layers were left alone.
        more: what else the JSON holds, ``said`` the same as lines for people.
    """
    facts: dict[str, object] = {**({"inexact_by_choice": True} if inexact else {}), **(more or {})}
    if left is not None:
        facts["left_alone"] = dict(left)
    held = surgery.unedited(before)
    facts["unedited"] = held.to_dict()
    reasons = [f"output {output}" for output in surgery.outputs(after) if output.kept]
    reasons += [f"left alone: {reason}" for reason in (left or {}).values()]
    reasons += [str(held)] if held.macs > _WORTH_SAYING else []
    reasons = [*said, *reasons]
    if writing.dry_run or writing.out is None:
        _show(before, after, writing.as_json, facts, [*([INEXACT] if inexact else []), *reasons])
        return
    verified = None if writing.no_verify else compare()
    if verified and not (inexact and math.isfinite(verified.max_rel)):
        verified.raise_if_different()
    figures = {"before": surgery.cost(before), "after": surgery.cost(after)}
    surgery.save(after, writing.out, force=True)  # `Writing.refuse` has looked at what was there
    rows = [[name, quantity(c.params), quantity(c.macs), mebibytes(c.bytes)] for name, c in figures.items()]
    equal = f"verified in {verified.dtype}: relative difference {verified.max_rel:.1e}" if verified else "not verified"
    if inexact:
        by = f"; here by {verified.max_rel:.1e} of its magnitude, in {verified.dtype}" if verified else ""
        equal = f"{INEXACT}{by}"
    emit(
        {
            "out": str(writing.out),
            **{name: c.to_dict() for name, c in figures.items()},
            "verification": verified.to_dict() if verified else None,
            **facts,
        },
        writing.as_json,
        table("", ["", "parameters", "MACs an input", "size"], rows),
        note="\n".join([equal, *reasons, f"saved to {writing.out}"]),
    )


def _show(
    before: nn.Module, after: nn.Module, as_json: bool, facts: Mapping[str, object], reasons: Sequence[str]
) -> None:
    """Print what a dry run would change."""
    found = surgery.changes(before, after)
    rows = found.rows()
    more = [f"and {counted(len(rows) - SHOWN, 'more layer')} (--json lists all)"] if len(rows) > SHOWN else []
    emit(
        {"dry_run": True, **found.to_dict(), **facts},
        as_json,
        *([table("", found.header, rows[:SHOWN], text=["class"], left=["in", "out", "shape"])] if rows else []),
        note="\n".join([*more, found.summary(), *reasons, "nothing was written"]),
    )
