"""Verbs that make a new model out of a model: widen, deepen, slim."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from surgery.cli.options import (
    EXACT,
    AsJson,
    Force,
    InputShape,
    Model,
    Seed,
    Trust,
    Weights,
    int_or_float,
    kernel_size,
    one_or_per_layer,
    open_model,
    per_layer,
)
from surgery.cli.output import emit, table
from surgery.counting.changes import HEADER, changes
from surgery.counting.cost import cost
from surgery.edit.apply import apply
from surgery.edit.recipe import recipe
from surgery.errors import UsageError
from surgery.folders import refuse_folder
from surgery.graph.tracing import example_inputs
from surgery.models.checkpoint import RECIPE, save
from surgery.models.detectors import comparable
from surgery.operations.deepen import deepen as deepen_module
from surgery.operations.slim import masked, split_masks
from surgery.operations.slim import slim as slim_module
from surgery.operations.verify import Verification, verify
from surgery.operations.widen import unwidened
from surgery.operations.widen import widen as widen_module
from surgery.units import counted, mebibytes, quantity

INEXACT = "inexact by choice: noise on the weights of copies changes the output"
SHOWN = 40
"""Up to how many layers a dry run lists for people."""

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="The folder to write: recipe.json and weights.safetensors. Needed unless --dry-run."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would change, and write nothing.")]
Check = Annotated[bool, typer.Option("--verify/--no-verify", help="Run both models and compare them before writing.")]
RoundTo = Annotated[int, typer.Option(help="Round numbers of channels up to a multiple of this.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery widen resnet18 --width 1.5 --out wide")(widen)
    app.command(epilog="Example: surgery deepen resnet18 --at layer3=2 --at layer1.0.conv1 --out deep")(deepen)
    app.command(epilog="Example: surgery slim resnet18 --rate 0.5 --out slim")(slim)


def widen(
    model: Model,
    width: Annotated[
        list[str],
        typer.Option(
            metavar="WIDTH",
            help="A factor for the whole model (1.5); or, as often as you like, LAYER=FACTOR (layer3=2.0) or "
            "LAYER=CHANNELS (layer1.0.conv1=96).",
        ),
    ],
    out: Out = None,
    mapping: Annotated[
        str, typer.Option(help="Which channels are copied: random (the paper's draws) or balanced (all equally often).")
    ] = "random",
    break_symmetry: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="How copies come to learn different things: uneven (uneven shares of the weights that read them) or "
            "zero-sum (noise on those weights), which are exact; or noise, the paper's on the copies' own weights, "
            "which is not. [default: not at all]",
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise, in those of each weight.")] = 0.05,
    round_to: RoundTo = 1,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    check: Check = True,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a model wider without changing what it computes (Net2Net)."""
    folder = _folder(out, dry_run, force)
    wish = one_or_per_layer("--width", width, float, int_or_float)
    before = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    after = widen_module(
        before, wish, mapping=mapping, break_symmetry=break_symmetry, noise=noise, seed=seed, round_to=round_to
    )
    left = unwidened(before, wish, round_to=round_to)

    def compared() -> Verification:
        """In float64 all through: the means of a stream's channels are rounded to the weights' dtype."""
        exact = copy.deepcopy(before).double()
        return _compare(apply(exact, recipe(after).steps[len(recipe(before).steps) :]), exact)

    plain = break_symmetry == "noise"
    _finish(before, after, folder, compared if check else None, as_json=as_json, left=left, inexact=plain)


