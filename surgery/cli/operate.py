"""Verbs that make a new model from a model: widen, deepen, slim."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import surgery
from surgery.cli.fields import takes_fields
from surgery.cli.options import (
    EXACT,
    AsJson,
    Force,
    Model,
    Opening,
    parse_kernel,
    parse_number,
    parse_one_or_per_layer,
    parse_per_layer,
)
from surgery.cli.output import emit, table
from surgery.errors import UsageError
from surgery.units import counted, mebibytes, quantity

if TYPE_CHECKING:
    from torch import nn

INEXACT = "inexact by choice: noise on the weights of copies changes the output"
SHOWN = 40
"""Layers that a dry run lists for people, at the most."""

RoundTo = Annotated[int, typer.Option(help="Round numbers of channels up to a multiple of this.")]

OutputNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="What the model returns whose channels may change: free for all of it; or, as often as you like, the NAME "
        "of an output. [default: none]",
    ),
]


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


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery widen resnet18 --width 1.5 --out wide")(widen)
    app.command(epilog="Example: surgery deepen resnet18 --at layer3=2 --at layer1.0.conv1 --out deep")(deepen)
    app.command(epilog="Example: surgery slim resnet18 --rate 0.5 --out slim")(slim)


@takes_fields()
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
    mapping: Annotated[
        str, typer.Option(help="Which channels are copied: random (as in the paper) or balanced (all equally often).")
    ] = "random",
    break_symmetry: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="How copies come to learn different things. Exact: uneven (shares of the weights that read them) or "
            "zero-sum (noise on those weights). Not exact: noise (on the copies' own weights, as in the paper). "
            "[default: they do not]",
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise, in those of each weight.")] = 0.05,
    round_to: RoundTo = 1,
    outputs: OutputNames = None,
    *,
    opening: Opening,
    writing: Writing,
) -> None:
    """Make a model wider without changing what it computes (Net2Net)."""
    writing.refuse()
    wish = parse_one_or_per_layer("--width", width, float, parse_number)
    before = opening.open(model)
    free = _outputs(outputs)
    after = surgery.widen(
        before,
        wish,
        mapping=mapping,
        break_symmetry=break_symmetry,
        noise=noise,
        seed=opening.seed,
        round_to=round_to,
        outputs=free,
    )
    left = surgery.unwidened(before, wish, round_to=round_to, outputs=free)

    def compare() -> surgery.Verification:
        """Compare in float64 throughout: means of channels are rounded to the dtype of the weights."""
        exact = copy.deepcopy(before).double()
        new_steps = surgery.recipe(after).steps[len(surgery.recipe(before).steps) :]
        return _compare(surgery.apply(exact, new_steps), exact)

    _finish(before, after, writing, compare, left=left, inexact=break_symmetry == "noise")


@takes_fields()
def deepen(
    model: Model,
    at: Annotated[
        list[str],
        typer.Option(metavar="PLACE", help="Where to insert layers: LAYER or LAYER=COUNT, as often as you like."),
    ],
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
    *,
    opening: Opening,
    writing: Writing,
) -> None:
    """Make a model deeper without changing what it computes (Net2Net)."""
    writing.refuse()
    places = parse_per_layer("--at", [item if "=" in item else f"{item}=1" for item in at], int)
    before = opening.open(model)
    after = surgery.deepen(before, places, form=form, kernel=parse_kernel(kernel), seed=opening.seed)
    _finish(before, after, writing, lambda: _compare(after, before))


@takes_fields()
def slim(
    model: Model,
    rate: Annotated[
        list[str],
        typer.Option(
            metavar="RATE",
            help="The split rate, in (0, 1]: the part of every layer to keep; or, as often as you like, LAYER=RATE.",
        ),
    ],
    round_to: RoundTo = 1,
    outputs: OutputNames = None,
    *,
    opening: Opening,
    writing: Writing,
) -> None:
    """Carve a slim model out of a dense one (KELS): the first channels of every layer.

    It is compared with the dense model whose other channels are switched off.
    """
    writing.refuse()
    wish = parse_one_or_per_layer("--rate", rate, float, float)
    before = opening.open(model)
    free = _outputs(outputs)
    after = surgery.slim(before, wish, round_to=round_to, outputs=free)

    def compare() -> surgery.Verification:
        masks = surgery.split_masks(before, wish, round_to=round_to, outputs=free)
        return _compare(after, surgery.masked(before, masks))

    _finish(before, after, writing, compare)


def _outputs(names: Sequence[str] | None) -> str | Sequence[str] | None:
    """Tell `free`, given alone, from names."""
    return names[0] if names and len(names) == 1 else names


def _compare(after: nn.Module, expected: nn.Module) -> surgery.Verification:
    import torch

    args, kwargs = surgery.example_inputs(after)
    both = (surgery.comparable(after), surgery.comparable(expected))
    return surgery.verify(*both, args, kwargs=kwargs, dtype=torch.float64, tolerance=EXACT)


def _finish(
    before: nn.Module,
    after: nn.Module,
    writing: Writing,
    compare: Callable[[], surgery.Verification],
    *,
    left: Mapping[str, str] | None = None,
    inexact: bool = False,
) -> None:
    """Verify and save the new model, unless it is a dry run, and print what it costs."""
    facts: dict[str, object] = {"inexact_by_choice": True} if inexact else {}
    if left is not None:
        facts["left_alone"] = dict(left)
    held = surgery.unedited(before)
    facts["unedited"] = held.to_dict()
    reasons = [f"output {output}" for output in surgery.outputs(after) if output.kept]
    reasons += [f"left alone: {reason}" for reason in (left or {}).values()]
    reasons += [str(held)] if held.macs > _WORTH_SAYING else []
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