def deepen(
    model: Model,
    at: Annotated[
        list[str],
        typer.Option(metavar="PLACE", help="LAYER, or LAYER=COUNT, as often as you like: where to insert layers."),
    ],
    out: Out = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="What to insert: layer (an identity layer), residual (a block whose last layer is zero) or block (a "
            "copy of the block at the end of a stage, its last layers zero). [default: what fits]"
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of identity convolutions, odd: 3, or one for each direction as in 1,7."),
    ] = None,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    check: Check = True,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a model deeper without changing what it computes (Net2Net)."""
    folder = _folder(out, dry_run, force)
    places = per_layer("--at", [item if "=" in item else f"{item}=1" for item in at], int)
    before = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    after = deepen_module(before, places, form=form, kernel=kernel_size(kernel), seed=seed)
    _finish(before, after, folder, (lambda: _compare(after, before)) if check else None, as_json=as_json)


def slim(
    model: Model,
    rate: Annotated[
        list[str],
        typer.Option(
            metavar="RATE",
            help="The split rate, in (0, 1]: what is kept of every layer; or, as often as you like, LAYER=RATE.",
        ),
    ],
    out: Out = None,
    round_to: RoundTo = 1,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    check: Check = True,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Carve a slim model out of a dense one (KELS): the first channels of every layer.

    It is compared with the dense model whose other channels are switched off.
    """
    folder = _folder(out, dry_run, force)
    wish = one_or_per_layer("--rate", rate, float, float)
    before = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    after = slim_module(before, wish, round_to=round_to)

    def compared() -> Verification:
        return _compare(after, masked(before, split_masks(before, wish, round_to=round_to)))

    _finish(before, after, folder, compared if check else None, as_json=as_json)


def _folder(out: Path | None, dry_run: bool, force: bool) -> Path | None:
    """The folder to write, looked at before any work is done for it; none for a dry run."""
    if dry_run:
        return None
    if out is None:
        raise UsageError("Missing option '--out': name the folder to write, or see what would change with --dry-run")
    refuse_folder(out, marker=RECIPE, force=force)
    return out


def _compare(after: nn.Module, expected: nn.Module) -> Verification:
    args, kwargs = example_inputs(after)
    both = (comparable(after), comparable(expected))
    return verify(*both, args, kwargs=kwargs, dtype=torch.float64, tolerance=EXACT)


def _finish(
    before: nn.Module,
    after: nn.Module,
    folder: Path | None,
    compare: Callable[[], Verification] | None,
    *,
    as_json: bool,
    left: Mapping[str, str] | None = None,
    inexact: bool = False,
) -> None:
    """Verify and save what was made, unless it is a dry run, and say what it costs."""
    facts: dict[str, object] = {"inexact_by_choice": True} if inexact else {}
    if left is not None:
        facts["left_alone"] = dict(left)
    reasons = [f"left alone: {reason}" for reason in (left or {}).values()]
    if folder is None:
        _show(before, after, as_json, facts, [*([INEXACT] if inexact else []), *reasons])
        return
    verified = compare() if compare else None
    if verified and not (inexact and math.isfinite(verified.max_rel)):
        verified.raise_if_different()
    figures = {"before": cost(before), "after": cost(after)}
    save(after, folder, force=True)  # what was there has been looked at before
    rows = [[name, quantity(c.params), quantity(c.macs), mebibytes(c.bytes)] for name, c in figures.items()]
    equal = f"verified in {verified.dtype}: relative difference {verified.max_rel:.1e}" if verified else "not verified"
    if inexact:
        by = f"; here by {verified.max_rel:.1e} of its magnitude, in {verified.dtype}" if verified else ""
        equal = f"{INEXACT}{by}"
    emit(
        {
            "out": str(folder),
            **{name: c.to_dict() for name, c in figures.items()},
            "verification": verified.to_dict() if verified else None,
            **facts,
        },
        as_json,
        table("", ["", "parameters", "MACs an input", "size"], rows),
        note="\n".join([equal, *reasons, f"saved to {folder}"]),
    )


def _show(
    before: nn.Module, after: nn.Module, as_json: bool, facts: Mapping[str, object], reasons: Sequence[str]
) -> None:
    """Say what a dry run would change."""
    found = changes(before, after)
    rows = found.rows()
    more = [f"and {counted(len(rows) - SHOWN, 'more layer')} (--json lists all)"] if len(rows) > SHOWN else []
    emit(
        {"dry_run": True, **found.to_dict(), **facts},
        as_json,
        *([table("", HEADER, rows[:SHOWN], text=["class"], left=["in", "out", "shape"])] if rows else []),
        note="\n".join([*more, found.summary(), *reasons, "nothing was written"]),
    )
